"""Exporting: what is carried over, what is refused, and that what its reader reads otherwise never leaves."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import miniatures
from halfbyte import data, export, kinds, run
from halfbyte.containers import gguf as container
from halfbyte.errors import BudgetExceeded, InputError
from halfbyte.formats import FORMATS
from halfbyte.kinds import gguf
from halfbyte.layers import Codes, ops
from halfbyte.model import load
from miniatures import logits

TEXT = data.records([{"text": "The quick brown fox jumps over the lazy dog. " * 8}])


class Reader(nn.Module):
    """Stands for a program of others: it reads our file as we do, and then adds an error of its own."""

    def __init__(self, path, noise):
        super().__init__()
        self.model, self.noise = run.load(path, torch.float32).model, noise

    def forward(self, input_ids, **_):
        out = self.model(input_ids).logits
        return SimpleNamespace(logits=out + self.noise * torch.randn(out.shape, generator=torch.manual_seed(0)))


@pytest.fixture
def reads(monkeypatch):
    """Puts a Reader in llama.cpp's place."""

    def use(noise=0.0, differs=None):
        monkeypatch.setattr(gguf, "missing", lambda: None)
        monkeypatch.setattr(gguf, "open", lambda path, context: Reader(path, noise))
        monkeypatch.setattr(gguf, "differs", lambda reader, tokenizer: differs)

    use()
    return use


def to_file(source, out, format=None, requantize=False, proof=None, overwrite=False, said=None):
    lines = [] if said is None else said
    job = export.prepare(export.read(source), kinds.KINDS["gguf"], format, requantize, lines.append)
    return export.export(source, job, kinds.KINDS["gguf"], out, proof, overwrite, lines.append)


def formats(path):
    return {info.type for info in container.File(path).infos.values() if len(info.shape) > 1}


@pytest.mark.parametrize(
    ("format", "held"),
    [(None, {"f32"}), ("f16", {"f16"}), ("BF16", {"bf16"}), ("Q8_0", {"q8_0"}), ("q4_0", {"q4_0", "q8_0"}),
     ("Q4_K_M", {"q5_0", "q8_0"}), ("W8A16", None)],
)  # fmt: skip
def test_floats_become_the_format(base, tmp_path, format, held):
    if held is None:
        with pytest.raises(InputError, match=r"ggml has no block for int8-g64"):
            to_file(base, tmp_path / "m.gguf", format)
        return
    to_file(base, tmp_path / "m.gguf", format)
    assert formats(tmp_path / "m.gguf") == held


@pytest.mark.parametrize(("to", "block"), [("int4-g32", "q4_0"), ("int4-g64", "q4_0"), ("int8-channel", "q8_0")])
def test_codes_that_fit_are_carried_over(base, tmp_path, to, block):
    small = load(base, "bfloat16").quantize(to).save(tmp_path / "small")
    said = []
    to_file(small, tmp_path / "m.gguf", said=said)
    assert said[0] == "14 weights are carried over: codes and scales unchanged"
    ours, theirs = load(small), load(tmp_path / "m.gguf")
    for (_, a), (_, b) in zip(ops(ours.model), ops(theirs.model), strict=True):
        if isinstance(a.weight.stored, Codes):
            q = b.weight.frozen()
            assert q.format == FORMATS[block]
            assert torch.equal(q.codes, a.weight.frozen().codes)
            assert torch.equal(q.dequantize(), a.weight.frozen().dequantize())
    assert torch.equal(logits(ours.model), logits(theirs.model))


@pytest.mark.parametrize("to", ["uint4-g32", "nf4-g64", "int4-g16", "fp8-e4m3-channel"])
def test_codes_on_another_grid_are_quantized_anew_only_when_asked(base, tmp_path, to):
    small, out, said = load(base).quantize(to).save(tmp_path / "small"), tmp_path / "m.gguf", []
    with pytest.raises(InputError, match=rf"14 weights on another grid.*{to}.*choose a --format"):
        to_file(small, out)
    with pytest.raises(InputError, match=r"add --requantize to make them q8_0, which costs"):
        to_file(small, out, "Q8_0")
    to_file(small, out, "Q8_0", True, said=said)
    assert said[0].endswith("are quantized anew, to q8_0: the ledger has the cost")
    assert formats(out) == {"q8_0"}


def test_codes_are_not_made_floats_unasked(base, tmp_path):
    small = load(base).quantize("int4-g32").save(tmp_path / "small")
    with pytest.raises(InputError, match="--requantize to make them float16"):
        to_file(small, tmp_path / "m.gguf", "F16")
    to_file(small, tmp_path / "m.gguf", "F32", True)
    assert torch.equal(logits(load(tmp_path / "m.gguf", "float32").model), logits(load(small).model))


def test_scales_that_half_precision_lacks_are_not_carried(base, tmp_path):
    """A float32 scale has bits that fp16 has not."""
    small = load(base, "float32").quantize("int4-g32").save(tmp_path / "small")
    with pytest.raises(InputError, match="another grid"):
        to_file(small, tmp_path / "m.gguf")


def test_inputs_in_int8_are_refused(base, tmp_path):
    small = load(base, "bfloat16").quantize("W8A8").save(tmp_path / "small")
    with pytest.raises(InputError, match="inputs are rounded to int8-token, which GGUF's readers do not do"):
        to_file(small, tmp_path / "m.gguf")


def test_what_is_read_back_is_measured(base, tmp_path, reads):
    done = to_file(base, tmp_path / "m.gguf", "Q8_0", proof=export.Proof(TEXT, 2, 64))
    (ours, first), (before, second) = done.rows
    assert (ours, before) == ("read back, against halfbyte", "read back, against base")
    assert first["kl_mean"] == 0
    assert 0 < second["kl_mean"] < 1e-3
    assert first["bytes"] == (tmp_path / "m.gguf").stat().st_size
    assert json.loads((tmp_path / "m.ledger.json").read_text())[1]["kl_mean"] == second["kl_mean"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "m.gguf", "m.ledger.json"]


@pytest.mark.parametrize(
    ("how", "words"),
    [({"noise": 3.0}, r"mean KL .* is above --max-kl 0.02; nothing was kept"), ({"differs": "'a' as 1"}, "'a' as 1")],
)
def test_what_its_reader_reads_otherwise_does_not_leave(base, tmp_path, reads, how, words):
    reads(**how)
    with pytest.raises(BudgetExceeded, match=words):
        to_file(base, tmp_path / "m.gguf", proof=export.Proof(TEXT, 2, 64))
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_the_old_file_stays_where_the_new_one_fails(base, tmp_path, reads):
    to_file(base, tmp_path / "m.gguf")
    old = (tmp_path / "m.gguf").read_bytes()
    with pytest.raises(InputError, match="--overwrite"):
        to_file(base, tmp_path / "m.gguf")
    reads(noise=3.0)
    with pytest.raises(BudgetExceeded):
        to_file(base, tmp_path / "m.gguf", "Q8_0", proof=export.Proof(TEXT, 2, 64), overwrite=True)
    assert (tmp_path / "m.gguf").read_bytes() == old
    reads()
    to_file(base, tmp_path / "m.gguf", "Q8_0", proof=export.Proof(TEXT, 2, 64), overwrite=True)
    assert len((tmp_path / "m.gguf").read_bytes()) < len(old)


def test_a_reader_that_is_not_there_is_said(base, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "missing", lambda: "install it")
    said = []
    done = to_file(base, tmp_path / "m.gguf", proof=export.Proof(), said=said)
    assert done.rows == []
    assert re.fullmatch(r"not read back by llama.cpp.*: install it", said[-1])


def test_one_window_is_enough(base, tmp_path, reads):
    """Though it has no error of its mean."""
    said = []
    done = to_file(base, tmp_path / "m.gguf", proof=export.Proof(TEXT, 1, 64), said=said)
    assert done.rows[1][1]["kl_error"] is None
    assert re.search(r"mean KL 0\.0000, top-1 agreement 100\.0%$", said[-1])


def test_a_model_without_words_is_written_and_not_read(tmp_path, reads):
    said = []
    done = to_file(miniatures.folder(tmp_path / "mute"), tmp_path / "m.gguf", proof=export.Proof(TEXT), said=said)
    assert done.rows == []
    assert said[-1].endswith("the model has no tokenizer, and text needs one")


def test_an_adapter_is_merged_first(base, tmp_path):
    made = load(base)
    made.train(TEXT, method="lora", steps=1, batch_size=1, max_length=32, r=2).save(tmp_path / "adapter")
    with pytest.raises(InputError, match="is an adapter; `halfbyte merge"):
        export.read(tmp_path / "adapter")


def test_a_kind_is_told_by_name_or_by_suffix(tmp_path):
    assert kinds.kind(None, tmp_path / "x.gguf").NAME == "gguf"
    with pytest.raises(InputError, match="--to is missing"):
        kinds.kind(None, tmp_path / "x")
    with pytest.raises(InputError, match="--to gguff: it is gguf"):
        kinds.kind("gguff", tmp_path / "x")
    with pytest.raises(InputError, match=r"--to gguf writes a file: name it x\.gguf"):
        kinds.kind("gguf", tmp_path / "x")
    with pytest.raises(InputError, match=r"--to hf writes a folder, and .*x\.gguf is a name of a file"):
        kinds.kind("hf", tmp_path / "x.gguf")
    (tmp_path / "x.gguf").mkdir()
    with pytest.raises(InputError, match=r"x\.gguf is a folder, where a file is to be written"):
        kinds.kind(None, tmp_path / "x.gguf")
