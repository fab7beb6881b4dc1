"""Adapter folders in PEFT's layout: PEFT computes what we wrote, we compute what PEFT wrote."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.gptq import GPTQLoraLinear
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from halfbyte import InputError, outputs, run
from halfbyte.adapters import attached
from halfbyte.containers import peft as container
from halfbyte.layers import Codes, ops
from halfbyte.steps import Adapt
from miniatures import folder, logits, quantized

SETTINGS = [
    {"r": 4, "lora_alpha": 8},
    {"r": 2, "lora_alpha": 3.5, "use_rslora": True},
    {"r": 3, "lora_alpha": 6, "lora_dropout": 0.5},
    {"r": 4, "lora_alpha": 8, "use_dora": True},
    {"r": 3, "lora_alpha": 5, "use_dora": True, "use_rslora": True, "lora_dropout": 0.5},
]


def adapted(base, **settings):
    """A run with adapters whose B is not zero, nor m what it was, as after training."""
    made = run.load(base)
    Adapt(**settings)(made)
    with torch.no_grad():
        for adapter in attached(made.model).values():
            adapter.lora_B.normal_(std=0.05)
            if settings.get("use_dora"):
                shake(adapter.lora_magnitude_vector)
    made.model.eval()
    return made


def shake(m):
    m.mul_(1 + 0.2 * torch.randn_like(m))


def written_by_peft(base, out, **settings):
    """A folder that PEFT wrote, and the logits of its model."""
    model = AutoModelForCausalLM.from_pretrained(base)
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)).eval()
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_magnitude_vector" in name:
                shake(p)
    wrapped.save_pretrained(out, save_embedding_layers=False)  # "auto" would add the whole head, where it is adapted
    return logits(wrapped)


def edit(path, **changes):
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", ["llama", "llama-untied", "gpt2"])
def test_peft_computes_what_we_wrote(tmp_path, name, settings):
    base = folder(tmp_path / "base", name)
    made = adapted(base, **settings)
    out = outputs.save(made, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out).eval()
    torch.testing.assert_close(logits(theirs), logits(made.model), rtol=0, atol=2e-6)
    assert not torch.allclose(logits(made.model), logits(run.load(base).model), atol=1e-3)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(("name", "targets"), [("llama", ["q_proj", "down_proj"]), ("gpt2", ["c_attn", "c_proj"])])
def test_we_compute_what_peft_wrote(tmp_path, name, targets, settings):
    base = folder(tmp_path / "base", name)
    turned = {"fan_in_fan_out": True} if name == "gpt2" else {}
    theirs = written_by_peft(base, tmp_path / "adapter", target_modules=targets, **settings, **turned)
    made = run.load(tmp_path / "adapter")
    torch.testing.assert_close(logits(made.model), theirs, rtol=0, atol=2e-6)
    assert {n.rpartition(".")[2] for n in attached(made.model)} == set(targets)


def test_transformers_own_loader_takes_our_folder(tmp_path):
    base = folder(tmp_path / "base")
    made = adapted(base, r=4)
    out = outputs.save(made, tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.load_adapter(str(out))
    torch.testing.assert_close(logits(model.eval()), logits(made.model), rtol=0, atol=2e-6)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_we_wrote_comes_back_bit_for_bit(tmp_path, dtype, settings):
    made = adapted(folder(tmp_path / "base", dtype=dtype), **settings)
    out = outputs.save(made, tmp_path / "adapter")
    tensors = load_file(out / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in tensors
    again = run.load(out)
    assert torch.equal(logits(again.model), logits(made.model))
    assert [a.settings() for a in attached(again.model).values()] == [
        a.settings() for a in attached(made.model).values()
    ]


@pytest.mark.parametrize(
    ("targets", "stated"),
    [
        ("all-linear", ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        (r".*layers\.1.*q_proj", ["model.layers.1.self_attn.q_proj"]),  # "q_proj" would meet layer 0 too
    ],
)
def test_target_modules_are_endings_where_these_meet_just_the_adapted_layers(tmp_path, targets, stated):
    made = adapted(folder(tmp_path / "base"), target_modules=targets, r=2)
    out = outputs.save(made, tmp_path / "adapter")
    assert json.loads((out / "adapter_config.json").read_text())["target_modules"] == stated
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), out).eval()
    torch.testing.assert_close(logits(theirs), logits(made.model), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("bias", {"bias": "lora_only"}),
        ("layers_to_transform", {"layers_to_transform": [0]}),
        ("trainable_token_indices", {"trainable_token_indices": [3]}),
    ],
)
def test_what_else_peft_can_do_is_refused_by_name(tmp_path, key, settings):
    base = folder(tmp_path / "base", "llama-untied")
    written_by_peft(base, tmp_path / "adapter", target_modules=["q_proj"], r=4, **settings)
    with pytest.raises(InputError, match=key):
        run.load(tmp_path / "adapter")


def test_no_switch_of_this_peft_is_taken_for_one_that_is_on(tmp_path):
    base = folder(tmp_path / "base")
    written_by_peft(base, tmp_path / "adapter", target_modules=["q_proj"], r=4)
    container.read(tmp_path / "adapter")


@pytest.mark.parametrize("value", [True, {"rank": 2}, "yes", 3, ["q_proj"]])
def test_a_switch_that_nobody_knows_yet_is_refused_where_it_is_on(tmp_path, value):
    out = outputs.save(adapted(folder(tmp_path / "base"), r=4), tmp_path / "adapter")
    edit(out, use_something_new=value)
    with pytest.raises(InputError, match="use_something_new"):
        run.load(out)
    edit(out, use_something_new=None)
    run.load(out)


@pytest.mark.parametrize("start", ["pissa_niter_4", "loftq", "corda", "lora_ga", "something-new"])
def test_starts_that_change_the_base_as_only_chance_or_other_files_know_are_refused(tmp_path, start):
    out = outputs.save(adapted(folder(tmp_path / "base"), r=4), tmp_path / "adapter")
    edit(out, init_lora_weights=start)
    with pytest.raises(InputError, match=start):
        run.load(out)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"peft_type": None}, "peft_type"),
        ({"r": "four"}, "r should be a number"),
        ({"r": None}, "r should be a number"),
        ({"r": 0}, "at least 1"),
        ({"lora_alpha": [8]}, "lora_alpha"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern should give"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern should give"),
        ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern should give whole"),
        ({"rank_pattern": {"q_proj": 10**12}}, "not the rank 1000000000000"),
        ({"alpha_pattern": {"q_proj": True}}, "alpha_pattern should give"),
        ({"alpha_pattern": {"(q": 2}}, "no regular expression"),
        ({"alpha_pattern": {"(a+)+$": 2}}, "repeats too much"),
        ({"alpha_pattern": {"(?i)q": 2}}, "no regular expression"),
        ({"alpha_pattern": {"a{99999999999999}": 2}}, "no regular expression"),
        ({"alpha_pattern": {"q" * 301: 2}}, "no layer's name"),
        ({"rank_pattern": {".?" * 26 + "Q": 2}}, "repeats too much"),
        ({"rank_pattern": {"(.|..)" * 22 + "[QZ]": 2}}, "too long to match"),
        ({"rank_pattern": {f"(a|b){i}": 2 for i in range(200)}}, "too much to try"),
        ({"rank_pattern": {f"q{i}": 2 for i in range(5000)}}, "5000 keys"),
        ({"use_rslora": 0.5}, "use_rslora: it is true or false"),
        ({"use_qalora": True, "qalora_group_size": 16, "init_lora_weights": "pissa"}, "inputs are pooled"),
        ({"lora_dropout": 7.0}, "dropout"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path"),
        ({"base_model_name_or_path": "no/such/folder/here"}, "no such"),
        ({"r": 8}, "shape"),
    ],
)
def test_broken_settings_are_refused(tmp_path, changes, says):
    out = outputs.save(adapted(folder(tmp_path / "base"), r=4), tmp_path / "adapter")
    edit(out, **changes)
    with pytest.raises(InputError, match=says):
        run.load(out)


Q = "base_model.model.model.layers.0.self_attn.q_proj"
SEVENTH = Q.replace(".0.", ".7.")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(f"{Q}.lora_A.weight"), "lacks lora_A or lora_B"),
        (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(3)}), "lora_magnitude_vector"),
        (lambda t: t.update({"other": torch.ones(3)}), "other"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 63)}), "shape"),
        (
            lambda t: t.update({f"{Q.replace('.0.', '.7.')}.lora_{k}.weight": torch.ones(4, 64) for k in "AB"}),
            r"layers\.7",
        ),
    ],
)
def test_broken_tensors_are_refused_by_name(tmp_path, change, says):
    out = outputs.save(adapted(folder(tmp_path / "base"), r=4), tmp_path / "adapter")
    tensors = load_file(out / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, out / "adapter_model.safetensors")
    with pytest.raises(InputError, match=says):
        run.load(out)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dora_has_the_tensors_that_peft_gives_it(tmp_path, name):
    """And PEFT, saving what it read of ours, writes the same numbers under the same names."""
    base = folder(tmp_path / "base", name)
    out = outputs.save(adapted(base, r=4, use_dora=True), tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours, again = (load_file(p / "adapter_model.safetensors") for p in (out, tmp_path / "theirs"))
    assert ours.keys() == again.keys()
    assert all(torch.equal(ours[n], again[n]) for n in ours)
    assert {n.rpartition(".lora_")[2] for n in ours} == {"A.weight", "B.weight", "magnitude_vector"}
    for path in (out, tmp_path / "theirs"):
        assert json.loads((path / "adapter_config.json").read_text())["use_dora"] is True


def with_qalora(base, path):
    """The base as plain transformers reads it, with the layer that PEFT has for QA-LoRA: that of GPTQ's codes, which
    takes any layer that computes y of x. Its tensors are a folder's."""
    model = AutoModelForCausalLM.from_pretrained(base)
    config, tensors = LoraConfig.from_pretrained(path), load_file(path / "adapter_model.safetensors")
    for name in {n.partition(".lora_")[0] for n in tensors}:
        own = name.removeprefix("base_model.model.")
        layer = GPTQLoraLinear(model.get_submodule(own), "default", config, r=config.r, lora_alpha=config.lora_alpha)
        state = {k: tensors[f"{name}.lora_{k}.weight"] for k in "AB"}
        layer.lora_A["default"].load_state_dict({"weight": state["A"]})
        layer.lora_B["default"].load_state_dict({"weight": state["B"]})
        model.set_submodule(own, layer)
    return model.eval()


@pytest.mark.parametrize("settings", [{"r": 4, "lora_alpha": 8}, {"r": 2, "use_rslora": True, "lora_dropout": 0.5}])
@pytest.mark.parametrize("size", [16, 64])
def test_peft_computes_what_we_wrote_of_qa_lora(tmp_path, size, settings):
    base = folder(tmp_path / "base")
    made = adapted(base, use_qalora=True, qalora_group_size=size, **settings)
    out = outputs.save(made, tmp_path / "adapter")
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["use_qalora"], config["qalora_group_size"]) == (True, size)
    theirs = logits(with_qalora(base, out))
    torch.testing.assert_close(theirs, logits(made.model), rtol=0, atol=2e-6)
    assert not torch.allclose(theirs, logits(run.load(base).model), atol=1e-3)
    again = run.load(out)
    assert torch.equal(logits(again.model), logits(made.model))
    assert attached(again.model).keys() == attached(made.model).keys()


@pytest.mark.parametrize("size", [0, 24, -16, "16", 16.0, None, 1 << 40])
def test_a_group_size_that_cannot_be_is_refused(tmp_path, size):
    out = outputs.save(adapted(folder(tmp_path / "base"), r=4, use_qalora=True, qalora_group_size=32), tmp_path / "a")
    edit(out, qalora_group_size=size)
    with pytest.raises(InputError, match="qalora_group_size"):
        run.load(out)


def test_lora_and_qa_lora_are_not_taken_for_each_other(tmp_path):
    base = folder(tmp_path / "base")
    for use in (True, False):
        own = {"use_qalora": True, "qalora_group_size": 16} if use else {}
        out = outputs.save(adapted(base, r=4, **own), tmp_path / f"adapter-{use}")
        edit(out, use_qalora=not use, qalora_group_size=16)
        with pytest.raises(InputError, match="shape"):
            run.load(out)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(f"{Q}.lora_magnitude_vector"), "lacks lora_A or lora_B or lora_magnitude_vector"),
        (lambda t: t.pop(f"{Q}.lora_B.weight"), "lacks lora_A or lora_B or lora_magnitude_vector"),
        (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(63)}), r"lora_magnitude_vector has the shape"),
        (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(1, 64)}), r"lora_magnitude_vector has the shape"),
        (lambda t: t.update({f"{Q}.lora_magnitude": torch.ones(64)}), "not known"),
    ],
)
def test_a_broken_dora_is_refused_by_name(tmp_path, change, says):
    out = outputs.save(adapted(folder(tmp_path / "base"), r=4, use_dora=True), tmp_path / "adapter")
    tensors = load_file(out / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, out / "adapter_model.safetensors")
    with pytest.raises(InputError, match=says):
        run.load(out)


def test_lora_and_dora_are_not_taken_for_each_other(tmp_path):
    for use_dora, says in ((True, "magnitude_vector.* is not known"), (False, "lacks .*lora_magnitude_vector")):
        base = folder(tmp_path / f"base-{use_dora}")
        out = outputs.save(adapted(base, r=4, use_dora=use_dora), tmp_path / f"adapter-{use_dora}")
        edit(out, use_dora=not use_dora)
        with pytest.raises(InputError, match=says):
            run.load(out)


def test_adapters_in_pickle_files_are_not_read(tmp_path):
    out = outputs.save(adapted(folder(tmp_path / "base"), r=4), tmp_path / "adapter")
    (out / "adapter_model.safetensors").rename(out / "adapter_model.bin")
    with pytest.raises(InputError, match="pickle"):
        run.load(out)


def test_an_adapter_refuses_another_base(tmp_path):
    made = adapted(folder(tmp_path / "base"), r=4)
    made.notes["base_sha256"] = made.loaded.sha256
    out = outputs.save(made, tmp_path / "adapter")
    run.load(out)
    torch.manual_seed(1)
    folder(tmp_path / "base")  # other weights at the same place
    with pytest.raises(InputError, match="other weights"):
        run.load(out)


def test_a_peft_adapter_goes_onto_a_quantized_base(tmp_path):
    base = folder(tmp_path / "base")
    written_by_peft(base, tmp_path / "adapter", target_modules=["q_proj"], r=4)
    made = quantized(base, "nf4-g64")
    before = logits(made.model)
    Adapt(path=str(tmp_path / "adapter"))(made)
    assert len(attached(made.model)) == 2
    assert not torch.equal(logits(made.model), before)
    assert all(isinstance(op.weight.stored, Codes) for n, op in ops(made.model) if n in attached(made.model))


def test_a_tied_head_gets_no_adapter(tmp_path):
    """PEFT's would move the head alone; one on the shared weight would move the embedding with it."""
    base = folder(tmp_path / "base")
    with pytest.raises(InputError, match=r"lm_head shares its weight with model\.embed_tokens"):
        adapted(base, target_modules=["lm_head"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of the same
        written_by_peft(base, tmp_path / "adapter", target_modules=["lm_head"], r=4)
    with pytest.raises(InputError, match="lm_head shares"):
        run.load(tmp_path / "adapter")


def test_an_untied_head_gets_one(tmp_path):
    base = folder(tmp_path / "base", "llama-untied")
    theirs = written_by_peft(base, tmp_path / "adapter", target_modules=["lm_head"], r=4)
    torch.testing.assert_close(logits(run.load(tmp_path / "adapter").model), theirs, rtol=0, atol=2e-6)
