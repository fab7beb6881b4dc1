"""GPTQ's layout, held against a decoder that follows its definition number by number."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfbyte import kernels
from halfbyte.containers import gptq
from halfbyte.errors import InputError
from halfbyte.formats import FORMATS
from halfbyte.qtensor import QTensor

NAMES = ["int4-g32", "int4-g64", "int8-g32", "int2-g32", "uint4-g32", "uint8-g64", "uint2-g32", "int4-channel"]


def by_definition(t: dict[str, torch.Tensor], bits: int, less_one: bool = True) -> torch.Tensor:
    """scale * (code - zero), a number at a time, of the tensors of one weight."""
    qweight, qzeros = (t[k].long() & 0xFFFFFFFF for k in ("qweight", "qzeros"))
    per, mask = 32 // bits, (1 << bits) - 1
    inputs, outputs = qweight.shape[0] * per, qweight.shape[1]
    w = torch.empty(outputs, inputs)
    for i in range(inputs):
        code = (qweight[i // per] >> (bits * (i % per))) & mask
        group = int(t["g_idx"][i])
        columns = torch.arange(outputs)
        zero = (qzeros[group][columns // per] >> (bits * (columns % per))) & mask
        w[:, i] = t["scales"][group].float() * (code - ((zero + less_one) & mask))
    return w


def tensors(q: QTensor) -> dict[str, torch.Tensor]:
    return {k.removeprefix("x."): t for k, t in gptq.encode("x", q).items()}


def decoded(t: dict[str, torch.Tensor], shape: tuple[int, ...], **config) -> QTensor:
    full = {f"x.{k}": v for k, v in t.items()}

    def get(name: str) -> torch.Tensor:
        if name not in full:
            raise InputError(f"{name} is missing.")
        return full[name]

    f, _ = gptq.formats(config, set(full), get)["x"]
    return gptq.decode("x", f, shape, get, config)


@given(st.sampled_from(NAMES), st.integers(1, 3), st.integers(0, 2**32))
def test_what_is_written_is_what_is_meant_and_read_again(name, rows, seed):
    w = torch.randn(16 * rows, 128, generator=torch.Generator().manual_seed(seed)).half()
    q = kernels.quantize(w, name)
    t = tensors(q)
    assert torch.equal(by_definition(t, q.format.bits).half(), q.dequantize())
    again = decoded(t, q.shape)
    assert torch.equal(again.dequantize(), q.dequantize())
    assert torch.equal(again.codes, q.codes)
    same = bool((q.qparams.zero == 1 << (q.format.bits - 1)).all()) if q.format.zero else False
    assert again.format == (FORMATS[name.removeprefix("u")] if same else q.format)


def test_the_other_version_keeps_zero_points_as_they_are():
    q = kernels.quantize(torch.randn(16, 64).half(), "uint4-g32")
    t = tensors(q)
    nibbles = (t["qzeros"].long()[..., None] >> (4 * torch.arange(8))) & 15
    words = (((nibbles + 1) & 15) << (4 * torch.arange(8))).sum(-1)
    t["qzeros"] = torch.where(words >= 1 << 31, words - (1 << 32), words).int()
    again = decoded(t, q.shape, checkpoint_format="gptq_v2")
    assert torch.equal(again.dequantize(), q.dequantize())
    assert torch.equal(by_definition(t, 4, less_one=False).half(), q.dequantize())


def test_inputs_in_an_order_of_their_own():
    """desc_act: groups of inputs that are no neighbours."""
    q = kernels.quantize(torch.randn(16, 64).half(), "uint4-g32")
    t, mixed = tensors(q), torch.randperm(64)
    columns = q.codes[:, mixed]
    shuffled = QTensor(q.format, q.shape, q.dtype, {**q.parts, "codes": kernels.reference.pack(columns, 4)})
    t["qweight"] = tensors(shuffled)["qweight"]
    t["g_idx"] = t["g_idx"][mixed]
    meant = by_definition(t, 4).half()
    again = decoded(t, q.shape)
    assert torch.equal(again.dequantize(), meant)
    assert torch.equal(kernels.dequantize(again), meant)
    x = torch.randn(3, 64).half()
    torch.testing.assert_close(kernels.linear(x, again), x @ meant.T)
    for k, v in tensors(again).items():
        assert torch.equal(v, t[k]), k
    assert not again.has_rows


def test_a_folder_without_an_order_is_read():
    q = kernels.quantize(torch.randn(16, 64).half(), "int4-g32")
    t = tensors(q)
    del t["g_idx"]
    assert torch.equal(decoded(t, q.shape).dequantize(), q.dequantize())


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "words"),
    [
        ("int4-g32", (12, 64), torch.float16, "do not divide 12 x 64"),
        ("int4-g32", (16, 64), torch.float32, "does not hold these exactly; use --dtype float16"),
    ],
)
def test_weights_that_do_not_fit_are_refused(name, shape, dtype, words):
    with pytest.raises(InputError, match=re.escape(words)):
        gptq.encode("x", kernels.quantize(torch.randn(shape, dtype=dtype), name))


@pytest.mark.parametrize("name", ["nf4-g64", "int3-g32", "fp8-e4m3-channel", "q4_0", "int8-tensor", "uint4-g64-affine"])
def test_formats_without_a_layout_are_refused(name):
    assert "no layout for" in (gptq.refuses(FORMATS[name], "linear") or "")
    assert "embedding" in (gptq.refuses(FORMATS["int4-g32"], "embedding") or "")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"qzeros": None}, "x.qzeros is missing"),
        ({"scales": torch.zeros(2)}, "should be matrices"),
        ({"scales": torch.zeros(0, 16)}, "should be matrices"),
        ({"qzeros": torch.zeros(2, 7, dtype=torch.int32)}, "no number of 2, 4 or 8 bits"),
        ({"qweight": torch.zeros(9, 16, dtype=torch.int32)}, "a group of 36 does not divide the 64 inputs"),
        ({"qweight": torch.zeros(8, 16)}, "x.qweight should be int32"),
        ({"g_idx": torch.zeros(64, dtype=torch.int32)}, "its groups are not of one size"),
        ({"g_idx": torch.zeros(63, dtype=torch.int32)}, "x.g_idx should be int32 of the shape (64,)"),
        ({"g_idx": torch.full((64,), -1, dtype=torch.int32)}, "its groups are not of one size"),
        ({"scales": torch.zeros(2, 16, dtype=torch.int32)}, "x.scales should be float16"),
    ],
)
def test_broken_tensors_are_refused(change, words):
    t = tensors(kernels.quantize(torch.randn(16, 64).half(), "uint4-g32")) | change
    t = {k: v for k, v in t.items() if v is not None}
    with pytest.raises(InputError, match=re.escape(words)):
        decoded(t, (16, 64))


def test_the_config_says_what_differs():
    def q(name):
        return kernels.quantize(torch.randn(16, 128).half(), name), None

    said = gptq.config({"a": q("int4-g32"), "b": q("int4-g32"), "m.c": q("int8-g64")}, ["m.d", "lm_head"])
    assert (said["quant_method"], said["bits"], said["group_size"], said["sym"], said["desc_act"]) == (
        "gptq",
        4,
        32,
        True,
        False,
    )
    assert said["dynamic"] == {r"+:^m\.c$": {"bits": 8, "group_size": 64}, r"-:^m\.d$": {}}
    with pytest.raises(InputError, match="some are and some are not"):
        gptq.config({"a": q("int4-g32"), "b": q("uint4-g32")}, [])
    with pytest.raises(InputError, match="checkpoint_format 'marlin' is not read"):
        gptq.formats({"checkpoint_format": "marlin"}, set(), lambda name: torch.zeros(1))
