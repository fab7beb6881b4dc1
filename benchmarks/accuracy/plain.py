"""GPTQ as its paper has it (arXiv:2210.17323, algorithm 1) and no more, in torch: what ours is timed beside. Columns go
by the size of the Hessian's diagonal, in groups whose scales are fixed beforehand; all is computed in float32."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

DAMPING, COLUMNS = 0.01, 128


class _Reached(Exception):
    pass


@torch.no_grad()
def quantize(model: nn.Module, batches: list[dict[str, Tensor]], bits: int, group: int) -> None:
    """The weights of the linear layers of model.model.layers become what their codes stand for, block after block, each
    fed with what the quantized ones before it give."""
    layers: Any = model.model.layers
    states, kwargs = _first(model, layers[0], batches)
    for block in layers:
        linears = [m for m in block.modules() if isinstance(m, nn.Linear)]
        hessians = {m: torch.zeros(m.in_features, m.in_features) for m in linears}

        def add(m: nn.Module, args: tuple[Tensor], hessians: dict = hessians) -> None:
            x = args[0].flatten(0, -2)
            hessians[m] += x.T @ x

        handles = [m.register_forward_pre_hook(add) for m in linears]
        for x, kw in zip(states, kwargs, strict=True):
            block(x, **kw)
        for handle in handles:
            handle.remove()
        for m in linears:
            m.weight.copy_(rounded(m.weight, hessians[m], bits, group))
        states = [block(x, **kw) for x, kw in zip(states, kwargs, strict=True)]


def _first(model: nn.Module, block: nn.Module, batches: list[dict[str, Tensor]]) -> tuple[list[Tensor], list[dict]]:
    """What the first block is called with."""
    states, kwargs = [], []

    def keep(m: nn.Module, args: tuple[Tensor], kw: dict[str, Any]) -> None:
        states.append(args[0])
        kwargs.append(kw)
        raise _Reached

    handle = block.register_forward_pre_hook(keep, with_kwargs=True)
    for batch in batches:
        with suppress(_Reached):
            model(**batch, use_cache=False)
    handle.remove()
    return states, kwargs


def rounded(weight: Tensor, h: Tensor, bits: int, group: int) -> Tensor:
    """weight (out, in) on the grid of symmetric integers. h (in, in): the sums of x x^T."""
    top, inputs = 2 ** (bits - 1) - 1, weight.shape[1]
    scale = weight.unflatten(1, (-1, group)).abs().amax(2).clamp(min=1e-8) / top
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    order = h.diagonal().argsort(descending=True)
    w, scale = weight[:, order], scale[:, order // group]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h[order][:, order]))
    factor = torch.linalg.cholesky(inverse, upper=True)
    out = torch.empty_like(w)
    for start in range(0, inputs, COLUMNS):
        end = min(start + COLUMNS, inputs)
        errors = torch.empty(len(w), end - start)
        for i in range(start, end):
            out[:, i] = (w[:, i] / scale[:, i]).round().clamp(-top - 1, top) * scale[:, i]
            errors[:, i - start] = (w[:, i] - out[:, i]) / factor[i, i]
            w[:, i:end] -= errors[:, i - start, None] * factor[i, i:end]
        w[:, end:] -= errors @ factor[start:end, end:]
    return out[:, order.argsort()]
