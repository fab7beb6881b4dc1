"""Folders that are exported: read back by transformers with each layout's library, and by mlx-lm."""

from __future__ import annotations

import json
import re

import pytest
import torch

import miniatures
from halfbyte import data, export, kinds, models
from halfbyte.containers.shards import Shards
from halfbyte.errors import InputError
from halfbyte.layers import Codes, ops
from halfbyte.model import load
from miniatures import logits

TEXT = data.records([{"text": "The quick brown fox jumps over the lazy dog. " * 8}])
EXACT = 1e-6  # mean KL: the reader's float32 products in another order


def exported(base, out, name, format=None, dtype=None, proof=True, requantize=False):
    kind = kinds.KINDS[name]
    job = export.prepare(export.read(base, dtype), kind, format, requantize)
    return export.export(base, job, kind, out, export.Proof(TEXT, 2, 64) if proof else None)


@pytest.mark.parametrize(
    ("name", "format"),
    [("hf", None), ("hf", "F16"), ("compressed-tensors", "W4A16"), ("compressed-tensors", "W8A8"),
     ("compressed-tensors", "FP8A16"), ("bitsandbytes", "NF4"), ("bitsandbytes", "NF4_DQ")],
)  # fmt: skip
def test_its_library_reads_what_we_do(base, tmp_path, name, format):
    done = exported(base, tmp_path / "out", name, format)
    (_, ours), (_, before) = done.rows
    assert abs(ours["kl_mean"]) < EXACT
    assert before["kl_mean"] < 0.01
    assert [r["stage"] for r in json.loads((tmp_path / "out" / "ledger.json").read_text())] == [s for s, _ in done.rows]


@pytest.mark.parametrize(("name", "format"), [("hf", "F16"), ("compressed-tensors", "W4A16"), ("bitsandbytes", "NF4")])
def test_floats_stay_on_disk_until_they_are_written(base, tmp_path, name, format):
    kind = kinds.KINDS[name]
    job = export.prepare(export.read(base), kind, format, False)
    (tmp_path / "out").mkdir()
    kind.write(job, tmp_path / "out")
    assert all(p.device.type == "meta" for p in job.loaded.model.parameters())
    there = load(tmp_path / "out")
    here = load(base, "float16") if format == "F16" else load(base).quantize(format)
    assert torch.equal(logits(there.model), logits(here.model))
    assert {p.dtype for p in there.model.parameters()} == {p.dtype for p in here.model.parameters()}


def test_codes_become_floats_of_the_dtype_that_is_asked_for(base, tmp_path):
    load(base, "bfloat16").quantize("W4A16").save(tmp_path / "small")
    exported(tmp_path / "small", tmp_path / "out", "hf", "F16", requantize=True)
    shards = Shards.of_folder(tmp_path / "out")
    assert {shards.dtype(n) for n in shards} == {torch.float16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"


@pytest.mark.parametrize(
    ("format", "value", "words"),
    [("W4A16", float("nan"), "up_proj.weight holds NaN or infinity, which has no code in int4-g64"),
     ("F16", 1e6, r"up_proj.weight: its largest value, 1e\+06, is more than torch.float16 holds; use BF16")],
)  # fmt: skip
def test_values_that_cannot_be_written_are_refused(base, tmp_path, format, value, words):
    made = load(base)
    with torch.no_grad():
        dict(ops(made.model))["model.layers.1.mlp.up_proj"].weight.base()[0, 0] = value
    made.save(tmp_path / "odd")
    with pytest.raises(InputError, match=words):
        exported(tmp_path / "odd", tmp_path / "out", "hf" if format == "F16" else "compressed-tensors", format)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "odd"]


def test_what_inputs_are_rounded_to_is_written(base, tmp_path):
    exported(base, tmp_path / "out", "compressed-tensors", "W8A8", proof=False)
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (group,) = said["config_groups"].values()
    assert group["input_activations"]["num_bits"] == 8
    assert {op.input and op.input.name for _, op in ops(load(tmp_path / "out").model) if hasattr(op, "input")} == {
        "int8-token", None
    }  # fmt: skip


@pytest.mark.readers
@pytest.mark.parametrize("format", ["int4-g32", "int8-g64", "uint4-g64-affine", "uint8-g64-affine", None])
def test_mlx_reads_what_we_do(base, tmp_path, format):
    done = exported(base, tmp_path / "out", "mlx", format)
    assert abs(done.rows[0][1]["kl_mean"]) < EXACT


@pytest.mark.readers
def test_mlx_folders_are_read(base, tmp_path):
    """One that mlx-lm itself makes, embeddings and all: read into codes, saved again as it came."""
    from importlib import import_module

    import_module("mlx_lm").convert(str(base), str(tmp_path / "theirs"), quantize=True, q_group_size=32, q_bits=4)
    ours = load(tmp_path / "theirs", "float32")
    held = {n: op.weight.format.name for n, op in ops(ours.model) if op.weight.format is not None}
    assert set(held.values()) == {"uint4-g32-affine"}
    assert "model.embed_tokens" in held
    reader = kinds.KINDS["mlx"].open(tmp_path / "theirs", 64)
    torch.testing.assert_close(logits(ours.model), reader(miniatures.IDS).logits, rtol=0, atol=1e-4)
    ours.save(tmp_path / "again")
    a, b = (Shards.of_folder(tmp_path / n) for n in ("theirs", "again"))
    assert set(a) == set(b)
    assert all(torch.equal(a.get(n), b.get(n)) for n in a if a.dtype(n) == torch.uint32)


@pytest.mark.parametrize("format", ["W4A16", "W4A16_ASYM", "W8A16"])
def test_gptq_folders_are_read_again(base, tmp_path, format):
    done = exported(base, tmp_path / "out", "gptq", format, torch.float16)
    assert done.rows == []  # no reader of it runs on every machine
    there, here = load(tmp_path / "out"), load(base, "float16").quantize(format)
    assert torch.equal(logits(there.model), logits(here.model))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["quant_method"] == "gptq"


def test_a_folder_keeps_the_layout_that_it_came_in(base, tmp_path):
    exported(base, tmp_path / "gptq", "gptq", "W4A16", torch.float16)
    load(tmp_path / "gptq").save(tmp_path / "again")
    a, b = (Shards.of_folder(tmp_path / n) for n in ("gptq", "again"))
    assert set(a) == set(b)
    assert all(torch.equal(a.get(n), b.get(n)) for n in a)


def test_gptq_codes_go_to_other_layouts_unchanged(base, tmp_path):
    """One grid, many containers."""
    exported(base, tmp_path / "gptq", "gptq", "int4-g32", torch.float16)
    before = {n: op.weight.frozen() for n, op in ops(load(tmp_path / "gptq").model) if op.weight.format}
    for name, suffix in (("compressed-tensors", ""), ("mlx", ""), ("gguf", ".gguf")):
        exported(tmp_path / "gptq", tmp_path / f"{name}{suffix}", name, proof=False)
        there = dict(ops(load(tmp_path / f"{name}{suffix}", "float16").model))
        for n, q in before.items():
            stored = there[n].weight.stored
            assert isinstance(stored, Codes)
            assert torch.equal(stored.q.codes, q.codes), (name, n)
            assert torch.equal(stored.q.dequantize(), q.dequantize()), (name, n)


def test_inputs_in_an_order_of_their_own_go_nowhere_else(base, tmp_path):
    exported(base, tmp_path / "gptq", "gptq", "int4-g32", torch.float16)
    shards = Shards.of_folder(tmp_path / "gptq")
    from safetensors.torch import save_file

    tensors = {n: shards.get(n) for n in shards}
    mixed = torch.randperm(64)
    tensors["model.layers.0.mlp.up_proj.g_idx"] = tensors["model.layers.0.mlp.up_proj.g_idx"][mixed]
    save_file(tensors, tmp_path / "gptq" / "model.safetensors", metadata={"format": "pt"})
    there = models.load(tmp_path / "gptq", torch.float32)
    assert "order" in dict(ops(there.model))["model.layers.0.mlp.up_proj"].weight.frozen().parts
    assert logits(there.model).isfinite().all()
    with pytest.raises(InputError, match=r"up_proj.*only GPTQ's layout holds"):
        exported(tmp_path / "gptq", tmp_path / "ct", "compressed-tensors", proof=False)
    with pytest.raises(InputError, match="1 weights on another grid"):
        exported(tmp_path / "gptq", tmp_path / "m.gguf", "gguf", proof=False)
    assert not (tmp_path / "ct").exists()


@pytest.mark.parametrize(
    ("name", "format", "words"),
    [("hf", "W4A16", "it holds floats alone"), ("bitsandbytes", "W4A16", "no layout for int4-g64"),
     ("gptq", "NF4", "no layout for nf4-g64"), ("mlx", "W8A8", "no groups of channel"),
     ("compressed-tensors", "Q4_0", "no place for a weight of kind embedding")],
)  # fmt: skip
def test_what_a_layout_does_not_hold_is_refused_before_the_work(base, tmp_path, name, format, words):
    with pytest.raises(InputError, match=rf"cannot be written as {name}: .*{re.escape(words)}"):
        exported(base, tmp_path / "out", name, format)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
