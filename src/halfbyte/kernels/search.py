"""Where scales and zero points come from: the one place that derives them from weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from halfbyte.errors import InputError
from halfbyte.formats import Float8, Format, Integers, Table
from halfbyte.kernels.rounding import finite, normalize, round_to_grid
from halfbyte.qtensor import QParams, grid_values, grouped

_CHUNK = 1 << 19  # elements searched at a time: the temporaries stay in the cache


def qparams(w: Tensor, f: Format, how: str | None = None, weight: Tensor | None = None) -> QParams:
    """Scale and zero point for w (..., out, in) in format f, each float32 of shape `f.groups(w.shape)`.

    how: "minmax" covers the range (the larger side of a symmetric range sits on the lowest integer, -2^(b-1),
    which is one step longer than the highest); "absmax" covers it evenly, as compressed-tensors does for
    activations; "mse" searches the least squared error, "weighted" with large weights counting more;
    "percentile-99.9" clips the outer 0.1%; None is the format's own default. weight: float (in,), the importance
    of each input's squared error, for the two searches.

    A group of zeros, or an empty tensor, gets scale 1 (0 where `Format.keeps_zero`). Raises InputError for NaN,
    infinity, or an unknown `how`.
    """
    how = how or f.search
    if not finite(w):
        raise InputError(f"cannot quantize to {f.name}: the tensor of shape {tuple(w.shape)} holds NaN or infinity.")
    shape = f.groups(tuple(w.shape))
    rows = grouped(w, f)
    if how.startswith("percentile-"):
        rows, how = _clipped(rows, how), "minmax"
    if how not in SEARCHES:
        raise InputError(f"{how!r} is no way to find scales; those are: {', '.join(SEARCHES)} and percentile-P.")
    if rows.numel() == 0:
        ones = torch.ones(shape, device=w.device)
        return QParams(ones, None if f.zero is None else torch.zeros(shape, device=w.device))
    importance = None if weight is None else grouped(weight.expand(w.shape), f)
    step = max(1, _CHUNK // rows.shape[1])
    chunks = [
        SEARCHES[how](rows[i : i + step], f, None if importance is None else importance[i : i + step])
        for i in range(0, len(rows), step)
    ]
    scale, zero = (torch.cat(c) if c[0] is not None else None for c in zip(*chunks, strict=True))
    assert scale is not None
    if not f.keeps_zero:
        scale = torch.where(scale == 0, 1.0, scale)
    if f.scale == "float8_e8m0fnu" and isinstance(f.grid, Table):
        # OCP MX 1.0, section 6.3: the exponent of the largest magnitude less that of the largest grid value
        top = torch.tensor(max(f.grid.values))
        scale = torch.exp2((scale * top).log2().floor() - top.log2().floor())
    return QParams(scale.reshape(shape), None if zero is None else zero.reshape(shape))


Found = tuple[Tensor, Tensor | None]  # (groups,) each


def _clipped(rows: Tensor, how: str) -> Tensor:
    """Clips each group's outer values to a percentile of its magnitudes, "percentile-P" with 0 < P <= 100."""
    try:
        percent = float(how.removeprefix("percentile-"))
    except ValueError:
        percent = 0.0
    if not 0 < percent <= 100:
        raise InputError(f"{how!r}: a percentile is a number above 0 and up to 100, such as percentile-99.9.")
    if rows.numel() == 0:
        return rows
    k = max(1, round(rows.shape[1] * percent / 100))
    edge = rows.abs().kthvalue(k, dim=1, keepdim=True).values
    return torch.clamp(rows, -edge, edge)


def _extreme(rows: Tensor) -> Tensor:
    """(groups, n) -> (groups,): the value of the largest magnitude, with its sign."""
    low, high = rows.aminmax(dim=1)
    return torch.where(-low > high, low, high)


def _range(rows: Tensor, f: Format) -> tuple[Tensor, Tensor]:
    """Lowest and highest of each group; with 0 between them where the zero point must be able to hold it."""
    low, high = rows.aminmax(dim=1)
    if f.zero == "integer" or isinstance(f.zero, Format):
        return low.clamp(max=0), high.clamp(min=0)
    return low, high


def _affine(low: Tensor, high: Tensor, f: Format) -> Found:
    """Scale and zero so that [low, high] covers all codes."""
    assert isinstance(f.grid, Integers)
    scale = (high - low) / f.grid.top
    if f.zero != "integer":
        return scale, low
    safe = torch.where(scale == 0, 1.0, scale)
    return scale, (-low / safe).round().clamp(0, f.grid.top)


def minmax(rows: Tensor, f: Format, weight: Tensor | None = None) -> Found:
    """The range of each group covered; for symmetric integers the larger side at the lowest integer."""
    match f.grid:
        case Integers() as grid if f.zero is None:
            side = -grid.middle if grid.signed else grid.top
            return _extreme(rows) / side, None
        case Integers():
            return _affine(*_range(rows, f), f)
        case Table() as grid:
            return rows.abs().amax(1) / max(grid.values), None
        case Float8() as grid:
            return rows.abs().amax(1) / grid.largest, None


def absmax(rows: Tensor, f: Format, weight: Tensor | None = None) -> Found:
    """Symmetric integers with both ends half a step away: scale = absmax / (2^(b-1) - 1/2)."""
    if isinstance(f.grid, Integers) and f.zero is None and f.grid.signed:
        return rows.abs().amax(1) / (f.grid.middle - 0.5), None
    return minmax(rows, f)


def restricted(rows: Tensor, f: Format, weight: Tensor | None = None) -> Found:
    """Symmetric integers without the lowest, so that both ends are covered alike: scale = absmax / (2^(b-1) - 1)."""
    if isinstance(f.grid, Integers) and f.zero is None and f.grid.signed:
        return rows.abs().amax(1) / (f.grid.middle - 1), None
    return minmax(rows, f)


def power_of_two(rows: Tensor, f: Format, weight: Tensor | None = None) -> Found:
    """As minmax, the scale raised to a power of two: exact in any float, as is its reciprocal, which some files keep.
    Of formats with a zero point, minmax itself."""
    scale, zero = minmax(rows, f)
    if zero is not None:
        return scale, zero
    mantissa, exponent = torch.frexp(scale)  # 0.5 stands for a power of two
    return torch.ldexp(mantissa.sign(), exponent - (mantissa.abs() == 0.5).int()), None


def ratios(f: Format) -> list[float]:
    """What of a group's range is tried: of both ends alike where there is no zero point, else of each end."""
    few = f.grid.bits <= 5
    if isinstance(f.grid, Integers) and f.zero is None:
        return [1.0, *(torch.linspace(0.7, 1.1, 21) if few else torch.linspace(0.9, 1.02, 7)).tolist()]
    if isinstance(f.grid, Integers):
        return [1.0, 0.95, 0.9, 0.85, 0.8, 0.72] if few else [1.0, 0.97, 0.94]
    return torch.linspace(0.8, 1.2, 21).tolist()


def _candidates(rows: Tensor, f: Format) -> Iterator[Found]:
    """Ranges to try: the whole one first, then clipped ones."""
    bits = f.grid.bits
    if isinstance(f.grid, Integers) and f.zero is None:
        full, _ = minmax(rows, f)
        ratios = torch.linspace(0.7, 1.1, 21) if bits <= 5 else torch.linspace(0.9, 1.02, 7)
        for r in (1.0, *ratios.tolist()):
            yield full * r, None
            if f.grid.signed:
                yield full * -r, None
    elif isinstance(f.grid, Integers):
        low, high = _range(rows, f)
        shrink = (1.0, 0.95, 0.9, 0.85, 0.8, 0.72) if bits <= 5 else (1.0, 0.97, 0.94)
        for a in shrink:
            for b in shrink:
                yield (
                    _affine(low * a, high * b, f)
                    if f.zero == "integer"
                    else _affine(low + (high - low) * (1 - a) / 2, high - (high - low) * (1 - b) / 2, f)
                )
    else:
        full, _ = minmax(rows, f)
        for r in torch.linspace(0.7, 1.0, 13).tolist():
            yield full * r, None


def refit(rows: Tensor, f: Format, values: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """Least squares of rows on the values that their codes stand for: scale, float zero, and the error saved.

    scale = sum(w v) / sum(v^2), and with a float zero the regression with an intercept. The error of that fit is
    sum(w^2) less what is returned, so that the largest is the best.
    """
    weighted = values if weight is None else values * weight
    vv, vw = (weighted * values).sum(1), (weighted * rows).sum(1)
    safe = torch.where(vv == 0, 1.0, vv)
    plain = vw / safe
    if f.zero is None or f.zero == "integer":
        return plain, None, vw * plain
    n = values.shape[1] if weight is None else weight.sum(1)
    v, w = weighted.sum(1), (rows if weight is None else rows * weight).sum(1)
    spread = vv - v * v / n
    slope = (vw - v * w / n) / torch.where(spread <= 0, 1.0, spread)
    zero = (w - slope * v) / n
    if isinstance(f.zero, Format):  # minima of a super-block share a sign
        slope, zero = torch.where(zero > 0, plain, slope), zero.clamp(max=0)
    return slope, zero, slope * (2 * vw - slope * vv) + zero * (2 * w - 2 * slope * v - zero * n)


def mse(rows: Tensor, f: Format, weight: Tensor | None = None) -> Found:
    """The least (weighted) squared error: codes by each candidate range, the scale then refitted to the codes.

    With the codes fixed the best scale is a least squares fit, and rounding anew with it cannot be worse.
    """
    most = torch.full((len(rows),), -torch.inf, device=rows.device)
    best_scale, best_zero = most, None if f.zero is None else most
    for scale, zero in _candidates(rows, f):
        p = QParams(scale, zero)
        codes, _ = round_to_grid(normalize(rows, f, p), f, p.zero)
        values = grid_values(codes, f, None if zero is None else zero.reshape(-1, 1))
        scale, offset, saved = refit(rows, f, values, weight)
        better = saved > most
        most = torch.where(better, saved, most)
        best_scale = torch.where(better, scale, best_scale)
        if best_zero is not None:
            new = zero if f.zero == "integer" else offset
            assert new is not None
            best_zero = torch.where(better, new, best_zero)
    return best_scale, best_zero


def weighted(rows: Tensor, f: Format, weight: Tensor | None = None) -> Found:
    """As mse, each squared error times |w|: large weights matter more than their number, and plain least squares
    clips them. The best that costs no data for symmetric integers of up to 4 bits (see benchmarks/README.md)."""
    return mse(rows, f, rows.abs() if weight is None else rows.abs() * weight)


SEARCHES: dict[str, Callable[[Tensor, Format, Tensor | None], Found]] = {
    "minmax": minmax,
    "absmax": absmax,
    "mse": mse,
    "weighted": weighted,
    "restricted": restricted,
    "power-of-two": power_of_two,
}
