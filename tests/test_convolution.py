"""Convolutions as ops: what torch computes, with filters that may be codes."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from halfbyte import InputError, kernels
from halfbyte.formats import parse
from halfbyte.layers import Conv, Grid, ops, swap
from halfbyte.scheme import static

CASES = {
    "1d": (lambda: nn.Conv1d(6, 8, 3), (2, 6, 20)),
    "strided": (lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), (2, 6, 20)),
    "dilated": (lambda: nn.Conv1d(6, 8, 3, padding="same", dilation=2, bias=False), (2, 6, 20)),
    "2d": (lambda: nn.Conv2d(4, 8, (3, 5), padding=(1, 2)), (2, 4, 12, 12)),
    "grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2), (2, 4, 12, 12)),
    "by channel": (lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 12, 12)),
    "patches": (lambda: nn.Conv2d(3, 16, 4, stride=4), (2, 3, 16, 16)),
    "reflected": (lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), (2, 4, 12, 12)),
    "around": (lambda: nn.Conv1d(6, 8, 5, padding=2, padding_mode="circular"), (2, 6, 20)),
    "3d": (lambda: nn.Conv3d(3, 8, (2, 4, 4), stride=(2, 4, 4)), (1, 3, 4, 8, 8)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_an_op_computes_what_the_layer_did(name, dtype):
    make, shape = CASES[name]
    layer, x = make().to(dtype), torch.randn(shape).to(dtype)
    op = swap(copy.deepcopy(layer))
    assert isinstance(op, Conv)
    assert op.weight.shape == (layer.weight.shape[0], layer.weight[0].numel())
    assert torch.equal(op(x), layer(x))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("grid", [False, True])
@torch.no_grad()
def test_codes_convolve_as_the_values_they_stand_for(name, grid):
    make, shape = CASES[name]
    layer, x = make(), torch.randn(shape)
    op = swap(copy.deepcopy(layer)).eval()
    assert isinstance(op, Conv)
    q = kernels.quantize(op.weight.base(), "int8-channel", kernels.qparams(op.weight.base(), "int8-channel", "minmax"))
    if grid:
        op.weight.grid = Grid(q.format)
    else:
        op.weight.store(q)
    layer.weight.copy_(q.dequantize().reshape(layer.weight.shape))
    assert torch.equal(op(x), layer(x))


def test_filters_get_their_gradient():
    layer, x = nn.Conv2d(3, 8, 3), torch.randn(2, 3, 8, 8)
    op = swap(copy.deepcopy(layer))
    for m in (layer, op):
        m(x).square().sum().backward()
    ((_, found),) = ops(op)
    assert torch.equal(found.weight.stored.grad.reshape(layer.weight.shape), layer.weight.grad)


def test_a_layer_that_turns_a_convolution_round_is_none():
    assert not list(ops(swap(nn.Sequential(nn.ConvTranspose2d(3, 4, 3)))))


def test_it_works_on_the_meta_device():
    with torch.device("meta"):
        model = swap(nn.Sequential(nn.Conv2d(3, 8, 3)))
    ((name, op),) = ops(model)
    assert (name, tuple(op.weight.shape), op.weight.device.type) == ("0", (8, 27), "meta")


# inputs in 8 bits

INPUTS = ["int8-token", "uint8-token", "int8-tensor", "uint8-tensor"]
WEIGHTS = ["int8-channel", "uint8-channel", "int4-channel", "int8-tensor"]


def rounding(layer: nn.Module, x: torch.Tensor, input: str, weight: str = "int8-channel") -> Conv:
    """The op of a layer in eval, its weight codes, its inputs rounded."""
    op = swap(copy.deepcopy(layer)).eval()
    assert isinstance(op, Conv)
    op.weight.store(kernels.quantize(op.weight.base(), weight))
    if static(parse(input)):
        op.round_inputs(parse(input), kernels.qparams(x, input, "absmax"))
    else:
        op.input = parse(input)
    return op


def by_integers(layer: nn.Module, op: Conv, x: torch.Tensor) -> torch.Tensor:
    """What an engine of 8-bit integers gives: a sample at a time, codes summed without any error, then scaled."""
    q = op.weight.frozen()
    zero = q.qparams.zero if q.qparams.zero is not None else 1 << (q.format.bits - 1)
    exact = copy.deepcopy(layer).double()
    exact.weight.copy_((q.codes.double() - zero).reshape(layer.weight.shape))
    exact.bias = None
    out = []
    for sample in x:
        f = op.input
        p = op.input_qparams or kernels.qparams(sample.flatten(), f, "absmax")
        middle = 1 << (f.bits - 1) if p.zero is None else p.zero
        codes = kernels.quantize(sample.flatten(), f, p).codes.double() - middle
        sums = exact(codes.view(1, *sample.shape))[0]
        assert torch.equal(sums, sums.round())
        ones = [1] * (sums.ndim - 1)
        y = sums.float() * q.qparams.scale.view(-1, *ones) * p.scale
        out.append(y if layer.bias is None else y + layer.bias.view(-1, *ones))
    return torch.stack(out)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("input", INPUTS)
@pytest.mark.parametrize("weight", WEIGHTS)
@torch.no_grad()
def test_eval_gives_what_integers_give(name, input, weight):
    make, shape = CASES[name]
    layer, x = make(), torch.randn(shape) * torch.logspace(-1, 1, shape[0]).view(-1, *[1] * (len(shape) - 1)) + 0.3
    op = rounding(layer, x, input, weight)
    assert torch.equal(op(x), by_integers(layer, op, x))


@given(shape=st.tuples(*[st.integers(3, 9)] * 2), groups=st.integers(1, 4), out=st.integers(1, 3),
       kernel=st.integers(1, 3), stride=st.integers(1, 2), padding=st.integers(0, 2), input=st.sampled_from(INPUTS),
       seed=st.integers(0, 999))  # fmt: skip
@torch.no_grad()
def test_any_convolution_gives_what_integers_give(shape, groups, out, kernel, stride, padding, input, seed):
    torch.manual_seed(seed)
    layer = nn.Conv2d(2 * groups, out * groups, kernel, stride, padding, groups=groups)
    x = torch.randn(3, 2 * groups, *shape) * 10 ** (seed % 7 - 3)
    op = rounding(layer, x, input)
    assert torch.equal(op(x), by_integers(layer, op, x))


@torch.no_grad()
def test_sums_past_what_float32_holds_are_exact():
    layer, x = nn.Conv2d(3000, 16, 1, bias=False), 1 - 0.1 * torch.rand(2, 3000, 3, 3)
    layer.weight.uniform_(0.9, 1)
    op = rounding(layer, x, "int8-token")
    assert torch.equal(op(x), by_integers(layer, op, x))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_sample_is_rounded_alone(name):
    make, shape = CASES[name]
    layer, x = make(), torch.randn(3, *shape[1:]) * torch.tensor([1.0, 100, 0.01]).view(-1, *[1] * (len(shape) - 1))
    op = rounding(layer, x, "int8-token")
    y = op(x)
    for i in range(3):
        assert torch.equal(op(x[i : i + 1]), y[i : i + 1])
        if layer.padding_mode == "zeros":
            assert torch.equal(op(x[i]), y[i])  # without a batch
    near = (layer(x) - y).abs().flatten(1).amax(1)
    assert (near < 0.05 * layer(x).abs().flatten(1).amax(1)).all()


@pytest.mark.parametrize("input", [*INPUTS, "fp8-e4m3-token"])
@pytest.mark.parametrize("weight", ["int8-channel", "int4-g12", "fp8-e4m3-channel"])
def test_training_sees_what_eval_computes(input, weight):
    layer, x = nn.Conv2d(8, 8, 3, padding=1, groups=2), torch.randn(3, 8, 6, 6, requires_grad=True)
    op = rounding(layer, x.detach(), input)
    op.weight.store(layer.weight.detach().flatten(1))
    op.weight.stored.requires_grad_(True)
    op.weight.grid = Grid(parse(weight))
    seen = op.train()(x)
    with torch.no_grad():
        found = op.eval()(x)
        op.weight.freeze(op.weight.frozen())
        assert torch.equal(op(x), found)
    torch.testing.assert_close(seen, found, rtol=1e-5, atol=1e-5)
    # straight through: the gradient of what was convolved, for all but the largest inputs, which were clipped
    layer.weight.data = op.weight.frozen().dequantize().view(layer.weight.shape)
    (through,) = torch.autograd.grad(layer(x).square().sum(), x)
    (given,) = torch.autograd.grad(seen.square().sum(), x)
    passed = given != 0
    assert passed.float().mean() > 0.98
    torch.testing.assert_close(given[passed], through[passed], rtol=0.1, atol=0.1 * float(through.abs().max()))


def test_a_scale_that_is_not_known_is_said():
    op = swap(nn.Conv2d(3, 4, 3))
    assert isinstance(op, Conv)
    op.input = parse("int8-tensor")
    with pytest.raises(InputError, match="not known yet: calibrate first"):
        op(torch.randn(1, 3, 8, 8))
