"""Where scales come from."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfbyte import kernels
from halfbyte.errors import InputError
from halfbyte.formats import FORMATS, Format, Integers, Table, parse
from halfbyte.kernels.search import SEARCHES

seeds = st.integers(0, 2**32)
shaped = st.sampled_from(["normal", "heavy", "shifted", "sparse", "constant", "one-sided"])


def weights(kind: str, seed: int, rows: int = 3, n: int = 256) -> torch.Tensor:
    w = torch.randn(rows, n, generator=torch.Generator().manual_seed(seed))
    match kind:
        case "heavy":
            return w**3
        case "shifted":
            return w + 5
        case "sparse":
            return w * (w > 1)
        case "constant":
            return torch.full_like(w, w[0, 0].item())
        case "one-sided":
            return -w.abs()
    return w


def group_sums(x: torch.Tensor, f: Format) -> torch.Tensor:
    """Sums over a scale's group, or over everything where the scales are rounded together."""
    if f.group == "tensor" or isinstance(f.scale, Format):
        return x.sum()
    return x.reshape(-1, f.group).sum(1) if isinstance(f.group, int) else x.sum(-1)


def errors(w: torch.Tensor, f: Format, how: str, weight: torch.Tensor | None = None) -> torch.Tensor:
    e = (kernels.fake(w, f, kernels.qparams(w, f, how, weight)) - w).double() ** 2
    return group_sums(e if weight is None else e * weight, f)


# Where a scale is stored in less than float32, its rounding comes after the search: equal but for that.
EXACT = [n for n in FORMATS if FORMATS[n].scale in ("source", "float32")]
GRAMMAR = [f"{u}int{b}-{g}" for u in ("", "u") for b in range(2, 9) for g in ("g16", "channel")]


@given(st.sampled_from(EXACT + GRAMMAR), shaped, seeds)
def test_mse_is_never_worse_than_minmax(name, kind, seed):
    f, w = parse(name), weights(kind, seed)
    best, full = errors(w, f, "mse"), errors(w, f, "minmax")
    noise = 3e-7 * group_sums(w.double() ** 2, f)  # candidates are compared by float32 sums of this size
    assert (best <= full * (1 + 1e-4) + noise).all()


@given(st.sampled_from([n for n in FORMATS if n not in EXACT and n != "mxfp4"]), shaped, seeds)
def test_mse_is_no_worse_but_for_the_rounding_of_scales(name, kind, seed):
    f, w = parse(name), weights(kind, seed)
    noise = 1e-6 * (w.double() ** 2).sum()  # fp16 scales
    assert errors(w, f, "mse").sum() <= errors(w, f, "minmax").sum() * 1.02 + noise


@given(st.sampled_from(["int4-g32", "uint4-g32", "int3-g64", "uint2-g32"]), seeds)
def test_mse_with_importance_is_never_worse_than_minmax(name, seed):
    f, w = parse(name), weights("normal", seed)
    importance = torch.rand(256, generator=torch.Generator().manual_seed(seed)) ** 3
    best, full = errors(w, f, "mse", importance), errors(w, f, "minmax", importance)
    assert (best <= full * (1 + 1e-4) + 1e-8).all()


def test_importance_moves_the_scale_to_what_counts():
    w = torch.randn(16, 64)
    w[:, 0] = 8.0  # an outlier that does not matter
    weight = torch.ones(64)
    weight[0] = 1e-6
    plain, told = (kernels.fake(w, "int3-g64", kernels.qparams(w, "int3-g64", "mse", i)) for i in (None, weight))
    error = [((out - w)[:, 1:] ** 2).sum() for out in (plain, told)]
    assert error[1] < 0.7 * error[0]


@pytest.mark.parametrize("name", ["int4-g64", "int3-g32", "uint4-g64", "uint2-g32", "q4_0", "q4_1", "q4_k"])
def test_mse_is_better_on_normal_weights(name):
    w = torch.randn(64, 256)
    assert errors(w, parse(name), "mse").sum() < 0.97 * errors(w, parse(name), "minmax").sum()


@given(st.sampled_from([n for n in FORMATS if isinstance(FORMATS[n].grid, Integers)]), shaped, seeds)
def test_minmax_covers_the_range(name, kind, seed):
    """Both ends within half a step; symmetric integers lack the highest, so that one end is a step away."""
    f, w = parse(name), weights(kind, seed)
    if isinstance(f.scale, Format):
        return
    p = kernels.qparams(w, f, "minmax")
    error = (kernels.fake(w, f, p) - w).abs().reshape(p.scale.numel(), -1)
    step = p.scale.abs().reshape(-1, 1)
    bound = 1.0 if f.zero is None else 0.5
    assert (error <= step * bound + 2e-3 * w.abs().max()).all()


def test_the_larger_side_sits_on_the_lowest_integer():
    for sign in (1, -1):
        w = sign * torch.tensor([[4.0, -1.0, 0.5, 0.0]])
        q = kernels.quantize(w, "int4-g4", kernels.qparams(w, "int4-g4", "minmax"))
        assert q.codes[0, 0] == 0
        assert torch.equal(q.dequantize(), w)


def test_absmax_covers_both_sides_evenly():
    w = torch.tensor([[7.5, -7.5, 3.0, 0.0]])
    p = kernels.qparams(w, "int4-g4", "absmax")
    assert p.scale.item() == 1.0
    assert kernels.quantize(w, "int4-g4", p).codes.tolist() == [[15, 0, 11, 8]]


def test_restricted_leaves_the_lowest_integer_alone():
    w = torch.tensor([[-7.0, 3.5, 1.0, 0.0]])
    p = kernels.qparams(w, "int4-g4", "restricted")
    assert p.scale.item() == 1.0
    assert kernels.quantize(w, "int4-g4", p).codes.tolist() == [[1, 12, 9, 8]]


def test_a_power_of_two_is_the_least_that_covers_the_range():
    w = torch.tensor([[448.0, 1.0], [449.0, 0.0], [-224.0, 3.0], [0.0, 0.0]])
    assert kernels.qparams(w, "fp8-e4m3-channel", "power-of-two").scale.flatten().tolist() == [1.0, 2.0, 0.5, 1.0]


def test_percentiles_clip():
    w = torch.arange(1, 1001.0)[None]
    p = kernels.qparams(w, "int8-channel", "percentile-90")
    assert p.scale.abs().item() == pytest.approx(900 / 128)


def test_mx_scales_are_powers_of_two_by_the_specification():
    w = torch.tensor([[5.9] + [0.0] * 31, [3.9] + [0.0] * 31, [4.0] + [0.0] * 31, [0.0] * 32])
    p = kernels.qparams(w, "mxfp4")
    assert p.scale.flatten()[:3].tolist() == [1.0, 0.5, 1.0]
    assert (kernels.fake(w, "mxfp4", p)[3] == 0).all()


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_group_of_zeros(name):
    f = parse(name)
    p = kernels.qparams(torch.zeros(2, 256), f)
    assert p.scale.isfinite().all()
    if not f.flat and isinstance(f.scale, str) and not isinstance(f.grid, Table):
        assert (p.scale == 1).all()
    assert (kernels.fake(torch.zeros(2, 256), f, p) == 0).all()


@pytest.mark.parametrize("how", [*SEARCHES, "percentile-99.9"])
@pytest.mark.parametrize("name", ["int4-g64", "uint4-g64", "nf4-g64", "q4_k", "fp8-e4m3-channel"])
def test_the_shape_of_what_is_found(name, how):
    f = parse(name)
    for shape in ((3, 256), (256,), (2, 3, 256), (0, 256)):
        p = kernels.qparams(torch.randn(shape), f, how)
        assert p.scale.shape == f.groups(shape)
        assert p.scale.dtype == torch.float32
        assert (p.zero is None) == (f.zero is None)
        assert p.zero is None or p.zero.shape == p.scale.shape


def test_large_tensors_are_searched_in_pieces_with_the_same_result():
    w = torch.randn(700, 1024)
    whole = kernels.qparams(w, "int4-g64", "minmax").scale
    assert torch.equal(whole[650:], kernels.qparams(w[650:], "int4-g64", "minmax").scale)


@pytest.mark.parametrize("how", ["msee", "percentile"])
def test_an_unknown_search_is_refused(how):
    with pytest.raises(InputError, match=r"no way to find scales.*minmax, absmax, mse"):
        kernels.qparams(torch.ones(2, 64), "int4-g64", how)


@pytest.mark.parametrize("how", ["percentile-", "percentile-x", "percentile-200", "percentile--5", "percentile-nan"])
def test_an_impossible_percentile_is_refused(how):
    with pytest.raises(InputError):
        kernels.qparams(torch.ones(2, 64), "int4-g64", how)
