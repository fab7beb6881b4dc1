"""Merging into what an adapter was trained on, into what that was made from, and the other way round."""

import json

import pytest
import torch

from halfbyte import InputError, bases, run
from halfbyte.adapters import attached
from halfbyte.containers import peft
from halfbyte.layers import Codes, Linear, ops, weights
from halfbyte.model import load
from halfbyte.steps import Merge
from miniatures import folder, logits

TEXT = [{"text": "a small text that is learnt by heart, twice over and once again"}] * 4
SHORT = {"data": TEXT, "steps": 3, "batch_size": 2, "max_length": 24, "learning_rate": 1e-2, "r": 4}


@pytest.fixture
def original(tmp_path):
    return folder(tmp_path / "original", words=True)


@pytest.fixture
def codes(original, tmp_path):
    return load(original).quantize("int4-g32").save(tmp_path / "codes")


@pytest.fixture
def on_codes(codes, tmp_path):
    return load(codes).train(method="qlora", **SHORT).save(tmp_path / "on-codes")


@pytest.fixture
def on_floats(original, tmp_path):
    return load(original).train(method="lora", **SHORT).save(tmp_path / "on-floats")


def values(model):
    return {n: w.value() for n, w in weights(model).items()}


def sums(adapter, base):
    """W + s B A of another base."""
    added = {f"{n}.weight": a.delta() for n, a in attached(load(adapter).model).items()}
    return {n: w.base() + added.get(n, 0) for n, w in weights(load(base).model).items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_codes_say_what_they_were_made_from(codes, original, on_codes):
    notes = run.notes_of(codes)
    assert notes["original"] == {"model": str(original), "sha256": load(original).loaded.sha256}
    assert str(original) not in (codes / "README.md").read_text()
    assert "original" not in run.notes_of(on_codes)  # it names its base, which says it
    again = run.load(original, weights=False)
    again.notes["stored"] = "W4A16"
    again._note_original()
    assert again.notes["original"] == notes["original"]  # the hash also of what was not read yet


@pytest.mark.parametrize("done", ["trained", "transforms", "merged", "dequantized", "kept_codes"])
def test_what_was_changed_otherwise_says_no_original(original, done):
    made = run.load(original)
    made.notes |= {"stored": "W4A16", done: 1}
    made._note_original()
    assert "original" not in made.notes


def test_trained_on_codes_merged_into_either(on_codes, codes, original):
    made = load(on_codes).merge()
    assert same(values(made.model), sums(on_codes, codes))
    made = load(on_codes).apply(Merge(base="original"))
    assert same(values(made.model), sums(on_codes, original))
    assert not same(sums(on_codes, codes), sums(on_codes, original))
    assert not any(isinstance(w.stored, Codes) for w in weights(made.model).values())


def test_trained_on_floats_merged_into_codes_made_of_them(on_floats, codes, original):
    made = load(on_floats).apply(Merge(base="original", model=str(codes)))
    assert same(values(made.model), sums(on_floats, codes))
    with pytest.raises(InputError, match="trained on floats; name the other base"):
        load(on_floats).apply(Merge(base="original"))
    made = load(on_floats).apply(Merge(base="original", model=str(original)))
    assert same(values(made.model), sums(on_floats, original))


def test_the_other_base(on_codes, on_floats, original, codes, tmp_path):
    assert bases.other(load(on_codes)) == str(original)
    with pytest.raises(InputError, match="trained on floats"):
        bases.other(load(on_floats))
    assert bases.other(load(on_floats), "named") == "named"
    in_memory = load(original).train(method="qlora", **SHORT).save(tmp_path / "q")
    assert bases.other(load(in_memory)) == str(original)


def test_training_that_goes_on_keeps_the_codes_that_it_began_on(original, tmp_path):
    once = load(original).train(method="qlora", to="int4-g32", **SHORT).save(tmp_path / "once")
    made = load(once).train(method="qlora", **{k: v for k, v in SHORT.items() if k != "r"})
    again = load(made.save(tmp_path / "twice"))
    assert torch.equal(logits(again.model), logits(made.model))
    assert again.notes["stored"] == "int4-g32"
    assert bases.other(again) == str(original)


def test_an_original_that_is_unknown_gone_or_another_is_refused(on_codes, codes, original):
    made, notes = load(on_codes), json.loads((codes / run.NOTES).read_text())
    for broken in ({}, {"original": 3}, {"original": {"model": 3}}, {"original": None}):
        (codes / run.NOTES).write_text(json.dumps({k: v for k, v in notes.items() if k != "original"} | broken))
        with pytest.raises(InputError, match=r"does not say what they were made from.*--base-model"):
            bases.other(made)
    (codes / run.NOTES).write_text(json.dumps(notes))
    torch.manual_seed(1)
    folder(original, words=True)
    with pytest.raises(InputError, match="made from other weights"):
        bases.other(made)
    original.rename(original.with_name("elsewhere"))
    with pytest.raises(InputError, match="no longer there: name it by --base-model"):
        bases.other(made)


def test_a_model_of_other_layers_is_refused(on_floats, tmp_path):
    wide = folder(tmp_path / "wide", words=True, intermediate_size=96)
    with pytest.raises(InputError, match=r"no base of this adapter: it has no .*gate_proj\.weight of \(128, 64\)"):
        load(on_floats).apply(Merge(base="original", model=str(wide)))


def test_which_base_is_the_adapters_own(on_codes, codes, original, tmp_path):
    moved = codes.rename(tmp_path / "moved")
    assert bases.own(on_codes, str(moved)) == str(moved)
    assert bases.own(on_codes, str(original)) is None
    assert bases.own(on_codes, None) is None
    made = run.load(on_codes, base=str(moved))
    assert made.loaded.path == moved
    with pytest.raises(InputError, match="other weights"):
        run.load(on_codes, base=str(original))
    with pytest.raises(InputError, match="no adapter folder"):
        run.load(original, base=str(moved))


def test_of_an_adapter_that_records_no_hash_it_is_the_one_that_is_named(on_floats, original, tmp_path):
    (on_floats / run.NOTES).unlink()
    said = json.loads((on_floats / peft.CONFIG).read_text())
    (on_floats / peft.CONFIG).write_text(json.dumps(said | {"base_model_name_or_path": "somebody/something"}))
    own = bases.own(on_floats, str(original))
    assert own == str(original)
    assert same(values(run.load(on_floats, base=own).model), values(load(original).load_adapter(on_floats).model))


@pytest.mark.parametrize(("method", "to"), [("qlora", "int4-g32"), ("qa-lora", None)])
def test_in_another_dtype_the_codes_are_those_that_it_was_trained_on(tmp_path, method, to):
    base = folder(tmp_path / "base", dtype=torch.bfloat16, words=True)
    path = load(base).train(method=method, to=to, **SHORT).save(tmp_path / "adapter")
    own, wide = weights(load(path).model), load(path, dtype="float32")
    assert wide.loaded.config.dtype == wide.model.model.norm.weight.dtype == torch.float32
    held = {n: w for n, w in weights(wide.model).items() if isinstance(w.stored, Codes)}
    assert held
    for name, w in held.items():
        assert torch.equal(w.stored.q.codes, own[name].stored.q.codes)
        assert all(torch.equal(p, own[name].stored.q.parts[k]) for k, p in w.stored.q.parts.items())
        assert w.base().dtype == torch.float32


def rounded(model):
    """The formats that inputs are rounded to, by the layer's name."""
    return {n: op.input.name for n, op in ops(model) if isinstance(op, Linear) and op.input is not None}


def is_what_is_written(made, path):
    """Whether what is computed in memory is what its folder gives, read back. Gives that model."""
    again = load(made.save(path)).model
    assert rounded(again) == rounded(made.model)
    assert torch.equal(logits(again), logits(made.model))
    return again


@pytest.mark.parametrize("to", ["W8A8", "W8A8_STATIC"])
def test_inputs_are_rounded_as_the_other_base_has_it(original, tmp_path, to):
    path = load(original).train(method="lora", target_modules=["q_proj"], **SHORT).save(tmp_path / "adapter")
    codes = tmp_path / "codes"
    load(original).quantize(to, calibration=TEXT if "STATIC" in to else None).save(codes)
    made = load(path).apply(Merge(base="original", model=str(codes)))
    again, theirs = is_what_is_written(made, tmp_path / "out"), load(codes).model
    there = rounded(theirs)
    assert rounded(again) == {n: f for n, f in there.items() if not n.endswith("q_proj")}
    scales = {n: op.input_scale for n, op in ops(theirs) if n in rounded(again)}
    assert all(op.input_scale is None or torch.equal(op.input_scale, scales[n]) for n, op in ops(again) if n in scales)


@pytest.mark.parametrize("base", ["trained", "original"])
def test_inputs_of_sums_that_are_floats_are_rounded_no_more(original, tmp_path, base):
    codes = load(original).quantize("W8A8").save(tmp_path / "codes")
    path = load(codes).train(method="qlora", target_modules=["q_proj"], **SHORT).save(tmp_path / "adapter")
    made = load(path)
    assert len(rounded(made.model)) == 14
    made.apply(Merge(base=base))
    is_what_is_written(made, tmp_path / "out")
    assert len(rounded(made.model)) == (12 if base == "trained" else 0)


def test_what_was_trained_whole_is_not_the_other_bases(tmp_path):
    base = folder(tmp_path / "base", "llama-untied", words=True)
    codes = load(base).quantize("int4-g32").save(tmp_path / "codes")
    saved = ["lm_head", "layers.0.mlp.up_proj"]
    path = load(base).train(method="lora", modules_to_save=saved, **SHORT).save(tmp_path / "adapter")
    made = load(path)
    trained = [made.model.lm_head.weight.base().clone(), made.model.model.layers[0].mlp.up_proj.weight.base().clone()]
    made.apply(Merge(base="original", model=str(codes)))
    kept = [made.model.lm_head.weight.base(), made.model.model.layers[0].mlp.up_proj.weight.base()]
    assert all(torch.equal(a, b) for a, b in zip(trained, kept, strict=True))
    plain = load(codes).model.model.layers[1].mlp.up_proj.weight.base()
    assert not torch.equal(made.model.model.layers[1].mlp.up_proj.weight.base(), plain)  # its adapter is in it


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_another_dtype_a_grid_gives_the_codes_that_it_was_trained_to(tmp_path, dtype):
    own = {"float32": torch.bfloat16, "bfloat16": torch.float32}[dtype]
    base = folder(tmp_path / "base", dtype=own, words=True)
    path = load(base).train(method="qat-lora", to="int4-g32", **SHORT).save(tmp_path / "adapter")
    first, other = load(path).model, load(path, dtype=dtype)
    assert other.loaded.config.dtype == other.model.model.norm.weight.dtype == getattr(torch, dtype)
    seen = {n: w for n, w in weights(first).items() if w.grid is not None}
    assert len(seen) == 14
    for name, w in seen.items():
        assert torch.equal(weights(other.model)[name].frozen().codes, w.frozen().codes)
    unmerged = logits(other.model)
    other.merge()
    torch.testing.assert_close(logits(other.model), unmerged, rtol=0, atol=0)
    for name, w in weights(load(other.save(tmp_path / "out")).model).items():
        if name in seen:
            assert torch.equal(w.stored.q.codes, seen[name].frozen().codes)


def test_in_another_dtype_an_embedding_through_a_grid_is_refused(tmp_path):
    base = folder(tmp_path / "base", dtype=torch.bfloat16, words=True)
    to = [{"match": ".*", "weight": "int8-g32"}]
    path = load(base).train(method="qat-lora", to=to, **SHORT).save(tmp_path / "adapter")
    with pytest.raises(InputError, match="trained through a grid in bfloat16: leave out --dtype"):
        load(path, dtype="float32")
    assert load(path, dtype="bfloat16").loaded.config.dtype == torch.bfloat16
