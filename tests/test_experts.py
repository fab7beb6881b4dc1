"""Fused experts as modules of their own: what was fused, and what transformers' eager implementation computes."""

import copy

import pytest
import torch
from torch import nn

from halfbyte import kernels
from halfbyte.experts import Fused, fused
from halfbyte.layers import Experts, Linear, ops, swap
from miniatures import EXPERTS, make

LAYOUTS = [Fused(g, t, i) for g in (False, True) for t in (False, True) for i in (False, True)]


def block(name, **settings):
    """The experts of a miniature's first layer."""
    m = copy.deepcopy(make(name, **settings).model.layers[0].mlp.experts)
    m.config._experts_implementation = "eager"
    return m


def tokens(n=30, width=64, k=2, experts=4):
    """Hidden states, the experts of each token and their shares; the last expert is nobody's."""
    chosen = torch.stack([torch.randperm(experts - 1)[:k] for _ in range(n)])
    return torch.randn(n, width), chosen, torch.rand(n, k)


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("n", [1, 3, 30])
@torch.no_grad()
def test_they_compute_what_the_fused_ones_did(name, n):
    m, given = block(name), tokens(n)
    ours = swap(nn.ModuleList([copy.deepcopy(m)]))[0]
    assert isinstance(ours, Experts)
    if name == "gpt-oss":  # adds its biases after the products are rounded
        torch.testing.assert_close(ours(*given), m(*given))
    else:
        assert torch.equal(ours(*given), m(*given))


@pytest.mark.parametrize("name", EXPERTS)
def test_each_matrix_is_an_op_that_is_fed_its_own_tokens(name):
    model = swap(nn.ModuleDict({"experts": block(name)}))
    names = [n for n, op in ops(model) if isinstance(op, Linear)]
    assert names[:3] == ["experts.0.gate_proj", "experts.0.up_proj", "experts.0.down_proj"]
    assert len(names) == 12
    assert not any(op.transposed for _, op in ops(model))
    fed = {}
    for n, op in ops(model):
        op.register_forward_pre_hook(lambda _, args, n=n: fed.update({n: args[0]}))
    x, chosen, shares = tokens()
    model["experts"](x, chosen, shares)
    for e in range(3):
        mine = {tuple(row.tolist()) for row in x[(chosen == e).any(-1)]}
        assert {tuple(row.tolist()) for row in fed[f"experts.{e}.up_proj"]} == mine
    assert not any(n.startswith("experts.3.") for n in fed)


@pytest.mark.parametrize("name", EXPERTS)
def test_they_train_as_the_fused_ones_do(name):
    m, (x, *given) = block(name), tokens()
    ours = swap(nn.ModuleList([copy.deepcopy(m)]))[0]
    for experts in (m, ours):
        experts(x, *given).square().sum().backward()
    f = ours.fused
    for p, matrices in f.parameters.items():
        joined = [f.join([getattr(e, n).weight.stored.grad for n in matrices]) for e in list(ours)[:3]]
        torch.testing.assert_close(torch.stack(joined), getattr(m, p).grad[:3])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", [(6, 5), (6,)])
def test_joining_is_the_inverse_of_splitting(layout, shape):
    parts = [torch.randn(shape) for _ in range(2)]
    whole = layout.join(parts)
    assert all(torch.equal(a, b) for a, b in zip(layout.split(whole, 2), parts, strict=True))
    assert torch.equal(layout.split(layout.join(parts[:1]), 1)[0], parts[0])


def test_the_fused_parameters_are_gone():
    model = nn.ModuleList([block("mixtral")])
    before = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in swap(model).parameters()) == before
    assert all(p.ndim == 2 for p in model.parameters())


def test_experts_work_on_the_meta_device_and_as_a_copy():
    m = swap(nn.ModuleList([block("gpt-oss").to("meta")]))
    assert all(op.weight.device.type == "meta" for _, op in ops(m))
    real = swap(nn.ModuleList([block("gpt-oss")]))
    given = tokens()
    again = copy.deepcopy(real)
    assert torch.equal(again[0](*given), real[0](*given))


@torch.no_grad()
def test_an_expert_of_codes():
    ours, given = swap(nn.ModuleList([block("mixtral")])), tokens()
    with kernels.using("reference"):
        for _, op in ops(ours):
            op.weight.store(kernels.quantize(op.weight.base(), "int8-g32"))
        coded = ours[0](*given)
        for _, op in ops(ours):
            op.weight.dequantize()
        assert torch.equal(coded, ours[0](*given))


class Odd(nn.Module):
    """Has what the decorator leaves, and a parameter more."""

    is_transposed, is_concatenated, has_gate, has_bias = False, True, True, False
    _apply_gate = staticmethod(torch.relu)

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.zeros(2, 4, 4)), nn.Parameter(torch.zeros(2, 4, 2))
        self.scale = nn.Parameter(torch.ones(4))


def test_what_computes_more_is_left_as_it_is():
    assert fused(Odd()) is None
    assert fused(nn.Linear(2, 2)) is None
    model = Odd()
    del model.scale
    assert fused(model) == Fused()
