"""The C++ rounding and decoding: bit for bit the reference's, in every instruction set that runs here."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfbyte import kernels
from halfbyte.errors import InputError
from halfbyte.formats import FORMATS, Float8, Format, Integers, parse
from halfbyte.kernels import reference, search
from halfbyte.qtensor import QParams, QTensor

_cpu = pytest.importorskip("halfbyte.kernels._cpu")
elementwise = pytest.importorskip("halfbyte.kernels.elementwise")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# whole vectors and not, whole bytes and not, more than one block, and a flat group that is cut short
SHAPES = [(0,), (3, 0), (1,), (3, 67), (2, 3, 130), (3, 2208)]
isas = pytest.mark.parametrize("isa", _cpu.isas())


@pytest.fixture(autouse=True)
def _same_isa():
    before = _cpu.isa()
    yield
    _cpu.use_isa(before)


def fits(f: Format, last: int) -> int:
    """An input size near `last` that the format's groups divide, also those of its scales."""
    if f.flat or not isinstance(f.group, int):
        return last
    step = f.group * (f.scale.group if isinstance(f.scale, Format) and isinstance(f.scale.group, int) else 1)
    return -(-last // step) * step


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int, size: float = 1.0) -> Tensor:
    """Normal ones, with both zeros among them."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size
    w.view(-1)[::7] = 0
    w.view(-1)[3::14] = -0.0
    return w.to(dtype)


def some_qparams(f: Format, shape: tuple[int, ...], seed: int) -> QParams:
    """Negative, zero, tiny, huge and usual scales side by side; with an odd seed, one whose inverse is infinite."""
    g = torch.Generator().manual_seed(seed)
    groups = f.groups(shape)
    kinds = torch.tensor([0.0, 1e-38, -1e-20, 1e-3, 0.1, -0.1, 3.0, 1e4, -1e30, 1e-42][: 9 + seed % 2])
    scale = kinds[torch.randint(len(kinds), groups, generator=g)] * (1 + torch.rand(groups, generator=g))
    if f.zero == "integer":
        return QParams(scale, torch.rand(groups, generator=g) * 300 - 20)
    return QParams(scale, None if f.zero is None else torch.randn(groups, generator=g))


def same(ours: Tensor | None, theirs: Tensor | None) -> None:
    """Equal, the sign of 0 included; NaN is NaN."""
    if theirs is None or ours is None:
        assert ours is theirs
        return
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    if theirs.dtype.itemsize == 1:
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
        return
    assert torch.equal(ours.isnan(), theirs.isnan())
    ours, theirs = ours.nan_to_num(1.5, math.inf, -math.inf), theirs.nan_to_num(1.5, math.inf, -math.inf)
    bits = torch.int32 if theirs.dtype.itemsize == 4 else torch.int16
    assert torch.equal(ours.view(bits), theirs.view(bits))


def same_parts(ours: QTensor, theirs: QTensor) -> None:
    assert (ours.format, ours.shape, ours.dtype) == (theirs.format, theirs.shape, theirs.dtype)
    a, b = ours.tensors(), theirs.tensors()
    assert a.keys() == b.keys()
    for k in b:
        same(a[k], b[k])


def check(w: Tensor, f: Format, p: QParams) -> None:
    """Codes, what they stand for, fake values and gradients."""
    q = reference.quantize(w, f, p)
    same_parts(elementwise.quantize(w, f, p), q)
    same(elementwise.dequantize(q), q.dequantize())
    ours, theirs = w.clone().requires_grad_(), w.clone().requires_grad_()
    y, expected = elementwise.fake(ours, f, p), reference.fake(theirs, f, p)
    same(y.detach(), expected.detach())
    same(elementwise.fake(w, f, p), expected.detach())
    grad = numbers(tuple(w.shape), w.dtype, 5)
    if grad.numel():
        grad.view(-1)[-1] = math.inf
    y.backward(grad)
    expected.backward(grad)
    same(ours.grad, theirs.grad)


def check_search(w: Tensor, f: Format, how: str) -> QParams:
    ours, theirs = elementwise.qparams(w, f, how), search.qparams(w, f, how)
    same(ours.scale, theirs.scale)
    # of several zeros with either sign, torch takes one or the other for the lowest
    same(None if ours.zero is None else ours.zero + 0, None if theirs.zero is None else theirs.zero + 0)
    return theirs


@isas
@pytest.mark.parametrize("name", list(FORMATS))
def test_every_format(name, isa):
    f = FORMATS[name]
    _cpu.use_isa(isa)
    for i, near in enumerate(SHAPES):
        shape, dtype = (*near[:-1], fits(f, near[-1])), DTYPES[i % 3]
        w = numbers(shape, dtype, i)
        check_search(w, f, "absmax")
        p = check_search(w, f, "minmax")
        check(w, f, p)
        if i > 2:
            check(w, f, QParams(p.scale * 0.5, p.zero))  # some are clipped
            check(w, f, some_qparams(f, shape, i))


@settings(max_examples=40)
@given(
    st.builds("{}int{}-{}".format, st.sampled_from(["", "u"]), st.integers(2, 8),
              st.sampled_from(["tensor", "channel", "g1", "g3", "g8", "g16", "g80"])),
    st.lists(st.integers(0, 4), max_size=2), st.integers(0, 150), st.sampled_from(DTYPES), st.integers(0, 99),
    st.sampled_from([1e-30, 1.0, 300.0, 30000.0]), st.sampled_from(_cpu.isas()),
)  # fmt: skip
def test_the_grammar(name, leading, last, dtype, seed, size, isa):
    f = parse(name)
    _cpu.use_isa(isa)
    w = numbers((*leading, fits(f, last)), dtype, seed, size)
    w = w if w.isfinite().all() else w.nan_to_num()
    check(w, f, check_search(w, f, "minmax"))
    check(w, f, some_qparams(f, tuple(w.shape), seed))


@isas
@pytest.mark.parametrize("name", ["int4-tensor", "int8-tensor", "uint8-channel", "fp8-e4m3-tensor", "fp8-e5m2-channel",
                                  "nf4-g64", "fp4-bnb-g64", "fp4-e2m1-g32", "q4_1"])  # fmt: skip
@pytest.mark.parametrize("scale", [1.0, -0.37, 0.0625, 1.7 * 2.0**-59, 2.0**-70])
def test_every_bfloat16(name, scale, isa):
    """Among them all the ties, and all the numbers that are too small to be normal."""
    f = parse(name)
    _cpu.use_isa(isa)
    w = torch.arange(1 << 16).to(torch.int32).to(torch.int16).view(torch.bfloat16)
    w = w[w.isfinite()].reshape(1, -1)
    groups = f.groups(tuple(w.shape))
    zero = None if f.zero is None else torch.full(groups, 37.0 if f.zero == "integer" else 0.25)
    check(w, f, QParams(torch.full(groups, scale), zero))


@isas
@pytest.mark.parametrize("dtype", DTYPES)
def test_quotients_are_those_of_a_division(dtype, isa):
    """Scales of every kind of mantissa, and numbers at and beside the middle between two codes."""
    _cpu.use_isa(isa)
    f = parse("uint8-g16")
    g = torch.Generator().manual_seed(1)
    scale = torch.rand((512, 1), generator=g) * torch.exp2(torch.randint(-8, 8, (512, 1), generator=g).float())
    halves = torch.randint(0, 256, (512, 16), generator=g) + 0.5
    w = halves * scale
    toward = torch.tensor([math.inf, -math.inf, math.inf, -math.inf]).repeat(4)
    near = torch.where(torch.arange(16) % 3 > 0, torch.nextafter(w, toward), w).to(dtype)
    check(near, f, QParams(scale.to(dtype).float(), torch.zeros(512, 1)))


@pytest.mark.parametrize("name", ["int4-tensor", "int4-channel", "int4-g32", "uint8-tensor", "nf4-g64", "int3-g64",
                                  "fp8-e4m3-tensor", "int8-g5"])  # fmt: skip
def test_several_threads(name):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        f = parse(name)
        for rows, cols in ((3, 50_000), (1200, 125)):
            w = numbers((rows, fits(f, cols)), torch.bfloat16, 1)
            check(w, f, check_search(w, f, "minmax"))
    finally:
        torch.set_num_threads(before)


@isas
def test_not_a_number_stays_one(isa):
    _cpu.use_isa(isa)
    for name in [n for n in FORMATS if isinstance(FORMATS[n].grid, Integers | Float8)]:
        f = FORMATS[name]
        shape = (2, fits(f, 160))
        w = numbers(shape, torch.bfloat16, 0)
        p = search.qparams(w, f, "minmax")
        w[0, 5], w[1, 33], w[1, 34] = math.nan, math.inf, -math.inf
        theirs = reference.fake(w, f, p)
        assert theirs.isnan().any()
        same(elementwise.fake(w, f, p), theirs)


@isas
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused(bad, dtype, isa):
    _cpu.use_isa(isa)
    for name in ("int4-g32", "uint4-g32", "nf4-g64", "int8-tensor", "uint4-g5", "fp8-e4m3-channel"):
        for at in (0, 77, 159):
            w = torch.ones(2, 160, dtype=dtype)
            w.view(-1)[at] = bad
            for job in (elementwise.quantize, elementwise.fake, lambda w, f: elementwise.qparams(w, f, "minmax")):
                with pytest.raises(InputError, match="holds NaN or infinity"):
                    job(w, parse(name))


@pytest.mark.parametrize("name", ["int4-g32", "nf4-g64", "uint4-channel", "q4_k", "mxfp4"])
def test_inputs_need_not_be_contiguous(name):
    f = parse(name)
    for w in (torch.randn(256, 6).T, torch.randn(3, 512)[:, ::2], torch.randn(256).expand(3, 256)):
        check(w.bfloat16() if name == "nf4-g64" else w, f, check_search(w, f, "minmax"))
        ours, theirs = w.clone().requires_grad_(), w.clone().requires_grad_()
        grad = torch.randn(w.shape[1], w.shape[0]).T
        p = kernels.qparams(w, f)
        elementwise.fake(ours, f, p).backward(grad)
        reference.fake(theirs, f, p).backward(grad)
        same(ours.grad, theirs.grad)


FITTED = [n for n in FORMATS if elementwise.finds(FORMATS[n], "mse")]


def error(w, f, p, weight):
    return (((kernels.quantize(w, f, p).dequantize() - w).double() ** 2) * weight).sum().item()


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize("how", ["mse", "weighted"])
@pytest.mark.parametrize("kind", ["normal", "shifted", "zeros", "heavy"])
def test_least_squares_are_no_worse_than_the_reference(name, how, kind):
    """Sums come in another order and more is tried, so results differ; the error must not grow."""
    f, w = FORMATS[name], torch.randn(8, 512)
    w = {"normal": w, "shifted": w * 0.3 - 2, "zeros": w * (torch.rand(8, 512) > 0.7), "heavy": w**3}[kind]
    weight = torch.ones(()) if how == "mse" else w.abs()
    for dtype in (torch.float32, torch.bfloat16):
        v = w.to(dtype)
        ours, theirs = elementwise.qparams(v, f, how), search.qparams(v, f, how)
        assert (
            error(v.float(), f, ours, weight) <= error(v.float(), f, theirs, weight) * 1.02 + 1e-6
        )  # scales are rounded after


@pytest.mark.parametrize("name", ["int4-g32", "uint4-g64", "q4_1", "iq4_nl", "q4_k", "q6_k"])
def test_least_squares_heed_the_importance_of_inputs(name):
    f, w, weight = FORMATS[name], torch.randn(16, 256), torch.rand(256) ** 4
    told, plain = (elementwise.qparams(w, f, "mse", i) for i in (weight, None))
    assert error(w, f, told, weight) < 0.95 * error(w, f, plain, weight)
    assert error(w, f, told, weight) <= error(w, f, search.qparams(w, f, "mse", weight), weight) * 1.005


@pytest.mark.parametrize(
    "name", ["int4-g32", "uint4-g64", "uint4-g64-affine", "iq4_nl", "q4_k", "q3_k", "int4-channel"]
)
def test_what_lies_beside_a_group_does_not_change_its_scale(name):
    """Sixteen are fitted side by side, or fewer where there are no more."""
    f, w = parse(name), torch.randn(21, 256)
    whole = elementwise.qparams(w, f, "mse")
    for i in (0, 15, 16, 20):
        alone = elementwise.qparams(w[i : i + 1], f, "mse")
        same(alone.scale, whole.scale[i : i + 1])
        if whole.zero is not None:
            same(alone.zero, whole.zero[i : i + 1])


@pytest.mark.parametrize("name", ["int4-channel", "uint4-channel"])
@pytest.mark.parametrize("columns", [4096, 4097, 9000])
def test_wide_groups_are_fitted_one_by_one(name, columns):
    f, w = parse(name), torch.randn(3, columns) * 0.3 - 0.1
    ours, theirs = elementwise.qparams(w, f, "mse"), search.qparams(w, f, "mse")
    assert error(w, f, ours, 1) <= error(w, f, theirs, 1) * 1.005


@pytest.mark.parametrize("name", ["int4-g32", "q4_1", "q4_k", "q3_k"])
def test_least_squares_refuse_what_is_not_finite(name):
    for bad in (math.nan, math.inf, -math.inf):
        w = torch.randn(4, 256)
        w[2, 100] = bad
        with pytest.raises(InputError, match="NaN or infinity"):
            elementwise.qparams(w, FORMATS[name], "mse")


def test_scales_that_a_search_chose_are_those_that_are_stored():
    w = torch.randn(4, 512)
    p = kernels.qparams(w, "q4_k")
    q = kernels.quantize(w, "q4_k", p)
    assert p.stored is not None
    assert q.parts["scale"] is p.stored["scale"]
    assert torch.equal(q.qparams.scale, p.scale)
    assert torch.equal(kernels.fake(w, "q4_k", p), q.dequantize())
    assert torch.equal(reference.quantize(w, parse("q4_k"), p).dequantize(), q.dequantize())


def test_learned_scales_have_their_gradient():
    w, f = torch.randn(4, 64, requires_grad=True), parse("int4-g32")
    scale = (search.qparams(w.detach(), f, "minmax").scale * 0.6).requires_grad_()
    elementwise.fake(w, f, QParams(scale)).sum().backward()
    assert scale.grad is not None
    ours, scale.grad = scale.grad, None
    reference.fake(w, f, QParams(scale)).sum().backward()
    same(ours, scale.grad)


def test_an_output_is_written_where_it_is_wanted():
    q = reference.quantize(torch.randn(3, 64).bfloat16(), parse("int4-g32"))
    out = torch.empty(3, 64, dtype=torch.bfloat16)
    assert elementwise.dequantize(q, out) is out
    same(out, q.dequantize())
    with pytest.raises(InputError, match="out must be"):
        elementwise.dequantize(q, torch.empty(64, 3).T)


def test_refusals_say_why():
    w = torch.randn(2, 64)
    assert elementwise.refuses("quantize", w) is None
    assert elementwise.refuses("dequantize", reference.quantize(w, parse("int4-g32"))) is None
    assert "float64" in elementwise.refuses("fake", w.double())
    assert "on the CPU, not on meta" in elementwise.refuses("fake", w.to("meta"))


def test_wrong_sizes_raise():
    w, codes, scale, out = torch.randn(4, 64), torch.empty(128, dtype=torch.uint8), torch.ones(8), torch.empty(4, 64)
    grid, span, bits = elementwise._grid(parse("int4-g32")), elementwise.span, torch.empty(32, dtype=torch.uint8)

    def quantize(rows=4, cols=64, group=32, w=w, scale=scale, zero=None, codes=codes):
        typed = [None if t is None else ("float32", span(t)) for t in (w, scale, zero)]
        _cpu.quantize(grid, rows, cols, group, *typed, span(codes), 1)

    def dequantize(rows=4, cols=64, group=32, scale=scale, codes=codes, out=out):
        of = ("float32", span(scale)), None, None, ("float32", span(out))
        _cpu.dequantize(grid, rows, cols, group, span(codes), *of, 1)

    def fake(n=256, group=32, w=w, scale=scale, kept=scale, out=out, mask=bits):
        typed = [("float32", span(t)) for t in (w, scale, kept)]
        _cpu.fake(grid, n, group, *typed, None, span(out), span(mask), 1)

    def fake_grad(n=256, grad=w, mask=bits, out=out):
        _cpu.fake_grad(n, ("float32", span(grad)), span(mask), span(out), 1)

    def ranges(n=256, group=32, w=w, scale=scale, zero=scale):
        _cpu.search("range", n, group, ("float32", span(w)), 15.0, True, False, span(scale), "integer", span(zero), 1)

    wrong = {
        quantize: [{"rows": 5}, {"cols": 66}, {"group": 31}, {"group": 0}, {"rows": -4, "cols": -64}, {"w": w[:3]},
                   {"scale": scale[1:]}, {"zero": scale}, {"codes": codes[1:]}, {"rows": 1 << 62, "cols": 1 << 62}],
        dequantize: [{"rows": 5}, {"group": 31}, {"scale": scale[1:]}, {"codes": codes[1:]}, {"out": out[:3]}],
        fake: [{"n": 257}, {"n": -1}, {"group": 31}, {"w": w[:3]}, {"scale": scale[1:]}, {"kept": scale[1:]},
               {"out": out[:3]}, {"mask": bits[1:]}],
        fake_grad: [{"n": 257}, {"grad": w[:3]}, {"mask": bits[1:]}, {"out": out[:3]}],
        ranges: [{"n": 257}, {"group": 31}, {"group": -1}, {"w": w[:3]}, {"scale": scale[1:]}, {"zero": scale[1:]}],
    }  # fmt: skip
    for job, cases in wrong.items():
        job()
        for case in cases:
            with pytest.raises(ValueError, match=r"needed|too large|zero point|must hold"):
                job(**case)


LEARNED = [f for f in FORMATS if not isinstance(FORMATS[f].scale, Format)]


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_have_the_gradient_of_the_formula(name, dtype):
    """That of the reference, through which autograd sees."""
    q = kernels.quantize(torch.randn(6, 256).to(dtype), name)
    wanted = torch.randn(6, 256)

    def gradients(dequantize):
        learned = {
            k: t.float().requires_grad_() for k, t in q.tensors().items() if k != "codes" and t.is_floating_point()
        }
        same = q.with_tensors({**q.tensors(), **{k: t.to(q.parts[k].dtype) for k, t in learned.items()}})
        value = dequantize(same)
        (value.float() * wanted).sum().backward()
        return value.detach(), {k: t.grad for k, t in learned.items()}

    value, found = gradients(kernels.dequantize)
    expected, through = gradients(lambda q: q.dequantize())
    assert torch.equal(value, expected)
    assert found
    for key, g in through.items():
        torch.testing.assert_close(found[key], g, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4)
