"""Rounding to a format's grid: the step that loses something."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.formats import Float8, Format, Integers, Table
from halfbyte.qtensor import QParams


def finite(w: Tensor) -> bool:
    """Whether w holds neither NaN nor infinity. The sum is one fast pass that catches both, in w's own dtype thirty
    times as fast as in another; only where it is not finite is the slow look needed."""
    return bool(w.sum().isfinite()) or bool(w.isfinite().all())


def normalize(rows: Tensor, f: Format, p: QParams) -> Tensor:
    """(groups, n) -> what is rounded: w / scale, or (w - zero) / scale. A scale of 0 gives 0."""
    scale = p.scale.reshape(-1, 1)
    if p.zero is not None and f.zero != "integer":
        rows = rows - p.zero.reshape(-1, 1)
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    if isinstance(f.grid, Table) and inverse.isfinite().all():
        return rows * inverse  # as bitsandbytes does: a division rounds otherwise
    return rows / torch.where(scale == 0, torch.inf, scale)


def round_to_grid(x: Tensor, f: Format, zero: Tensor | None) -> tuple[Tensor, Tensor]:
    """Normalized (groups, n) -> codes, and where x lay inside the grid's range (bool).

    Codes are whole numbers in whatever dtype they came about: the caller that keeps them makes them uint8, and
    the one that only wants their values (training, every step) saves that pass.
    """
    match f.grid:
        case Integers() as grid:
            q = x.round() + (zero.reshape(-1, 1) if zero is not None and f.zero == "integer" else grid.middle)
            codes = q.clamp(0, grid.top)
            return codes, q == codes
        case Table() as grid:
            return _nearest(x, grid), (x >= min(grid.values)) & (x <= max(grid.values))
        case Float8() as grid:
            top = grid.largest
            return x.clamp(-top, top).to(grid.dtype).view(torch.uint8), x.abs() <= top


def _nearest(x: Tensor, grid: Table) -> Tensor:
    """Codes of the nearest values, int64."""
    bounds, order = grid.bounds.to(x.device), grid.order.to(x.device)
    if grid.lattice:
        n = grid.lattice - 1
        x = ((x.clamp(-1, 1) + 1) * 0.5 * n + 0.5).floor() * 2 / n - 1
    rank = torch.bucketize(x, bounds, out_int32=True)
    codes = order.index_select(0, rank.reshape(-1)).reshape(rank.shape)
    if grid.ties == "even":
        tie = x == bounds[rank.clamp(max=len(bounds) - 1)]
        codes = torch.where(tie & (codes % 2 == 1), order[(rank + 1).clamp(max=len(order) - 1)], codes)
    return codes
