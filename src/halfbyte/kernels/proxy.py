"""Rounding that minimizes a quadratic form of its errors, row by row: (w - q) H (w - q)^T, the "proxy loss" of a layer
whose inputs have the second moments H (arXiv:2210.17323, equation 1). C++ where it serves, else torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from halfbyte.errors import InputError
from halfbyte.formats import Float8, Format, Table
from halfbyte.kernels import cpu, elementwise, reference
from halfbyte.kernels.rounding import round_to_grid
from halfbyte.qtensor import QParams, QTensor, grid_values, pack

_INSIDE = 0.98  # of a cell: its edges are rounded to either side


def refuses(f: Format, shape: tuple[int, ...]) -> str | None:
    """Why no codes of this format are found here, in words; None if they can be."""
    if isinstance(f.grid, Float8):
        return f"{f.name} is a float type: only integers and tables are solved for"
    if f.center or len(shape) != 2:
        return f"{f.name}: only matrices are solved for"
    if f.flat and isinstance(f.group, int) and shape[1] % f.group:
        return f"{f.name}: a group of {f.group} runs over the ends of rows of {shape[1]}"
    return None


def in_order(w: Tensor, f: Format, p: QParams, factor: Tensor, order: Tensor) -> QTensor:
    """Rounds the columns of w (out, in) one after the other, each one's error made good by those that follow: GPTQ
    (arXiv:2210.17323, algorithm 1), with scales that are fixed beforehand, so that any order leaves the file as it is.

    factor: float32 (in, in), lower, L with L L^T = H^-1, both in the order of columns that `order` (in,) gives.
    """
    q = _held(w, f, p)
    codes = torch.empty(w.shape, dtype=torch.uint8)
    _solve(q, w.float()[:, order], factor, _groups(f, w.shape[1])[order], codes, 0)
    return with_codes(q, codes[:, order.argsort()])


def descend(w: Tensor, q: QTensor, h: Tensor, passes: int = 8) -> tuple[QTensor, Tensor]:
    """q with each code moved to the best there is while the row's others stay, columns in turn, until nothing changes
    or for so many passes: coordinate descent on the proxy loss, which never rises. And the loss's gradient there,
    halved, (q - w) H, float32 (out, in). w (out, in), h float32 (in, in)."""
    codes, gradient = q.codes.clone(), (values(q) - w.float()) @ h
    _solve(q, gradient, h, _groups(q.format, w.shape[1]), codes, passes)
    return with_codes(q, codes), gradient


def with_qparams(q: QTensor, p: QParams) -> QTensor:
    """q's codes with other scales."""
    return QTensor(
        q.format, q.shape, q.dtype, {"codes": q.parts["codes"], **reference.store_qparams(p, q.format, q.dtype)}
    )


def loss(w: Tensor, q: QTensor, h: Tensor) -> Tensor:
    """The proxy loss of every row, float32 (out,)."""
    error = w.float() - values(q)
    return ((error @ h) * error).sum(1)


def values(q: QTensor) -> Tensor:
    """What q stands for, float32: not rounded to its source's dtype."""
    return QTensor(q.format, q.shape, torch.float32, q.parts).dequantize()


def _cells(v: Tensor, f: Format) -> tuple[Tensor, Tensor, float]:
    """Of grid values: from where to where numbers are rounded to them, a little inside; and the grid's mean step."""
    if isinstance(f.grid, Table):
        values = f.grid.codebook.unique()
        middles = (values[1:] + values[:-1]) / 2
        at = torch.searchsorted(values, v)
        low, high = torch.cat((values[:1], middles))[at], torch.cat((middles, values[-1:]))[at]
        return v + _INSIDE * (low - v), v + _INSIDE * (high - v), float(values[-1] - values[0]) / (len(values) - 1)
    return v - _INSIDE / 2, v + _INSIDE / 2, 1.0


def inside(w: Tensor, q: QTensor) -> tuple[Tensor, float]:
    """The numbers nearest to w (out, in) of all that are rounded to q's codes, in units of q's scales, float32
    (groups, n); and the mean step between codes."""
    p, f = q.qparams, q.format
    scale = p.scale.float().reshape(-1, 1)
    zero = None if p.zero is None else p.zero.float().reshape(-1, 1)
    whole, added = (zero, 0.0) if f.zero == "integer" else (None, 0.0 if zero is None else zero)
    low, high, step = _cells(grid_values(q.codes.reshape(len(scale), -1), f, whole), f)
    x = (w.float().reshape(len(scale), -1) - added) / torch.where(scale == 0, torch.inf, scale)
    return torch.minimum(torch.maximum(x, low), high), step


def mirrored(w: Tensor, q: QTensor) -> Tensor:
    """w (out, in) where it is rounded to q's codes; else w mirrored at the border of its code's cell, to the code's
    value at most: float32 (out, in), as far from the border as w is."""
    x, p = inside(w, q)[0], q.qparams
    added = 0.0 if p.zero is None or q.format.zero == "integer" else p.zero.float().reshape(-1, 1)
    nearest = (x * p.scale.float().reshape(-1, 1) + added).reshape(w.shape)
    value = q.dequantize().float()
    border = value + (nearest - value) / _INSIDE  # of those that lie beyond; of others it is beyond them
    back = torch.where((w - border).abs() < (value - border).abs(), 2 * border - w, value)
    return torch.where((w - value).abs() < (border - value).abs(), w.float(), back)


def _held(w: Tensor, f: Format, p: QParams) -> QTensor:
    """A QTensor with the scales as they are stored, and no codes yet."""
    if (why := refuses(f, tuple(w.shape))) is not None:
        raise InputError(f"{why}.")
    return QTensor(f, tuple(w.shape), w.dtype, reference.store_qparams(p, f, w.dtype))


def with_codes(q: QTensor, codes: Tensor) -> QTensor:
    """q's scales with other codes, uint8 of q's shape."""
    packed = pack(codes.reshape(-1) if q.format.flat else codes, q.format.bits)
    return QTensor(q.format, q.shape, q.dtype, {"codes": packed, **{k: v for k, v in q.parts.items() if k != "codes"}})


def _groups(f: Format, inputs: int) -> Tensor:
    """int32 (in,): the group of each column, within a row."""
    size = f.group if isinstance(f.group, int) else inputs
    return torch.arange(inputs, dtype=torch.int32) // max(1, size)


def _solve(q: QTensor, w: Tensor, m: Tensor, group: Tensor, codes: Tensor, passes: int) -> None:
    """Writes `codes`. w: with passes over codes that are there, the gradient (q - w) H, which then is that of those
    found; it is contiguous."""
    out, f = w.shape[0], q.format
    p = q.qparams
    scale, zero = (None if t is None else t.float().reshape(-1) for t in (p.scale, p.zero))
    assert scale is not None
    if f.group == "tensor":
        scale, zero = (None if t is None else t.expand(out) for t in (scale, zero))
    scale, zero = (None if t is None else t.reshape(out, -1).contiguous() for t in (scale, zero))
    assert scale is not None
    if cpu.on and elementwise.refuses("quantize", w) is None and m.device.type == "cpu":
        w, m, group = w.contiguous(), m.float().contiguous(), group.contiguous()
        elementwise.solve(f, w, m, group, scale, zero, codes, passes)
    else:
        _reference(f, w, m.float(), group.long(), scale, zero, codes, passes)


def _reference(
    f: Format, w: Tensor, m: Tensor, group: Tensor, scale: Tensor, zero: Tensor | None, codes: Tensor, passes: int
) -> None:
    def column(j: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """How the column's numbers are rounded to codes, and what these stand for."""
        s, z = scale[:, group[j]], None if zero is None else zero[:, group[j]]
        added = z is not None and f.zero != "integer"
        inverse = torch.where(s == 0, 0.0, 1 / s)
        whole = None if z is None or added else z[:, None]

        def code(x: Tensor) -> Tensor:
            x = (x - z if added and z is not None else x) * inverse
            return round_to_grid(x[:, None], f, whole)[0][:, 0].to(torch.uint8)

        def value(c: Tensor) -> Tensor:
            v = grid_values(c[:, None], f, whole)[:, 0] * s
            return v + z if added and z is not None else v

        return code, value

    columns = [column(j) for j in range(w.shape[1])]
    if passes == 0:
        w = w.clone()
        for j, (code, value) in enumerate(columns):
            codes[:, j] = code(w[:, j])
            error = (w[:, j] - value(codes[:, j])) / m[j, j]
            w[:, j + 1 :] -= error[:, None] * m[j + 1 :, j]
        return
    held = torch.stack([value(codes[:, j]) for j, (_, value) in enumerate(columns)], 1)
    gradient = w
    for _ in range(passes):
        before = codes.clone()
        for j, (code, value) in enumerate(columns):
            if m[j, j] <= 0:
                continue
            now = code(held[:, j] - gradient[:, j] / m[j, j])
            change = value(now) - held[:, j]
            gradient += change[:, None] * m[j]
            held[:, j] += change
            codes[:, j] = now
        if torch.equal(before, codes):
            return
