"""Choosing scales of channels: of some candidates the one with which a layer's outputs are off by the least once its
weights, and its inputs, are rounded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from halfbyte import kernels
from halfbyte.formats import Format
from halfbyte.scheme import static
from halfbyte.transforms import folding

if TYPE_CHECKING:
    from halfbyte.models import Edge, Edges
    from halfbyte.transforms import Fed, Target

Candidates = Callable[["Edge", "Fed"], dict[float, Tensor]]


def choose(
    model: nn.Module, edges: Edges, fed: Mapping[str, Fed], targets: Mapping[str, Target], candidates: Candidates,
    inputs: bool,
) -> dict[str, Any]:  # fmt: skip
    """Scales every edge inside of the blocks whose readers are to be quantized, by the best of its candidates and none.
    candidates: what they were made by -> scales float64 (channels,), of any mean. inputs: whether those are rounded
    too. Gives back how many edges were scaled, and the mean of what the scales were made by."""
    chosen = []
    for edge in (e for block in edges.blocks for e in block):
        readers, x = [n for n in edge.readers if n in targets], fed.get(edge.readers[0])
        if not readers or x is None:
            continue
        tried = {None: torch.ones(_channels(edge, x), dtype=torch.float64)}
        tried |= {a: _level(s) for a, s in candidates(edge, x).items()}
        errors = {a: sum(_error(model, n, edge, s, x, targets[n], inputs) for n in readers) for a, s in tried.items()}
        best = min(tried, key=lambda a: errors[a])
        if best is not None:
            folding.scale(model, edge, tried[best], edges.centered)
            chosen.append(best)
    return {"scaled": len(chosen), "alpha": round(sum(chosen) / max(1, len(chosen)), 3)}


def by_channel(edge: Edge, values: Tensor, how: str) -> Tensor:
    """Values of a reader's inputs (in,) -> of channels: the mean or the largest ("amax") of the inputs that are one."""
    if edge.columns is None:
        return values
    out = values.new_zeros(int(edge.columns.max()) + 1)
    return out.scatter_reduce(0, edge.columns, values, how, include_self=False)


def _channels(edge: Edge, x: Fed) -> int:
    return x.rows.shape[1] if edge.columns is None else int(edge.columns.max()) + 1


def _level(s: Tensor) -> Tensor:
    """Scales with a geometric mean of 1, so that weights keep their order of magnitude; 1 for a channel that is 0 or
    meets nothing but zeros."""
    usable = s.isfinite() & (s > 0)
    level = s[usable].log().mean().exp() if usable.any() else 1.0
    return torch.where(usable, s / level, 1.0)


def _error(model: nn.Module, name: str, edge: Edge, s: Tensor, x: Fed, to: Target, inputs: bool) -> float:
    """The mean square of what an op's outputs are off by, with channels scaled by s and then rounded."""
    by = (s if edge.columns is None else s[edge.columns]).float()
    w, rows = folding.matrix(model, name).float(), x.rows.float()
    scaled = w * by
    squares = (rows / by).square().mean(0)
    rounded = kernels.fake(scaled, to.weight, kernels.qparams(scaled, to.weight, "mse", squares))
    given = rows / by
    if inputs and to.input is not None:
        given = _rounded(given, to.input, float((x.largest / by).max()))
    return float((given @ rounded.T - rows @ w.T).square().sum(1).mean())


def _rounded(x: Tensor, f: Format, largest: float) -> Tensor:
    """Inputs as they will be rounded: by each token's scale, or all by the one that covers the largest."""
    if not static(f):
        return kernels.fake(x, f, kernels.qparams(x, f, "absmax"))
    return kernels.fake(x, f, kernels.qparams(torch.tensor([-largest, largest]), f, "absmax"))
