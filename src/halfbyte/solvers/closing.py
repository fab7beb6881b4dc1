"""The weight that closes a block: it makes good what the block is fed short and loses before it. What runs before it
runs once for all that is asked of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.kernels import proxy, second_moments
from halfbyte.kernels.half import half_products
from halfbyte.qtensor import QTensor

RIDGE = 0.03  # of the mean of the diagonal of what inputs are told by, added to it


@dataclass(frozen=True)
class Part:
    """A block's outputs as they are without its closing op. fed: what that op is fed, (..., in); rest: what the block
    gives where that op adds nothing, (batch, tokens, width). half: see Call."""

    fed: Tensor
    rest: Tensor
    half: bool

    @torch.no_grad()
    def closed(self, op: nn.Module) -> Tensor:
        """The block's outputs with the closing op as it now is: (batch, tokens, width)."""
        with half_products(self.half):
            return self.rest + op(self.fed).reshape(self.rest.shape)


@torch.no_grad()
def parts(block: nn.Module, inputs: list[Any], op: nn.Module) -> list[Part]:
    """See Part, of each of a block's calls, with its other weights as they now are."""
    out: list[Part] = []
    fed: list[Tensor] = []

    def nothing(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        fed.append(args[0])
        return torch.zeros_like(y)

    handle = op.register_forward_hook(nothing)
    try:
        for call in inputs:
            rest = call(block)
            out.append(Part(fed.pop(), rest, call.half))
    finally:
        handle.remove()
    return out


@contextmanager
def seen_as(ops: Mapping[str, Any], values: Mapping[str, QTensor | Tensor]) -> Iterator[None]:
    """Those ops' weights that have values are inside these floats, or what these codes stand for."""
    weights = {name: ops[name].weight for name in values}
    floats = {name: w.stored for name, w in weights.items()}
    try:
        for name, w in weights.items():
            v = values[name]
            w.store((proxy.values(v) if isinstance(v, QTensor) else v).to(w.dtype))
        yield
    finally:
        for name, w in weights.items():
            w.store(floats[name])


@torch.no_grad()
def missing(left: list[Part], targets: list[Tensor], op: Any) -> tuple[Tensor, Tensor]:
    """What `regression` is told: sums of x x^T (in, in) of what the closing op is fed, and of e x^T (2, out, in) over
    either half of the text, e what the block's outputs are short of the targets."""
    outs, ins = op.weight.shape
    gram, short = torch.zeros(ins, ins), torch.zeros(2, outs, ins)
    for part, target in zip(left, targets, strict=True):
        e = (target - part.closed(op)).flatten(0, -2).float()
        x = part.fed.flatten(0, -2).float()
        with half_products(part.half):
            second_moments.add(gram, x)
            for total, e_half, x_half in zip(short, e.tensor_split(2), x.tensor_split(2), strict=True):
                total.addmm_(e_half.T, x_half)
    second_moments.mirror(gram)
    return gram, short


def trusted(left: list[Part], targets: list[Tensor], op: Any) -> float:
    """How much of what a block is short of the targets its closing weight would be trusted to make good."""
    return regression(*missing(left, targets, op))[1]


def regression(gram: Tensor, missing: Tensor) -> tuple[Tensor, float]:
    """Of what is missing on inputs (2, out, in), its sums with them over either half of the text: (out, in), as much of
    it as is to be trusted, and how much that is. With a ridge, which leaves float32 enough.

    That is by how much what one half says best serves the other, and so what both say, with half the noise, would
    serve. Either half's inputs are taken to have half the form of all, so that one factor does: with h = gram + d and
    c h = m, what the change c that one half asks for costs on the other's inputs, c gram c^T, is c m^T - d c c^T.
    """
    h = gram.clone()
    d = second_moments.damp(h, RIDGE)
    torch.linalg.cholesky(h, out=h)
    change = torch.cholesky_solve(missing.flatten(0, 1).T, h).T.unflatten(0, missing.shape[:2])
    gained = (change * missing.flip(0)).sum().item()
    spent = ((change * missing).sum() - d * change.square().sum()).item()
    half = min(1.0, max(0.0, gained / spent)) if spent > 0 else 0.0
    share = 2 * half / (1 + half)
    return change.sum(0).mul_(share), share
