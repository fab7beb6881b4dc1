"""HQQ on one weight: what it makes small, and what it leaves to rounding."""

import logging

import pytest
import torch

from halfbyte import kernels
from halfbyte.formats import parse
from halfbyte.layers import Linear, Weight
from halfbyte.solvers import Site, hqq, solver

NAMES = ["int4-g64", "int3-g32", "uint4-g64", "uint2-g64", "int4-channel", "int8-tensor", "q4_0", "q4_1",
         "uint4-g64-affine", "nf4-g64", "iq4_nl"]  # fmt: skip
SEARCHED = [n for n in NAMES if n != "int8-tensor"]  # that has one scale, and hardly anything is gained


def weight(rows=48, inputs=512, seed=0):
    """Gaussian, with some outliers, as weights of language models are."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, inputs, generator=g)
    return 0.05 * torch.where(torch.rand(rows, inputs, generator=g) < 0.02, 4 * w, w)


def loss(w, q, p=0.7):
    """By runs of 32 inputs, (out, in / 32)."""
    return (w - q.dequantize()).abs().pow(p).unflatten(1, (-1, 32)).sum(2)


@pytest.mark.parametrize("name", SEARCHED)
def test_the_p_norm_is_below_that_of_every_search(name):
    w, f = weight(), parse(name)
    solved = loss(w, hqq.quantize(w, f)).sum()
    for how in ("minmax", "mse", "weighted"):
        assert solved < loss(w, kernels.quantize(w, f, kernels.qparams(w, f, how))).sum()


@pytest.mark.parametrize("start", ["minmax", "mse"])
def test_no_group_is_worse_than_where_it_began(start):
    w, f = weight(), parse("uint4-g32")
    first = loss(w, kernels.quantize(w, f, kernels.qparams(w, f, start)))
    assert (loss(w, hqq.quantize(w, f, start=start)) <= first * (1 + 1e-5)).all()


def test_the_splitting_finds_the_zero_that_outliers_hide():
    """Weights on a grid but for a few: least squares are drawn to those few, and the grid itself is what is wanted."""
    g = torch.Generator().manual_seed(0)
    f = parse("uint4-g64-affine")
    scale, zero = 0.01, -0.073
    codes = torch.randint(0, 16, (64, 64), generator=g)
    codes[:, 0], codes[:, 1] = 0, 15
    w = scale * codes + zero
    w[:, 7] += 0.0045
    w[:, 33] -= 0.0045
    w[:, 41] += 0.0045
    on_grid = torch.ones_like(codes, dtype=torch.bool)
    on_grid[:, [7, 33, 41]] = False

    def off(q):
        return (w - q.dequantize()).abs()[on_grid].mean()

    squares = kernels.quantize(w, f, kernels.qparams(w, f, "mse"))
    assert off(hqq.quantize(w, f, rounds=60)) < 0.2 * off(squares)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_weight_has_codes(name, dtype):
    for w in (weight(8, 128), torch.zeros(8, 128), torch.full((8, 128), 0.3), torch.zeros(0, 128)):
        q = hqq.quantize(w.to(dtype), parse(name))
        assert q.dtype == dtype
        assert q.shape == tuple(w.shape)
        assert q.dequantize().isfinite().all()
        assert not w.numel() or (q.dequantize().float() - w).abs().max() < 0.5


def test_three_dimensions_are_matrices():
    w = weight(8, 128)
    q = hqq.quantize(w.reshape(2, 4, 128), parse("uint4-g64"))
    assert torch.equal(q.dequantize().reshape(8, 128), hqq.quantize(w, parse("uint4-g64")).dequantize())


@pytest.mark.parametrize("name", ["fp8-e4m3-channel", "q4_k", "nf4-g64-dq", "mxfp4", "nvfp4"])
def test_what_is_not_solved_for_is_rounded_and_the_log_says_so(name, caplog):
    w = weight(8, 512)
    op = Linear(Weight(torch.nn.Parameter(w)))
    with caplog.at_level(logging.WARNING, "halfbyte"):
        found = solver("hqq").solve(op, None, None, {"here": Site(op, parse(name))})
    assert torch.equal(found["here"].dequantize(), kernels.quantize(w, parse(name)).dequantize())
    assert "here is rounded to nearest" in caplog.text


def test_the_row_is_there_and_needs_no_text():
    w = weight()
    op = Linear(Weight(torch.nn.Parameter(w)))
    row = solver("hqq")
    assert not row.needs_data
    q = row.solve(op, None, None, {"here": Site(op, parse("uint4-g64"))})["here"]
    assert torch.equal(q.dequantize(), hqq.quantize(w, parse("uint4-g64")).dequantize())
