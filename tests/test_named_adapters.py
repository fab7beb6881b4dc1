"""Several adapters over one base, chosen by name; and what an adapter beside 4-bit codes goes through."""

import json

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from halfbyte import FORMATS, InputError, export, kinds
from halfbyte.adapters import attached, loaded, whole
from halfbyte.adapters.lora import Lora
from halfbyte.kinds import gguf_lora
from halfbyte.layers import Codes, Grid, Weight, weights
from halfbyte.model import load
from halfbyte.named_adapters import load_adapter
from halfbyte.run import notes_of
from halfbyte.steps import Freeze
from miniatures import folder, logits

TEXT = [{"text": "a small text that is learnt by heart, twice over and once again"}] * 4
SHORT = {"data": TEXT, "steps": 3, "batch_size": 2, "max_length": 24, "learning_rate": 1e-2}


@pytest.fixture
def llama(tmp_path):
    return folder(tmp_path / "llama", words=True)


def adapter(base, path, method="lora", to=None, **changes):
    """A folder, and the logits that it was saved with."""
    made = load(base).train(method=method, to=to, **{**SHORT, "r": 4, **changes})
    return made.save(path), logits(made.model)


@pytest.fixture
def two(llama, tmp_path):
    """Two adapters of other layers and ranks, with their logits."""
    return adapter(llama, tmp_path / "a"), adapter(llama, tmp_path / "b", r=2, target_modules=["q_proj"], steps=5)


def test_one_in_use_computes_what_it_does_alone(llama, two):
    (a, of_a), (b, of_b) = two
    made = load(llama)
    plain = logits(made.model)
    made.load_adapter(a, "first").load_adapter(b, "second")
    assert made.active_adapter == "first"
    assert loaded(made.model) == ["first", "second"]
    for name, wanted in (("first", of_a), ("second", of_b), ("second", of_b), ("first", of_a)):
        made.set_adapter(name)
        assert made.active_adapter == name
        assert torch.equal(logits(made.model), wanted)
    assert not any(torch.equal(x, y) for x, y in ((of_a, of_b), (of_a, plain), (of_b, plain)))


def test_peft_computes_the_same_by_the_same_names(llama, two):
    (a, _), (b, _) = two
    made = load(llama).load_adapter(a, "first").load_adapter(b, "second")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), a, adapter_name="first").eval()
    theirs.load_adapter(b, "second")
    for name in ("first", "second"):
        theirs.set_adapter(name)
        torch.testing.assert_close(logits(theirs), logits(made.set_adapter(name).model), rtol=0, atol=2e-6)


def test_the_one_in_use_is_saved_with_its_own_notes_and_trained_alone(llama, two, tmp_path):
    (a, of_a), (b, _) = two
    made = load(llama).load_adapter(a, "first").load_adapter(b, "second").set_adapter("second")
    for name in ("adapter_model.safetensors", "halfbyte.json", "adapter_config.json"):
        out = made.save(tmp_path / f"again-{name}")
        assert (out / name).read_bytes() == (b / name).read_bytes()
    made.train(method="lora", **SHORT)
    after = load_file(made.save(tmp_path / "on") / "adapter_model.safetensors")
    before = load_file(b / "adapter_model.safetensors")
    assert after.keys() == before.keys()
    assert not any(torch.equal(after[n], before[n]) for n in before)
    assert torch.equal(logits(made.set_adapter("first").model), of_a)


def test_merging_folds_in_the_one_in_use_and_leaves_no_other(llama, two):
    (a, _), (b, of_b) = two
    made = load(llama).load_adapter(a, "first").load_adapter(b, "second").set_adapter("second").merge()
    torch.testing.assert_close(logits(made.model), of_b, rtol=0, atol=1e-5)
    assert loaded(made.model) == []
    with pytest.raises(InputError, match="those are none"):
        made.set_adapter("first")


@pytest.mark.parametrize(("method", "to"), [("qlora", None), ("qat-lora", "int4-g32"), ("qa-lora", "uint4-g32")])
def test_the_first_brings_the_base_into_its_form_and_others_share_it(llama, tmp_path, method, to):
    a, of_a = adapter(llama, tmp_path / "a", method, to)
    b, of_b = adapter(llama, tmp_path / "b", method, to, steps=5)
    made = load(llama).load_adapter(a, "first").load_adapter(b, "second")
    for name, wanted in (("second", of_b), ("first", of_a)):
        assert torch.equal(logits(made.set_adapter(name).model), wanted)


def test_one_of_another_form_is_refused_and_what_is_there_stays(llama, two, tmp_path):
    (a, of_a), _ = two
    q, of_q = adapter(llama, tmp_path / "q", "qlora")
    made = load(llama).load_adapter(a, "first")
    with pytest.raises(InputError, match=r"q: it was trained beside its base as NF4, which is floats here"):
        made.load_adapter(q, "second")
    assert torch.equal(logits(made.model), of_a)
    made = load(llama).quantize("NF4").load_adapter(q, "only")
    assert torch.equal(logits(made.model), of_q)
    with pytest.raises(InputError, match=r"as floats, which is NF4 here"):
        made.load_adapter(a, "second")


def test_one_of_other_weights_or_no_adapter_is_refused_before_the_base_is_touched(two, tmp_path, llama):
    torch.manual_seed(1)
    made = load(folder(tmp_path / "other", words=True))
    before = logits(made.model)
    with pytest.raises(InputError, match="other weights"):
        made.load_adapter(two[0][0], "first")
    with pytest.raises(InputError, match=r"adapter_config\.json is missing"):
        made.load_adapter(llama, "first")
    assert torch.equal(logits(made.model), before)
    assert made.active_adapter is None


@pytest.mark.parametrize("name", ["", "a.b", "a b", "../x", "keys", "pop", "forward", "training"])
def test_names_that_cannot_be(llama, two, name):
    with pytest.raises(InputError, match="cannot be named"):
        load_adapter(load(llama), two[0][0], name)


def test_each_has_a_ledger_a_log_and_notes_of_its_own(llama, two, tmp_path):
    (a, _), (b, _) = two
    made = load(llama).load_adapter(a, "first").load_adapter(b, "second")
    made.evaluate(TEXT, stage="of the first")
    made.set_adapter("second").train(method="lora", **SHORT)
    log = made.log
    made.evaluate(TEXT, stage="of the second")
    for name in ("first", "second"):
        path = made.set_adapter(name).save(tmp_path / name)
        stages = [row["stage"] for row in json.loads((path / "ledger.json").read_text())]
        assert stages == [f"of the {name}"]
    assert made.log is log
    assert made.set_adapter("first").log is None


def test_the_card_does_not_give_the_hash_of_another_folder(llama, two, tmp_path):
    (a, _), _ = two
    made = load(llama).load_adapter(a, "first").train(method="lora", **SHORT)
    path = made.save(tmp_path / "on")
    before, after = (notes_of(p)["sha256"] for p in (a, path))
    assert before != after
    assert before not in (path / "README.md").read_text()


@pytest.mark.parametrize("method", ["qlora", "qat-lora"])
def test_one_whose_codes_were_made_in_another_dtype_is_refused(tmp_path, method):
    base = folder(tmp_path / "base", words=True, dtype=torch.bfloat16)
    path, of_it = adapter(base, tmp_path / "a", method, "int4-g32")
    assert torch.equal(logits(load(base).load_adapter(path, "mine").model), of_it)
    made = load(base, dtype="float32")
    before = logits(made.model)
    with pytest.raises(InputError, match=r"made in bfloat16: load the model in that dtype, not in float32"):
        made.load_adapter(path, "mine")
    assert torch.equal(logits(made.model), before)
    made = load(path, dtype="float32").load_adapter(path, "mine")  # whose base was made in bfloat16 too
    alone = logits(made.model)
    assert torch.equal(logits(made.set_adapter("mine").model), alone)
    plain, _ = adapter(base, tmp_path / "plain")
    load(base, dtype="float32").load_adapter(plain, "mine")


def damage(path, ending):
    """The folder with a tensor that does not fit in place of its last one that is called so. Gives that back."""
    file = path / "adapter_model.safetensors"
    held = load_file(file)
    name = sorted(n for n in held if n.endswith(ending))[-1]
    whole = file.read_bytes()
    save_file({**held, name: torch.zeros(3, 5)}, file)
    return lambda: file.write_bytes(whole)


def test_of_one_that_cannot_be_read_to_its_end_nothing_is_left(llama, two):
    (a, of_a), (b, of_b) = two
    mend = damage(b, "lora_B.weight")
    made = load(llama)
    plain = logits(made.model)
    for _ in range(2):
        with pytest.raises(InputError, match="lora_B"):
            made.load_adapter(b, "second")
        assert loaded(made.model) == []
        assert torch.equal(logits(made.model), plain)
    made.load_adapter(a, "first")
    with pytest.raises(InputError, match="lora_B"):
        made.load_adapter(b, "second")
    assert loaded(made.model) == ["first"]
    assert made.active_adapter == "first"
    assert torch.equal(logits(made.model), of_a)
    mend()
    made.load_adapter(b, "second").set_adapter("second")
    assert torch.equal(logits(made.model), of_b)


def test_of_modules_that_do_not_fit_nothing_is_left(tmp_path):
    base = folder(tmp_path / "base", "llama-untied", words=True)
    path, of_it = adapter(base, tmp_path / "a", modules_to_save=["lm_head", "norm"])
    mend = damage(path, "model.norm.weight")
    made = load(base)
    plain = logits(made.model)
    with pytest.raises(InputError, match=r"norm\.weight is"):
        made.load_adapter(path)
    assert not whole.kept(made.model)
    assert torch.equal(logits(made.model), plain)
    mend()
    assert torch.equal(logits(made.load_adapter(path).model), of_it)


@pytest.mark.parametrize("how", ["scheme", "grid"])
def test_those_that_wait_go_when_a_quantize_folds_the_other_in(llama, tmp_path, how):
    method, to = ("lora", None) if how == "scheme" else ("qat-lora", "int4-g32")
    paths = [adapter(llama, tmp_path / n, method, to)[0] for n in "ab"]
    made = load(llama).load_adapter(paths[0], "first").load_adapter(paths[1], "second")
    made.apply(Freeze(scheme="int4-g32") if how == "scheme" else Freeze())
    assert loaded(made.model) == []
    assert not made.waiting
    with pytest.raises(InputError, match="those are none"):
        made.set_adapter("second")


def test_a_name_that_is_taken_or_unknown(llama, two):
    made = load(llama).load_adapter(two[0][0])
    assert made.active_adapter == "default"
    with pytest.raises(InputError, match="'default' already"):
        made.load_adapter(two[1][0])
    with pytest.raises(InputError, match="no adapter 'other'; those are default"):
        made.set_adapter("other")


# ---- beside codes: saved, loaded, exported, read by PEFT


@pytest.mark.parametrize("to", ["W4A16", "NF4", "uint4-g32"])
def test_an_adapter_beside_a_folder_of_codes(llama, tmp_path, to):
    base = load(llama).quantize(to).save(tmp_path / "codes")
    path, of_it = adapter(base, tmp_path / "adapter", "qlora")
    made = load(path)
    assert torch.equal(logits(made.model), of_it)
    assert sum(isinstance(w.stored, Codes) for w in weights(made.model).values()) == len(attached(made.model)) == 14
    assert torch.equal(logits(load(base).load_adapter(path, "mine").model), of_it)
    job = kinds.Job(made.loaded)
    assert gguf_lora.refuses(job) is None
    assert any("beside a base in" in r for r in gguf_lora.remarks(job))
    export.export(path, job, gguf_lora, tmp_path / "lora.gguf", None)
    assert (tmp_path / "lora.gguf").is_file()
    # to PEFT compressed-tensors' codes must be floats first
    how = {} if to == "NF4" else {"quantization_config": CompressedTensorsConfig(run_compressed=False)}
    theirs = AutoModelForCausalLM.from_pretrained(base, **how)
    for m in theirs.modules():
        if isinstance(m, Linear4bit):
            m.support_avx512bf16_for_cpu = False  # it would repack the weights and multiply in bf16
    theirs = PeftModel.from_pretrained(theirs, path).eval()
    torch.testing.assert_close(logits(theirs), of_it, rtol=0, atol=1e-4)


def test_what_a_grid_was_seen_to_give_is_not_kept_for_another_adapter():
    w = Weight(nn.Parameter(torch.randn(8, 64), requires_grad=False))
    w.grid = Grid(FORMATS["int4-g32"])
    w.adapters["a"] = made = Lora(w, r=2)
    nn.init.normal_(made.lora_B)
    with_it = w.frozen().dequantize()
    w.use(None)
    plain = w.frozen().dequantize()
    assert torch.equal(plain, w.value())
    w.use("a")
    assert torch.equal(w.frozen().dequantize(), with_it)
    assert not torch.equal(with_it, plain)
