"""HQQ: scales and zero points by half-quadratic splitting, for a sparse error instead of a small square (Badri & Shaji
2023, "Half-Quadratic Quantization of Large Machine Learning Models"). No data."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte import kernels
from halfbyte.formats import Float8, Format
from halfbyte.kernels.rounding import normalize, round_to_grid
from halfbyte.kernels.search import refit
from halfbyte.qtensor import QParams, QTensor, grid_values, grouped
from halfbyte.solvers import rtn

SAYS = "HQQ: scales and zeros for errors that are large in few places; it needs no calibration"
P = 0.7  # of the norm whose p-th power is made small
BETA, GROWTH = 10.0, 1.01  # what holds the splitting together; errors are counted in steps of the grid
ROUNDS = 20
_CHUNK = 1 << 17  # elements at a time: the temporaries stay in the cache
_log = logging.getLogger("halfbyte")


def solve(
    block: nn.Module, inputs: list[Any] | None, targets: list[Tensor] | None, sites: Mapping[str, Any]
) -> dict[str, QTensor]:
    """See halfbyte.solvers.Solve. A format that is not solved for is rounded to nearest, and the log says so."""
    out = {}
    for name, site in sites.items():
        w = site.op.weight.value()
        if (why := refuses(site.format)) is not None:
            _log.warning("%s is rounded to nearest: %s", name, why)
            out[name] = rtn.quantize(w, site.format)
        else:
            out[name] = quantize(w, site.format)
    return out


def refuses(f: Format) -> str | None:
    """Why no scales of this format are found here, in words; None if they can be."""
    if isinstance(f.grid, Float8):
        return f"{f.name} is a float type: only integers and tables are solved for"
    if isinstance(f.scale, Format) or f.scale == "float8_e8m0fnu" or f.center:
        return f"{f.name}: its scales are rounded themselves, and are no longer those that were found"
    return None


def quantize(
    w: Tensor, f: Format, p: float = P, beta: float = BETA, rounds: int = ROUNDS, start: str = "mse"
) -> QTensor:
    """w (..., out, in) rounded to nearest, with the scales and zeros of each group that make sum |w - q|^p small.
    start: the search that they come from at first, see kernels.qparams."""
    first, rows = kernels.qparams(w, f, start), grouped(w.detach(), f)
    scale, zero = first.scale.reshape(-1), None if first.zero is None else first.zero.reshape(-1)
    step = max(1, _CHUNK // max(1, rows.shape[1]))
    found = [
        _split(
            rows[i : i + step], f, scale[i : i + step], None if zero is None else zero[i : i + step], p, beta, rounds
        )
        for i in range(0, len(rows), step)
    ]
    if not found:  # an empty tensor
        return kernels.quantize(w, f, first)
    shape = first.scale.shape
    scales, zeros = (torch.cat(c).reshape(shape) if c[0] is not None else None for c in zip(*found, strict=True))
    assert scales is not None
    return kernels.quantize(w, f, QParams(scales, zeros))


def _split(
    rows: Tensor, f: Format, scale: Tensor, zero: Tensor | None, p: float, beta: float, rounds: int
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero of each of the rows (groups, n): the best of those that the splitting goes through.

    With e a stand-in for the errors, |e|^p + beta/2 |e - (w - q)|^2 is made small in turn: in e by shrinking w - q
    (generalized soft thresholding), in scale and zero by least squares of w - e on the codes.
    """
    unit = torch.where(scale == 0, 1.0, scale.abs())[:, None]
    least, best = torch.full_like(scale, torch.inf), (scale, zero)
    for _ in range(rounds):
        codes, _ = round_to_grid(normalize(rows, f, QParams(scale, zero)), f, zero)
        whole = zero[:, None] if zero is not None and f.zero == "integer" else None
        held = grid_values(codes, f, whole) * scale[:, None]
        error = (rows - (held if zero is None or whole is not None else held + zero[:, None])) / unit
        size = error.abs()
        slope = size.clamp(min=1e-6).pow(p - 1)
        loss = (size * slope).sum(1)
        better = loss < least
        if not better.any():
            break
        least = torch.where(better, loss, least)
        kept = best[1] if zero is None or best[1] is None else torch.where(better, zero, best[1])
        best = torch.where(better, scale, best[0]), kept
        target = rows - error.sign() * (size - slope / beta).clamp(min=0) * unit
        scale, zero = _fitted(target, f, codes, scale, zero)
        beta *= GROWTH
    return best


def _fitted(
    target: Tensor, f: Format, codes: Tensor, scale: Tensor, zero: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The least squares of target (groups, n) on its codes. An integer zero point is rounded, then the scale found."""
    whole = None
    if zero is not None and f.zero == "integer":
        safe = torch.where(scale == 0, 1.0, scale)[:, None]
        zero = (codes - target / safe).mean(1).round().clamp(0, (1 << f.bits) - 1)
        whole = zero[:, None]
    new, added, _ = refit(target, f, grid_values(codes, f, whole), None)
    scale = torch.where(new.isfinite() & (new != 0), new, scale)
    return scale, zero if added is None else added
