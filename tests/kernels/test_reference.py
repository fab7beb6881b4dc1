"""The reference arithmetic: laws, gradients, and bitsandbytes as a second opinion."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from halfbyte import kernels
from halfbyte.errors import InputError
from halfbyte.formats import FORMATS, Format, Integers, Table, parse
from halfbyte.kernels.rounding import normalize, round_to_grid
from halfbyte.qtensor import QParams, QTensor, decode, grid_values, grouped, pack, ungrouped

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**32)
generated = st.builds(
    "{}int{}-{}".format,
    st.sampled_from(["", "u"]),
    st.integers(2, 8),
    st.sampled_from(["tensor", "channel", "g1", "g3", "g5", "g8"]),
)


def fits(f: Format, last: int) -> int:
    """An input size near `last` that the format's groups divide, also those of its scales."""
    if f.flat or not isinstance(f.group, int):
        return last
    step = f.group * (f.scale.group if isinstance(f.scale, Format) and isinstance(f.scale.group, int) else 1)
    return -(-last // step) * step


@st.composite
def tensors(draw, f: Format):
    """1-D to 3-D, odd and empty shapes, in a dtype, of a size that fp16 holds."""
    leading = draw(st.lists(st.integers(0, 4), max_size=2))
    shape = (*leading, fits(f, draw(st.integers(0, 70))))
    g = torch.Generator().manual_seed(draw(seeds))
    size = draw(st.sampled_from([1e-30, 1e-6, 1.0, 300.0]))
    return (torch.randn(shape, generator=g) * size).to(draw(dtypes))


def some_qparams(f: Format, shape: tuple[int, ...], seed: int) -> QParams:
    """Arbitrary scales and zeros: negative, zero, tiny, huge, and usual ones side by side."""
    g = torch.Generator().manual_seed(seed)
    groups = f.groups(shape)
    kinds = torch.tensor([0.0, 1e-38, -1e-20, 1e-3, 0.1, -0.1, 3.0, 1e4, -1e30])
    scale = kinds[torch.randint(len(kinds), groups, generator=g)] * (1 + torch.rand(groups, generator=g))
    if f.zero == "integer":
        return QParams(scale, torch.rand(groups, generator=g) * 300 - 20)
    return QParams(scale, None if f.zero is None else torch.randn(groups, generator=g))


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert torch.equal(a.nan_to_num(1.5), b.nan_to_num(1.5))
    assert torch.equal(a.isnan(), b.isnan())


@pytest.mark.parametrize("name", list(FORMATS))
@settings(max_examples=12)
@given(data=st.data())
def test_fake_is_dequantize_of_quantize(name, data):
    f = FORMATS[name]
    w = data.draw(tensors(f))
    p = some_qparams(f, tuple(w.shape), data.draw(seeds)) if data.draw(st.booleans()) else kernels.qparams(w, f)
    same(kernels.fake(w, f, p), kernels.dequantize(kernels.quantize(w, f, p)))


@settings(max_examples=60)
@given(generated, st.data())
def test_fake_is_dequantize_of_quantize_for_the_grammar(name, data):
    f = parse(name)
    w = data.draw(tensors(f))
    p = some_qparams(f, tuple(w.shape), data.draw(seeds)) if data.draw(st.booleans()) else None
    same(kernels.fake(w, f, p), kernels.dequantize(kernels.quantize(w, f, p)))


@given(generated, st.data())
def test_integers_hold_zero(name, data):
    f = parse(name)
    w = data.draw(tensors(f)).clone()
    w[..., ::3] = 0
    out = kernels.quantize(w, f).dequantize()
    assert (out[w == 0] == 0).all()


@given(st.sampled_from([n for n in FORMATS if isinstance(FORMATS[n].grid, Integers)]) | generated, st.data())
def test_inside_the_range_the_error_is_half_a_step(name, data):
    f = parse(name)
    assume(not isinstance(f.scale, Format))
    w = data.draw(tensors(f)).float()
    q = kernels.quantize(w, f)
    p = q.qparams
    x = normalize(grouped(w, f), f, p)
    _, inside = round_to_grid(x, f, p.zero)
    rows = decode(q.codes, f, p)
    step = p.scale.abs().reshape(-1, 1)
    zero = 0 if p.zero is None or f.zero == "integer" else p.zero.abs().reshape(-1, 1)
    slack = 1e-6 * (grouped(w, f).abs() + zero)  # the quotient and the product are rounded too
    near = (rows - grouped(w, f)).abs() <= step * 0.500001 + slack
    assert near[inside & (step > 0)].all()  # a tiny scale may be 0 once it is fp16


@given(st.sampled_from([n for n in FORMATS if isinstance(FORMATS[n].grid, Table)]), st.data())
def test_a_table_gives_the_nearest_value(name, data):
    f = FORMATS[name]
    assume(not isinstance(f.scale, Format))
    w = data.draw(tensors(f)).float()
    assume(w.numel() == 0 or w.abs().max() > 1e-20)
    q = kernels.quantize(w, f)
    x = normalize(grouped(w, f), f, q.qparams)
    nearest = (x[..., None] - f.grid.codebook).abs().amin(-1)
    off = (x - grid_values(round_to_grid(x, f, None)[0], f)).abs()
    assert (off <= nearest + 1e-6).all()
    assert torch.equal(ungrouped(round_to_grid(x, f, None)[0], tuple(w.shape)), q.codes)


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_zero_empty_and_single(name, dtype):
    f = FORMATS[name]
    n = fits(f, 128)
    zeros = torch.zeros(2, n, dtype=dtype)
    assert (kernels.quantize(zeros, f).dequantize() == 0).all()
    for shape in ((0, n), (2, 0), (0,)):
        out = kernels.quantize(torch.zeros(shape, dtype=dtype), f).dequantize()
        assert (out.shape, out.dtype) == (shape, dtype)
    for value in (3.0, -3.0):
        out = kernels.quantize(torch.full((2, n), value, dtype=dtype), f).dequantize()
        assert out.unique().numel() == 1
        assert out.float().sub(value).abs().max() <= 3 / (6 if "e8m0" in str(f.scale) else 30)
    if f.flat or not isinstance(f.group, int):
        one = kernels.quantize(torch.tensor([-0.7], dtype=dtype), f).dequantize()
        assert one.item() == pytest.approx(-0.7, rel=0.02)


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused(name, bad):
    w = torch.ones(2, fits(FORMATS[name], 128))
    w[1, 3] = bad
    with pytest.raises(InputError, match="holds NaN or infinity"):
        kernels.quantize(w, name)
    with pytest.raises(InputError, match="holds NaN or infinity"):
        kernels.fake(w, name)


def test_an_unknown_name_is_refused_everywhere():
    for call in (kernels.quantize, kernels.fake, kernels.qparams):
        with pytest.raises(InputError, match="did you mean 'int4-g64'"):
            call(torch.ones(2, 64), "int4-g46x")


def test_an_integer_zero_point_is_rounded_and_clamped_when_stored():
    p = QParams(torch.ones(1, 4), torch.tensor([[-3.0, 2.7, 2.2, 99.0]]))
    q = kernels.quantize(torch.zeros(1, 8), "uint4-g2", p)
    assert torch.equal(q.parts["zero"], torch.tensor([[0, 3, 2, 15]], dtype=torch.uint8))
    assert (q.dequantize() == 0).all()


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "int4-g32"])
def test_a_scale_too_large_for_its_dtype_is_the_largest_one(name):
    f, w = FORMATS[name], torch.full((1, 32), 1e4).half()
    p = QParams(torch.full((1, 1), -1e30), None if f.zero is None else torch.full((1, 1), 1e30))
    q = kernels.quantize(w, f, p)
    assert q.qparams.scale.item() == -65504
    assert f.zero is None or q.qparams.zero.item() == 65504


# ---- gradients


def formula(w, scale, zero, f, grad):
    """LSQ (arXiv:1902.08153, eq. 3) and LSQ+ (arXiv:2004.09576, eq. 4) element by element, in float64."""
    rows, g = grouped(w, f).double(), grouped(grad, f).double()
    s = scale.double().reshape(-1, 1)
    shift = zero.double().round().clamp(0, f.grid.top).reshape(-1, 1) if zero is not None else f.grid.middle
    low, high = -shift, f.grid.top - shift
    x = rows / s
    inside = (x.round() >= low) & (x.round() <= high)
    value = torch.minimum(torch.maximum(x.round(), low * torch.ones_like(x)), high * torch.ones_like(x))
    dscale = (g * torch.where(inside, value - x, value)).sum(1)
    dzero = (g * torch.where(inside, 0.0, -s)).sum(1)
    return (g * inside).reshape(w.shape), dscale.reshape(scale.shape), dzero.reshape(scale.shape)


@pytest.mark.parametrize("name", ["int4-g8", "int3-channel", "uint4-g8", "uint2-channel", "int8-tensor"])
def test_gradients_are_those_of_the_papers(name):
    f = parse(name)
    w = torch.randn(6, 16, requires_grad=True)
    p = kernels.qparams(w.detach(), f, "minmax")
    scale = (p.scale * 0.6).requires_grad_()  # some are clipped
    zero = None if p.zero is None else (p.zero + 0.7).requires_grad_()
    grad = torch.randn(6, 16)
    kernels.fake(w, f, QParams(scale, zero)).backward(grad)
    dw, dscale, dzero = formula(w.detach(), scale.detach(), None if zero is None else zero.detach(), f, grad)
    assert w.grad is not None
    assert ((w.grad == 0) & (grad != 0)).any(), "nothing was clipped: the test shows nothing"
    torch.testing.assert_close(w.grad.double(), dw, rtol=0, atol=0)
    torch.testing.assert_close(scale.grad.double(), dscale, rtol=1e-4, atol=1e-4)
    if zero is not None:
        torch.testing.assert_close(zero.grad.double(), dzero, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["int4-g8", "uint4-g8", "q4_1", "nf4-g64", "fp8-e4m3-channel", "fp4-e2m1-g32"])
def test_the_scale_gradient_is_that_of_the_value_with_the_codes_held(name):
    """By finite differences of the value, less the quotient that the straight-through term takes off."""
    f = parse(name)
    w = torch.randn(4, 64)
    p = kernels.qparams(w, f, "minmax")
    if f.scale == "float16":
        p = QParams(p.scale.half().float(), p.zero.half().float() if p.zero is not None else None)
    scale = (p.scale * (0.5 if f.scale != "float16" else 1)).requires_grad_()
    kernels.fake(w, f, QParams(scale, p.zero)).backward(grad := torch.randn(4, 64))
    held = QParams(scale.detach(), p.zero)
    codes = kernels.quantize(w, f, held).codes
    h = 2**-6
    high = decode(codes, f, QParams(held.scale + h, p.zero))
    low = decode(codes, f, QParams(held.scale - h, p.zero))
    slope = (high - low).double() / (2 * h)
    x = normalize(grouped(w, f), f, held)
    _, inside = round_to_grid(x, f, p.zero)
    expected = (grouped(grad, f) * (slope - x * inside)).sum(1).reshape(scale.shape)
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad.double(), expected, rtol=1e-3, atol=1e-3)


def test_the_gradient_of_a_float_zero_is_that_of_what_was_clipped():
    f = FORMATS["q4_1"]
    w = torch.randn(2, 64)
    p = kernels.qparams(w, f, "minmax")
    zero = (p.zero + 0.5).requires_grad_()
    kernels.fake(w, f, QParams(p.scale * 0.5, zero)).backward(grad := torch.randn(2, 64))
    stored = QParams((p.scale * 0.5).half().float(), zero.detach().half().float())
    _, inside = round_to_grid(normalize(grouped(w, f), f, stored), f, stored.zero)
    assert (~inside).any()
    torch.testing.assert_close(zero.grad, (grouped(grad, f) * ~inside).sum(1).reshape(zero.shape))


@pytest.mark.parametrize("dtype", DTYPES)
def test_straight_through_keeps_dtype_and_shape(dtype):
    w = torch.randn(3, 5, 64).to(dtype).requires_grad_()
    kernels.fake(w, "nf4-g64").sum().backward()
    assert (w.grad.dtype, w.grad.shape) == (dtype, w.shape)
    assert (w.grad == 1).all()  # absmax scaling clips nothing


@pytest.mark.parametrize("name", ["int4-g32", "uint4-g32", "nf4-g64", "q4_k", "fp8-e4m3-channel"])
@pytest.mark.usefixtures("torch_products")
def test_linear_and_its_gradients_are_those_of_the_dense_product(name):
    q = kernels.quantize(torch.randn(8, 256), name)
    x = torch.randn(2, 3, 256, requires_grad=True)
    bias = torch.randn(8, requires_grad=True)
    y = kernels.linear(x, q, bias)
    y.backward(dy := torch.randn_like(y))
    x2, b2 = x.detach().requires_grad_(), bias.detach().requires_grad_()
    y2 = torch.nn.functional.linear(x2, q.dequantize(), b2)
    y2.backward(dy)
    assert torch.equal(y, y2)
    torch.testing.assert_close(x.grad, x2.grad)
    torch.testing.assert_close(bias.grad, b2.grad)
    assert torch.equal(kernels.linear_grad(dy, q), dy @ q.dequantize())
    assert kernels.linear(x.bfloat16(), q).dtype == torch.bfloat16


# ---- bitsandbytes, code for code


def their_codes(packed: torch.Tensor, n: int) -> torch.Tensor:
    return torch.stack((packed >> 4, packed & 15), -1).flatten()[:n]


shapes = st.sampled_from([(1,), (63,), (64,), (5, 63), (16, 96), (3, 5, 40), (7, 128), (64, 64)])


@given(
    st.sampled_from(["nf4", "fp4"]),
    st.sampled_from([32, 64, 128, 1024]),
    shapes,
    dtypes,
    seeds,
    st.booleans(),
)
def test_nf4_and_fp4_are_those_of_bitsandbytes(kind, block, shape, dtype, seed, sparse):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if sparse:
        w[..., : shape[-1] // 2] = 0
    q = kernels.quantize(w, f"{kind}-g{block}" if kind == "nf4" else f"fp4-bnb-g{block}")
    packed, state = quantize_4bit(w, blocksize=block, quant_type=kind)
    assert torch.equal(q.parts["scale"], state.absmax)
    ours, theirs = q.codes.flatten(), their_codes(packed, w.numel())
    whole = w.numel() // block * block
    assert torch.equal(ours[:whole], theirs[:whole])
    # In a last, short block it divides on a CPU where its kernels multiply: halfway between two values
    # either may come.
    x = w.flatten()[whole:].float() / state.absmax[-1]
    off = [(x - q.format.grid.codebook[c[whole:].int()]).abs() for c in (ours, theirs)]
    torch.testing.assert_close(off[0], off[1], rtol=0, atol=1e-6)
    # Elsewhere its own kernel for AVX-512 takes the constants by rows, not by blocks.
    if w.ndim > 1 and shape[-1] % block == 0:
        assert torch.equal(q.dequantize(), dequantize_4bit(packed, state))


@given(shapes, dtypes, seeds, st.sampled_from([32, 64]))
def test_double_quantized_constants_are_those_of_bitsandbytes(shape, dtype, seed, block):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    q = kernels.quantize(w, f"nf4-g{block}-dq")
    _, state = quantize_4bit(w, blocksize=block, quant_type="nf4", compress_statistics=True)
    scale = q.parts["scale"]
    assert isinstance(scale, QTensor)
    assert torch.equal(scale.parts["offset"], state.offset)
    assert torch.equal(scale.parts["scale"], state.state2.absmax)
    if state.absmax.numel() > 1:  # of a single constant nothing is left but the mean: any code is right
        assert torch.equal(scale.codes, state.absmax)


def test_many_double_quantized_constants():
    w = torch.randn(1024, 1152) * torch.rand(1024, 1)
    scale = kernels.quantize(w, "nf4-g64-dq").parts["scale"]
    _, state = quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    assert isinstance(scale, QTensor)
    assert torch.equal(scale.codes, state.absmax)


def test_an_empty_double_quantized_tensor_has_an_offset_of_zero():
    scale = kernels.quantize(torch.zeros(0, 64), "nf4-g64-dq").parts["scale"]
    assert isinstance(scale, QTensor)
    assert scale.parts["offset"] == 0


def test_double_quantization_reads_as_bitsandbytes_reads_it():
    w = torch.randn(64, 128).bfloat16()
    q = kernels.quantize(w, "nf4-g64-dq")
    packed, state = quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    theirs = QTensor(q.format, q.shape, q.dtype, {**q.parts, "codes": pack(their_codes(packed, w.numel()), 4)})
    assert torch.equal(theirs.dequantize(), dequantize_4bit(packed, state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_double_quantized_weights_are_bitsandbytes_code_for_code(dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    w = (torch.randn(96, 576) * 0.02).to(dtype)
    packed, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    q = kernels.quantize(w, "nf4-g64-dq")
    theirs = torch.stack((packed.flatten() >> 4, packed.flatten() & 15), 1).reshape(w.shape)
    assert torch.equal(q.codes, theirs)
    assert torch.equal(q.dequantize(), functional.dequantize_4bit(packed, state))
