"""Convolutions as ops: what torch computes, with filters that may be codes."""

import copy

import pytest
import torch
from torch import nn

from halfbyte import kernels
from halfbyte.layers import Conv, Grid, ops, swap

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
