"""Merging into what an adapter was trained on, into what that was made from, and the other way round."""

import json

import pytest
import torch

from halfbyte import InputError, bases, run
from halfbyte.adapters import attached
from halfbyte.containers import peft
from halfbyte.layers import Codes, weights
from halfbyte.model import load
from halfbyte.steps import Merge
from miniatures import folder

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
    assert same(values(load(on_floats).apply(Merge(base="original")).model), sums(on_floats, original))


def test_the_other_base(on_codes, on_floats, original, codes, tmp_path):
    assert bases.other(load(on_codes)) == str(original)
    assert bases.other(load(on_floats)) is None
    assert bases.other(load(on_floats), "named") == "named"
    in_memory = load(original).train(method="qlora", **SHORT).save(tmp_path / "q")
    assert bases.other(load(in_memory)) == str(original)


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
