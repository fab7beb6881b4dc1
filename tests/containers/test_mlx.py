"""MLX's layout, held against its definition; mlx itself reads it in tests/kinds."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfbyte import kernels
from halfbyte.containers import mlx
from halfbyte.errors import InputError
from halfbyte.formats import FORMATS

NAMES = ["int4-g32", "int4-g64", "int8-g64", "int3-g32", "int6-g64", "int2-g32", "uint4-g64-affine", "uint8-g64-affine"]


def by_definition(t: dict[str, torch.Tensor], bits: int) -> torch.Tensor:
    """scale * code + bias; a row's codes are one number, the first in its lowest bits."""
    rows = []
    for words, scales, biases in zip(t["weight"], t["scales"].float(), t["biases"].float(), strict=True):
        number = sum(int(w) << (32 * i) for i, w in enumerate(words.tolist()))
        n = len(words) * 32 // bits
        codes = torch.tensor([(number >> (bits * i)) & ((1 << bits) - 1) for i in range(n)])
        group = torch.arange(n) // (n // len(scales))
        rows.append(scales[group] * codes + biases[group])
    return torch.stack(rows)


def tensors(q):
    return {k.removeprefix("x."): t for k, t in mlx.encode("x", q).items()}


def decoded(t, shape, **config):
    full = {f"x.{k}": v for k, v in t.items()}
    f, _ = mlx.formats(config, set(full), full.__getitem__)["x"]
    return mlx.decode("x", f, shape, full.__getitem__, config)


@given(st.sampled_from(NAMES), st.sampled_from([torch.float16, torch.bfloat16]), st.integers(0, 2**32))
def test_what_is_written_is_what_is_meant_and_read_again(name, dtype, seed):
    w = torch.randn(8, 128, generator=torch.Generator().manual_seed(seed)).to(dtype)
    q = kernels.quantize(w, name)
    t = tensors(q)
    meant = by_definition(t, q.format.bits)
    torch.testing.assert_close(meant, q.dequantize().float(), rtol=2**-7, atol=1e-3)
    again = decoded(t, q.shape, bits=q.format.bits, group_size=q.format.group)
    assert torch.equal(again.codes, q.codes)
    assert torch.equal(again.dequantize(), meant.to(dtype))
    assert again.format.zero == "source"


def test_zero_points_that_the_dtype_does_not_hold_are_refused():
    with pytest.raises(InputError, match="does not hold these zero points exactly"):
        mlx.encode("x", kernels.quantize(torch.randn(8, 64).bfloat16() + 1, "uint8-g64"))
    with pytest.raises(InputError, match="does not round inputs"):
        mlx.encode("x", kernels.quantize(torch.randn(8, 64), "int8-g64"), FORMATS["int8-channel"])


@pytest.mark.parametrize("name", ["nf4-g64", "int4-g16", "int4-channel", "q4_0", "fp8-e4m3-channel"])
def test_formats_without_a_layout_are_refused(name):
    assert mlx.refuses(FORMATS[name], "linear") is not None
    assert "conv1d" in (mlx.refuses(FORMATS["int4-g64"], "conv1d") or "")


@pytest.mark.parametrize(
    ("change", "config", "words"),
    [
        ({}, {"mode": "mxfp4"}, "mode 'mxfp4' is not read"),
        ({"biases": None}, {}, "affine is"),
        ({}, {"bits": 7}, "x has 7 bits"),
        ({}, {"group_size": 48}, "groups of 48"),
        ({"weight": torch.zeros(8, 9, dtype=torch.uint32)}, {}, "x.weight should be uint32 of the shape (8, 8)"),
        ({"biases": torch.zeros(8, 2)}, {}, "x.biases should be float16"),
        ({"scales": torch.zeros(8, 3).half()}, {}, "x.scales should be float16 or bfloat16 or float32"),
    ],
)
def test_broken_tensors_are_refused(change, config, words):
    t = tensors(kernels.quantize(torch.randn(8, 64).half(), "int4-g32")) | change
    t = {k: v for k, v in t.items() if v is not None}
    with pytest.raises(InputError, match=re.escape(words)):
        decoded(t, (8, 64), **{"bits": 4, "group_size": 32, **config})


def test_the_config_says_what_differs():
    def q(name):
        return kernels.quantize(torch.randn(8, 128).half(), name), None

    said = mlx.config({"a": q("int4-g64"), "b": q("int4-g64"), "c": q("int8-g64")}, ["d"])
    assert said == {"quant_method": "mlx", "group_size": 64, "bits": 4, "mode": "affine", "d": False,
                    "c": {"group_size": 64, "bits": 8, "mode": "affine"}}  # fmt: skip
