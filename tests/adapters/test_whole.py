"""modules_to_save: trained whole beside the adapters, written and read as PEFT does."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from halfbyte import InputError, adapters, kinds, run
from halfbyte.adapters import attached, whole
from halfbyte.kinds import gguf_lora
from halfbyte.layers import Codes, ops, weights
from halfbyte.model import load
from halfbyte.steps import Adapt, trainable
from miniatures import folder, logits, quantized

TEXT = [{"text": "a small text that is learnt by heart, twice over and once again"}] * 4
SHORT = {"data": TEXT, "steps": 3, "batch_size": 2, "max_length": 24, "learning_rate": 1e-2, "r": 4}
SAVED = [("llama-untied", ["lm_head"]), ("llama-untied", ["embed_tokens", "lm_head"]), ("llama", ["norm"]),
         ("llama", ["layers.1.mlp"]), ("gpt2", ["c_fc", "ln_f"])]  # fmt: skip


def theirs(base, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "saved"), SAVED)
def test_trained_and_written_peft_and_we_compute_the_same(tmp_path, name, saved, dtype):
    base = folder(tmp_path / "base", name, words=True, dtype=dtype)
    before = {n: p.clone() for n, p in run.load(base).model.named_parameters()}
    made = load(base).train(modules_to_save=saved, **SHORT)
    now = dict(made.model.named_parameters())
    moved = {n for n, p in before.items() if not torch.equal(now[n], p)}
    assert moved == {n for n in before if any(n.startswith(f"{k}.") for k in whole.kept(made.model))}
    assert moved
    path = made.save(tmp_path / "adapter")
    assert torch.equal(logits(load(path).model), logits(made.model))
    if dtype == torch.float32:
        torch.testing.assert_close(logits(theirs(base, path)), logits(made.model), rtol=0, atol=1e-5)
    unmerged = logits(made.model)
    made.merge()
    torch.testing.assert_close(logits(made.model), unmerged, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05)
    assert torch.equal(logits(load(made.save(tmp_path / "merged")).model), logits(made.model))
    assert not whole.kept(made.model)


@pytest.mark.parametrize(("name", "saved"), SAVED)
def test_we_compute_what_peft_wrote_and_write_it_again(tmp_path, name, saved):
    base = folder(tmp_path / "base", name)
    targets = ["q_proj"] if name != "gpt2" else ["c_attn"]
    config = LoraConfig(r=4, target_modules=targets, modules_to_save=saved, init_lora_weights=False,
                        fan_in_fan_out=name == "gpt2")  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if ".modules_to_save." in n:
                p += 0.1 * torch.randn_like(p)
    model.save_pretrained(tmp_path / "adapter")
    made = load(tmp_path / "adapter")
    torch.testing.assert_close(logits(made.model), logits(model), rtol=0, atol=1e-5)
    ours, told = made.save(tmp_path / "ours"), tmp_path / "adapter"
    one, other = (load_file(p / "adapter_model.safetensors") for p in (ours, told))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[n], other[n]) for n in one)
    torch.testing.assert_close(logits(theirs(base, ours)), logits(model), rtol=0, atol=1e-5)


def test_what_is_trained_is_adapters_and_those_modules(tmp_path):
    made = run.load(folder(tmp_path / "base", "llama-untied"))
    Adapt(r=2, modules_to_save=["lm_head", "input_layernorm"], target_modules=["q_proj", "lm_head"])(made)
    assert trainable(made.model) == "adapters"
    asked = {n for n, p in made.model.named_parameters() if p.requires_grad and ".adapters." not in n}
    assert asked == {"lm_head.weight.stored", *(f"model.layers.{i}.input_layernorm.weight" for i in (0, 1))}
    assert {n.rpartition(".")[2] for n in attached(made.model)} == {"q_proj"}


def test_codes_that_are_trained_whole_become_floats(tmp_path):
    base = folder(tmp_path / "base", words=True)
    made = load(base).train(method="qlora", modules_to_save=["layers.0.mlp.up_proj"], **SHORT)
    held = {n: isinstance(w.stored, Codes) for n, w in weights(made.model).items()}
    assert not held["model.layers.0.mlp.up_proj.weight"]
    assert held["model.layers.1.mlp.up_proj.weight"]
    path = made.save(tmp_path / "adapter")
    assert torch.equal(logits(load(path).model), logits(made.model))


def test_inputs_of_codes_that_became_floats_are_rounded_no_more(tmp_path):
    base = folder(tmp_path / "base", words=True)
    made = load(load(base).quantize("W8A8").save(tmp_path / "codes"))
    Adapt(r=2, modules_to_save=["layers.0.mlp"])(made)
    mlp = made.model.model.layers[0].mlp
    assert [op.input for op in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)] == [None] * 3
    assert made.model.model.layers[1].mlp.up_proj.input is not None
    again = load(made.save(tmp_path / "adapter"))
    assert torch.equal(logits(again.model), logits(made.model))
    unmerged = logits(made.model)
    assert torch.equal(logits(load(made.merge().save(tmp_path / "merged")).model), logits(made.model))
    assert not torch.equal(logits(made.model), unmerged)  # inputs of what was adapted are floats now too


def test_a_module_stays_a_float_while_the_adapters_stay(tmp_path):
    base = folder(tmp_path / "base", words=True)
    path = load(base).train(method="qlora", modules_to_save=["layers.0.mlp.up_proj"], **SHORT).save(tmp_path / "one")
    made = load(path).train(method="qlora", **SHORT)
    module = made.model.model.layers[0].mlp.up_proj
    assert list(whole.kept(made.model).values()) == [module]
    assert not torch.equal(module.weight.base(), load(path).model.model.layers[0].mlp.up_proj.weight.base())
    assert torch.equal(logits(load(made.save(tmp_path / "two")).model), logits(made.model))


def test_marks_go_when_a_quantize_folds_the_adapters_in(tmp_path):
    base = folder(tmp_path / "base", "llama-untied", words=True)
    path = load(base).train(modules_to_save=["lm_head"], **SHORT).save(tmp_path / "adapter")
    made = load(path)
    assert list(whole.kept(made.model)) == ["lm_head"]
    made.quantize("int4-g32")
    assert not whole.kept(made.model)
    made.train(method="qlora", **SHORT)
    config = json.loads((made.save(tmp_path / "again") / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None


def test_a_module_is_seen_through_its_grid(tmp_path):
    base = folder(tmp_path / "base", words=True)
    made = load(base).train(method="qat-lora", to="W4A16", modules_to_save=["layers.0.mlp.up_proj"], **SHORT)
    again = load(made.save(tmp_path / "adapter"))
    assert torch.equal(logits(again.model), logits(made.model))
    again.merge()
    assert torch.equal(logits(again.model), logits(made.model))


def test_training_goes_on_from_its_folder(tmp_path):
    base = folder(tmp_path / "base", "llama-untied", words=True)
    path = load(base).train(modules_to_save=["lm_head"], **SHORT).save(tmp_path / "one")
    made = load(base).train(path=str(path), **{k: v for k, v in SHORT.items() if k != "r"})
    head = {p: load(p).model.lm_head.weight.base() for p in (base, path, made.save(tmp_path / "two"))}
    assert not any(torch.equal(head[a], head[b]) for a, b in ((base, path), (path, tmp_path / "two")))


@pytest.mark.parametrize(
    ("name", "saved", "says"),
    [
        ("llama", ["lm_head"], r"lm_head shares its weight with model\.embed_tokens"),
        ("llama", ["embed_tokens", "lm_head"], "shares its weight"),
        ("llama", ["no_such"], "ends in 'no_such'"),
        ("llama", ["act_fn"], "has no weights"),
        ("mixtral", ["experts"], "holds experts"),
    ],
)
def test_what_cannot_be_trained_whole_is_refused(tmp_path, name, saved, says):
    made = run.load(folder(tmp_path / "base", name))
    with pytest.raises(InputError, match=says):
        Adapt(modules_to_save=saved)(made)
    assert not whole.kept(made.model)
    assert not attached(made.model)


def test_nothing_is_left_to_adapt(tmp_path):
    with pytest.raises(InputError, match="meets no linear layer"):
        Adapt(modules_to_save=["q_proj"], target_modules=["q_proj"])(run.load(folder(tmp_path / "base")))


KEY = "base_model.model.lm_head.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(KEY), r"'lm_head\.weight' is missing"),
        (lambda t: t.update({KEY: torch.ones(3, 4)}), r"lm_head\.weight is .* of the shape \(3, 4\)"),
        (lambda t: t.update({KEY: torch.ones(128, 64, dtype=torch.int64)}), "int64"),
        (lambda t: t.update({KEY.replace("weight", "other"): torch.ones(3)}), "of no such module"),
        (lambda t: t.update({"lm_head.weight": torch.ones(3)}), "not known"),
    ],
)
def test_broken_tensors_are_refused_by_name(tmp_path, change, says):
    made = load(folder(tmp_path / "base", "llama-untied")).apply(Adapt(r=2, modules_to_save=["lm_head"]))
    path = made.save(tmp_path / "adapter")
    tensors = load_file(path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, path / "adapter_model.safetensors")
    with pytest.raises(InputError, match=says):
        load(path)


@pytest.mark.parametrize("value", ["lm_head", [3], [""], {"a": 1}])
def test_broken_settings_are_refused(tmp_path, value):
    made = load(folder(tmp_path / "base")).apply(Adapt(r=2))
    path = made.save(tmp_path / "adapter") / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"modules_to_save": value}))
    with pytest.raises(InputError, match="modules_to_save should be a list"):
        load(path.parent)


def test_ggufs_file_has_no_place_for_them(tmp_path):
    made = load(folder(tmp_path / "base")).apply(Adapt(r=2, modules_to_save=["model.norm"]))
    assert str(gguf_lora.refuses(kinds.Job(made.loaded))).startswith("model.norm was trained whole")


def test_they_are_told_apart_from_what_adapters_hold(tmp_path):
    made = quantized(folder(tmp_path / "base"), "nf4-g64")
    Adapt(r=2)(made)
    assert whole.state(made.model) == {}
    assert adapters.whole.keep(made.model, ["layers.0"]) == ["model.layers.0"]
    assert set(whole.state(made.model)) == {
        n for n, _ in AutoModelForCausalLM.from_pretrained(tmp_path / "base").named_parameters() if ".layers.0." in n
    }
    assert not any(isinstance(op.weight.stored, Codes) for n, op in ops(made.model) if ".layers.0." in n)
