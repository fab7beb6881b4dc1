"""torch.compile and torch.library: the ops behave as theirs must, and a compiled model computes what it did."""

from __future__ import annotations

import pytest
import torch

from halfbyte import kernels
from halfbyte.kernels import compiled
from halfbyte.layers import Linear, Weight, swap

FORMATS = ["int4-g32", "nf4-g64-dq", "q4_k", "int8-channel", "int3-g32"]


@pytest.mark.parametrize("format", FORMATS)
def test_opcheck(format: str) -> None:
    q = kernels.quantize(torch.randn(48, 256), format)
    x, bias = torch.randn(3, 256, requires_grad=True), torch.randn(48, requires_grad=True)
    args = (x, bias, *compiled._parts(q)[:-1], -1)  # no key: parts alone, as a graph of another process has them
    torch.library.opcheck(compiled._linear, args)
    torch.library.opcheck(compiled._linear_grad, (torch.randn(3, 48), *args[2:]))


@pytest.mark.parametrize("format", FORMATS)
def test_a_compiled_layer_computes_and_learns_as_the_eager_one(format: str) -> None:
    torch._dynamo.reset()
    op = swap(torch.nn.Sequential(torch.nn.Linear(256, 48)))
    assert isinstance(op[0], Linear)
    op[0].weight.store(kernels.quantize(torch.randn(48, 256), format))
    x = torch.randn(5, 256)
    want = op(x)
    fast = torch.compile(op, fullgraph=True)
    for _ in range(2):
        assert torch.equal(fast(x), want)
    grads = []
    for f in (op, fast):
        inputs = x.clone().requires_grad_()
        f(inputs).square().sum().backward()
        grads.append(inputs.grad)
    assert torch.equal(*grads)


def test_a_graph_finds_its_weights_again_by_their_address() -> None:
    q = kernels.quantize(torch.randn(48, 256), "int4-g32")
    x = torch.randn(2, 256)
    want = kernels.linear(x, q)
    assert q.layout != "canonical" or kernels.served_by()["linear"].startswith("reference")
    parts = compiled._parts(q)
    assert torch.equal(compiled._linear(x, None, *parts[:-1], -1), want)
    other = kernels.quantize(torch.randn(48, 256), "int4-g32")
    assert not torch.equal(compiled.linear(x, other), want)
    assert isinstance(Weight(torch.nn.Parameter(x)), Weight)
