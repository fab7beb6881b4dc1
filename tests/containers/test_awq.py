"""AWQ's layout, written here by its definition, and read."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfbyte import kernels
from halfbyte.containers import awq
from halfbyte.errors import InputError
from halfbyte.formats import FORMATS

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the outputs in a word, from its lowest bits


def words(codes: torch.Tensor) -> torch.Tensor:
    """uint8 (n, outputs) -> int32 (n, outputs / 8), as AutoAWQ's gemm kernel wants them."""
    out = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.long)
    for place, output in enumerate(ORDER):
        out |= codes[:, output::8].long() << (4 * place)
    return torch.where(out >= 1 << 31, out - (1 << 32), out).int()


def tensors(group: int = 32) -> dict[str, torch.Tensor]:
    codes = torch.randint(0, 16, (64, 16), dtype=torch.uint8)
    zeros = torch.randint(0, 16, (64 // group, 16), dtype=torch.uint8)
    return {"qweight": words(codes), "qzeros": words(zeros), "scales": torch.rand(64 // group, 16).half(),
            "codes": codes, "zeros": zeros}  # fmt: skip


def decoded(t, shape=(16, 64), **config):
    full = {f"x.{k}": v for k, v in t.items() if k not in ("codes", "zeros")}
    f, _ = awq.formats(config, set(full), full.__getitem__)["x"]
    return awq.decode("x", f, shape, full.__getitem__, config)


@given(st.sampled_from([32, 64]), st.integers(0, 2**32))
def test_what_it_means(group, seed):
    torch.manual_seed(seed)
    t = tensors(group)
    q = decoded(t)
    by = torch.arange(64) // group
    meant = (t["scales"].float()[by] * (t["codes"].float() - t["zeros"].float()[by])).half().T
    assert q.format == FORMATS["uint4-channel" if group == 64 else f"uint4-g{group}"]
    assert torch.equal(q.dequantize(), meant)
    assert torch.equal(kernels.dequantize(q), meant)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scales": None}, "x.scales is missing"),
        ({"qweight": torch.zeros(63, 2, dtype=torch.int32)}, "2 groups do not divide its 63 inputs"),
        ({"qweight": torch.zeros(64, 3, dtype=torch.int32)}, "x.qweight should be int32 of the shape (64, 2)"),
        ({"qzeros": torch.zeros(2, 2)}, "x.qzeros should be int32"),
        ({"qweight": torch.tensor(7).int()}, "x: its codes and scales should be matrices"),
        ({"scales": torch.tensor(1.0).half()}, "x: its codes and scales should be matrices"),
    ],
)
def test_broken_tensors_are_refused(change, words):
    t = {k: v for k, v in (tensors() | change).items() if v is not None}
    with pytest.raises(InputError, match=re.escape(words)):
        decoded(t)


def test_other_versions_are_refused():
    with pytest.raises(InputError, match="version 'gemv' is not read"):
        decoded(tensors(), version="GEMV")
    with pytest.raises(InputError, match="only read"):
        awq.encode("x", kernels.quantize(torch.randn(16, 64), "uint4-g32"))
