"""A weight whose outputs are added to what a block is: it makes good what the block is fed short and loses before it.
What runs before it runs once for all that is asked of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.kernels import proxy, second_moments
from halfbyte.kernels.half import half_products
from halfbyte.qtensor import QTensor
from halfbyte.solvers.form import Form


@dataclass(frozen=True)
class Part:
    """What a block is without an op that adds to it, on one call. fed: what that op is fed, (..., in); rest: what the
    block gives where that op adds nothing, or what there is to be added to, (batch, tokens, width). half: see Call."""

    fed: Tensor
    rest: Tensor
    half: bool

    @torch.no_grad()
    def closed(self, op: nn.Module) -> Tensor:
        """The block's outputs with the closing op as it now is: (batch, tokens, width)."""
        with half_products(self.half):
            return self.rest + op(self.fed).reshape(self.rest.shape)


@contextmanager
def silent(op: Any) -> Iterator[list[Tensor]]:
    """Inside, a linear op gives zeros and multiplies nothing. What it was fed, call by call."""
    fed: list[Tensor] = []

    def forward(x: Tensor) -> Tensor:
        fed.append(x)
        return x.new_zeros(*x.shape[:-1], op.weight.shape[0])

    op.forward = forward
    try:
        yield fed
    finally:
        del op.forward


@contextmanager
def adding(ops: list[Any]) -> Iterator[list[list[Tensor]]]:
    """What each of the ops gives inside, call by call, whatever is added to it in place."""
    gave: list[list[Tensor]] = [[] for _ in ops]
    with ExitStack() as stack:
        for op, kept in zip(ops, gave, strict=True):
            stack.callback(op.register_forward_hook(lambda m, args, y, kept=kept: kept.append(y.clone())).remove)
        yield gave


@torch.no_grad()
def parts(block: nn.Module, inputs: list[Any], op: nn.Module) -> list[Part]:
    """See Part, of each of a block's calls, with its other weights as they now are."""
    with silent(op) as fed:
        rest = [call(block) for call in inputs]
    return [Part(x, y, call.half) for x, y, call in zip(fed, rest, inputs, strict=True)]


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
def missing(left: list[Part], targets: list[Tensor], op: Any, name: str = "a weight") -> tuple[Form, Tensor]:
    """What `regression` is told: the form of what the closing op is fed, and the sums of e x^T (2, out, in) over either
    half of the text, by all of its tokens, where e is what the block's outputs are short of the targets."""
    outs, ins = op.weight.shape
    gram, short = torch.zeros(ins, ins), torch.zeros(2, outs, ins)
    for part, target in zip(left, targets, strict=True):
        e = (target - part.closed(op)).flatten(0, -2).float()
        x = part.fed.flatten(0, -2).float()
        with half_products(part.half):
            second_moments.add(gram, x)
            for total, e_half, x_half in zip(short, e.tensor_split(2), x.tensor_split(2), strict=True):
                total.addmm_(e_half.T, x_half)
    tokens = sum(t.shape[:-1].numel() for t in targets)
    return Form.taking(second_moments.mirror(gram).div_(tokens), name), short.div_(tokens)


def trusted(left: list[Part], targets: list[Tensor], op: Any) -> float:
    """How much of what a block is short of the targets its closing weight would be trusted to make good."""
    return regression(*missing(left, targets, op), left[0].half)[1]


def regression(form: Form, missing: Tensor, half: bool = False) -> tuple[Tensor, float]:
    """Of what is missing on inputs (2, out, in), its sums with them over either half of the text, by all of it: (out,
    in), as much of it as is to be trusted, and how much that is. half: whether products are in bfloat16.

    That is by how much what one half says best serves the other, and so what both say, with half the noise, would
    serve. Either half's inputs are taken to have half the form of all, so that one factor does: with h = gram + d and
    c h = m, what the change c that one half asks for costs on the other's inputs, c gram c^T, is c m^T - d c c^T.
    """
    with half_products(half):
        change = form.solved(missing)
    gained = (change * missing.flip(0)).sum().item()
    spent = ((change * missing).sum() - form.damping * change.square().sum()).item()
    agreed = min(1.0, max(0.0, gained / spent)) if spent > 0 else 0.0
    share = 2 * agreed / (1 + agreed)
    return change.sum(0).mul_(share), share
