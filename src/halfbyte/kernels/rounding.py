"""Rounding to a format's grid: the step that loses something."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.formats import Float8, Format, Integers, Table
from halfbyte.qtensor import QParams


def normalize(rows: Tensor, f: Format, p: QParams) -> Tensor:
    """(groups, n) -> what is rounded: w / scale, or (w - zero) / scale. A scale of 0 gives 0."""
    scale = p.scale.reshape(-1, 1)
    if p.zero is not None and f.zero != "integer":
        rows = rows - p.zero.reshape(-1, 1)
    safe = torch.where(scale == 0, 1.0, scale)
    if isinstance(f.grid, Table) and (inverse := 1 / safe).isfinite().all():
        return torch.where(scale == 0, 0.0, rows * inverse)  # as bitsandbytes does: a division rounds otherwise
    return torch.where(scale == 0, 0.0, rows / safe)


def round_to_grid(x: Tensor, f: Format, zero: Tensor | None) -> tuple[Tensor, Tensor]:
    """Normalized (groups, n) -> uint8 codes, and where x lay inside the grid's range (bool)."""
    match f.grid:
        case Integers() as grid:
            q = x.round() + (zero.reshape(-1, 1) if zero is not None and f.zero == "integer" else grid.middle)
            return q.clamp(0, grid.top).to(torch.uint8), (q >= 0) & (q <= grid.top)
        case Table() as grid:
            bounds, order = grid.bounds.to(x.device), grid.order.to(x.device)
            if grid.lattice:
                n = grid.lattice - 1
                x = ((x.clamp(-1, 1) + 1) * 0.5 * n + 0.5).floor() * 2 / n - 1
            rank = torch.bucketize(x, bounds, out_int32=True)
            codes = torch.nn.functional.embedding(rank, order[:, None])[..., 0]
            if grid.ties == "even":
                tie = x == bounds[rank.clamp(max=len(bounds) - 1)]
                codes = torch.where(tie & (codes % 2 == 1), order[(rank + 1).clamp(max=len(order) - 1)], codes)
            return codes.to(torch.uint8), (x >= min(grid.values)) & (x <= max(grid.values))
        case Float8() as grid:
            top = grid.largest
            return x.clamp(-top, top).to(grid.dtype).view(torch.uint8), x.abs() <= top
