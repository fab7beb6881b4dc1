"""Rounding to a format's grid and back in C++: the reference's functions, bit for bit, each one pass over memory."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from halfbyte.errors import InputError
from halfbyte.formats import Float8, Format, Integers, Table
from halfbyte.kernels import cpu, reference, search
from halfbyte.kernels.cpu import DTYPES, missing, span
from halfbyte.kernels.rounding import round_to_grid
from halfbyte.qtensor import QParams, QTensor, grid_values, pack

_cpu: Any = cpu._cpu  # None where it was not built: see refuses

_RANGES = ("minmax", "absmax")
_WEIGHTS = {"mse": "alike", "weighted": "size"}  # of squared errors, by search
_STORED = {**DTYPES, torch.float8_e8m0fnu: "float8_e8m0fnu", torch.uint8: "uint8"}


def refuses(job: str, x: Tensor | QTensor) -> str | None:
    """Why a job on x ("quantize", "qparams", "fake": a tensor; "dequantize": a QTensor) is not done here, in words."""
    if (why := missing()) is not None:
        return why
    codes = x.parts["codes"] if isinstance(x, QTensor) else x
    if not isinstance(codes, Tensor) or codes.device.type != "cpu":
        return f"the C++ kernels run on the CPU, not on {codes.device.type if isinstance(codes, Tensor) else codes}"
    if isinstance(x, QTensor) and "order" in x.parts:
        return f"{x.format.name}: codes are in another order of the inputs"
    if x.dtype not in DTYPES:
        return f"no C++ kernel does {job} in {str(x.dtype).removeprefix('torch.')}"
    return None


def _zero(f: Format) -> str | None:
    return "integer" if f.zero == "integer" else None if f.zero is None else "added"


@lru_cache(maxsize=256)
def _grid(f: Format) -> Any:
    codes = torch.arange(1 << f.bits)
    zero = _zero(f)
    match f.grid:
        case Integers() as grid:
            values = codes.float() - (0 if zero == "integer" else grid.middle)
            return _cpu.Grid.integers(f.bits, grid.middle, values.tolist(), zero)
        case Float8() as grid:
            values = grid_values(codes.to(torch.uint8), f).tolist()
            return _cpu.Grid.float8(3 if grid.dtype == torch.float8_e4m3fn else 2, grid.largest, values, zero)
        case Table() as grid:
            bounds, order, lattice = grid.bounds, grid.order.to(torch.uint8), torch.empty(0, dtype=torch.uint8)
            if grid.ties == "even":  # halfway above an odd code is no longer its own
                lower = torch.nextafter(bounds, torch.tensor(-torch.inf))
                bounds = torch.where(order[:-1] % 2 == 1, lower, bounds)
            if grid.lattice:
                points = torch.arange(grid.lattice).float() * 2 / (grid.lattice - 1) - 1
                nearest, _ = round_to_grid(points, replace(f, grid=replace(grid, lattice=0)), None)
                lattice = nearest.to(torch.uint8)
            return _cpu.Grid.table(
                bits=f.bits, low=min(grid.values), high=max(grid.values), values=list(grid.values),
                bounds=bounds.tolist(), order=order.tolist(), lattice=span(lattice), zero=zero,
            )  # fmt: skip


def _group(f: Format, shape: tuple[int, ...]) -> int:
    """Neighbours in the flattened tensor that share a scale."""
    return max(1, f.group if isinstance(f.group, int) else shape[-1] if f.group == "channel" else prod(shape))


def _rows(f: Format, shape: tuple[int, ...]) -> tuple[int, int]:
    """Of the tensor as its codes are packed: each row begins a byte."""
    return (1, prod(shape)) if f.flat or not shape else (prod(shape[:-1]), shape[-1])


def _plain(part: Tensor | QTensor | None) -> Tensor | None:
    """A part as the kernels read it; None stays None."""
    if part is None:
        return None
    t = dequantize(part) if isinstance(part, QTensor) else part.detach()
    return (t if t.dtype in _STORED else t.float()).contiguous()


def _typed(t: Tensor | None) -> tuple[str, tuple[int, int]] | None:
    return None if t is None else (_STORED[t.dtype], span(t))


def finds(f: Format, how: str) -> bool:
    """Whether a search of qparams is done here: ranges, and least squares of integers and of tables of exact steps."""
    if how in _RANGES:
        return True
    table = isinstance(f.grid, Table) and f.bits == 4 and all(v * 2 == int(v * 2) for v in f.grid.values)
    plain = not f.flat and f.group != "tensor" and f.scale != "float8_e8m0fnu"
    if isinstance(f.scale, Format):  # super-blocks of integers
        plain = isinstance(f.scale.grid, Integers) and isinstance(f.scale.group, int) and f.scale.group <= 16
    return how in _WEIGHTS and plain and (isinstance(f.grid, Integers) or table)


def qparams(w: Tensor, f: Format, how: str | None = None, weight: Tensor | None = None) -> QParams:
    """See halfbyte.kernels.search.qparams; for searches that `finds` tells of."""
    how = how or f.search
    if w.numel() == 0:
        return search.qparams(w, f, how)
    return fit(w, f, _WEIGHTS[how], weight) if how in _WEIGHTS else _range(w, f, how)


def _range(w: Tensor, f: Format, how: str) -> QParams:
    shape, w, zero = f.groups(tuple(w.shape)), w.detach().contiguous(), _zero(f)
    widen = zero == "integer" or isinstance(f.zero, Format)
    match f.grid:
        case Integers() as grid if zero is not None:
            of, side = "range", grid.top
        case Integers() as grid if how == "absmax" and grid.signed:
            of, side = "magnitude", grid.middle - 0.5
        case Integers() as grid:
            of, side = "extreme", -grid.middle if grid.signed else grid.top
        case Table() as grid:
            of, side = "magnitude", max(grid.values)
        case Float8() as grid:
            of, side = "magnitude", grid.largest
    scale = torch.empty(shape)
    zeros = torch.empty(shape) if of == "range" else None
    finite = _cpu.search(
        of, w.numel(), _group(f, tuple(w.shape)), _typed(w), side, widen, f.keeps_zero, span(scale),
        None if zeros is None else zero, None if zeros is None else span(zeros), torch.get_num_threads(),
    )  # fmt: skip
    if not finite:
        raise InputError(f"cannot quantize to {f.name}: the tensor of shape {tuple(w.shape)} holds NaN or infinity.")
    if f.scale == "float8_e8m0fnu" and isinstance(f.grid, Table):  # a power of two, as in search.qparams
        top = torch.tensor(max(f.grid.values))
        scale = torch.exp2((scale * top).log2().floor() - top.log2().floor())
    return QParams(scale, zeros)


def fit(w: Tensor, f: Format, weigh: str, importance: Tensor | None = None) -> QParams:
    """Scales by the least squared error, each times |w| where `weigh` is "size", and times the importance
    (in,) of its input.

    Of a format whose scales are integers of a super-block, these are chosen too (`QParams.stored`).
    """
    shape, w = f.groups(tuple(w.shape)), w.detach().contiguous()
    zero, inner = _zero(f), f.scale if isinstance(f.scale, Format) else None
    together = int(inner.group) if inner is not None else 0
    blocks = (*shape[:-1], shape[-1] // together) if together else shape
    scale, zeros = torch.empty(blocks), None if zero is None else torch.empty(blocks)
    codes = [torch.empty(shape, dtype=torch.uint8) if together and part else None for part in (True, zero is not None)]
    if importance is not None:
        importance = importance.detach().float().contiguous()
    spans = [None if t is None else span(t) for t in (importance, scale, zeros, *codes)]
    finite = _cpu.fit(
        grid=_grid(f), n=w.numel(), group=_group(f, tuple(w.shape)), x=_typed(w), weigh=weigh,
        ratios=search.ratios(f), both_signs=zero is None and not (isinstance(f.grid, Integers) and not f.grid.signed),
        widen=zero == "integer" or inner is not None, negative=inner is not None, keep_zero=f.keeps_zero,
        importance=spans[0], cols=w.shape[-1], scale=spans[1], zero=spans[2],
        inner=None if inner is None else _grid(inner), together=together, scale_codes=spans[3], zero_codes=spans[4],
        threads=torch.get_num_threads(),
    )  # fmt: skip
    if not finite:
        raise InputError(f"cannot quantize to {f.name}: the tensor of shape {tuple(w.shape)} holds NaN or infinity.")
    if inner is None:
        return QParams(scale, zeros)

    stored: dict[str, QTensor] = {}
    for name, how, held, factor in (("scale", f.scale, codes[0], scale), ("zero", f.zero, codes[1], zeros)):
        if held is not None and factor is not None:
            assert isinstance(how, Format)
            parts: dict[str, Tensor | QTensor] = {"codes": pack(held, how.bits), "scale": factor.half()}
            stored[name] = QTensor(how, shape, torch.float32, parts)
    values = {name: dequantize(q) for name, q in stored.items()}
    return QParams(values["scale"], values.get("zero"), stored)


def solve(
    f: Format, w: Tensor, m: Tensor, group: Tensor, scale: Tensor, zero: Tensor | None, codes: Tensor, passes: int
) -> None:
    """Codes, uint8 (rows, cols), as proxy.in_order (no passes) or proxy.descend finds them: w float32 (rows, cols),
    with passes the gradient (q - w) H instead, which becomes that of the codes found, m (cols, cols), group int32
    (cols,), scale and zero (rows, groups), all contiguous."""
    _cpu.solve(
        grid=_grid(f), rows=w.shape[0], cols=w.shape[1], groups=scale.shape[1], w=span(w), m=span(m), group=span(group),
        scale=span(scale), zero=None if zero is None else span(zero), codes=span(codes), passes=passes,
        threads=torch.get_num_threads(),
    )  # fmt: skip


def _found(w: Tensor, f: Format) -> QParams:
    return qparams(w, f) if finds(f, f.search) else search.qparams(w, f)


def quantize(w: Tensor, f: Format, p: QParams | None = None) -> QTensor:
    """See halfbyte.kernels.quantize."""
    w, shape = w.detach(), tuple(w.shape)
    offset: dict[str, Tensor | QTensor] = {}
    if f.center:
        mean = w.float().mean() if w.numel() else torch.zeros(())
        w, offset = w - mean, {"offset": mean}
    p = p or _found(w, f)
    parts, w = reference.store_qparams(p, f, w.dtype, quantize), w.contiguous()
    scale, zero = _plain(p.scale if f.flat else parts["scale"]), _plain(parts.get("zero"))
    rows, cols = _rows(f, shape)
    n = -(-cols * f.bits // 8)
    codes = torch.empty((n,) if f.flat else (*shape[:-1], n)[: max(1, len(shape))], dtype=torch.uint8)
    _cpu.quantize(
        _grid(f), rows, cols, _group(f, shape), _typed(w), _typed(scale), _typed(zero), span(codes),
        torch.get_num_threads(),
    )  # fmt: skip
    return QTensor(f, shape, w.dtype, {"codes": codes if shape or f.flat else codes.reshape(()), **parts, **offset})


def dequantize(q: QTensor, out: Tensor | None = None) -> Tensor:
    """See halfbyte.kernels.dequantize. out: written instead of new memory, whose first touch may cost more than all
    else; contiguous and of q's shape, and its dtype is the one that is rounded to."""
    q.canonical()
    f, shape = q.format, q.shape
    if out is None:
        out = torch.empty(shape, dtype=q.dtype)
    elif tuple(out.shape) != shape or not out.is_contiguous() or out.dtype not in DTYPES or out.device.type != "cpu":
        raise InputError(f"out must be a contiguous float tensor of shape {shape} on the CPU.")
    codes, scale, zero = _plain(q.parts["codes"]), _plain(q.parts["scale"]), _plain(q.parts.get("zero"))
    assert codes is not None
    offset = q.parts.get("offset")
    _cpu.dequantize(
        _grid(f), *_rows(f, shape), _group(f, shape), span(codes), _typed(scale), _typed(zero),
        None if offset is None else float(offset), _typed(out), torch.get_num_threads(),  # pyright: ignore
    )  # fmt: skip
    return out


def _rounded(w: Tensor, f: Format, p: QParams, mask: Tensor | None) -> Tensor:
    """w rounded; mask gets a bit an element, whether it lay inside the grid's range."""
    parts, w = reference.store_qparams(p, f, w.dtype, quantize), w.contiguous()
    scale, zero = _plain(parts["scale"]), _plain(parts.get("zero"))
    divisor, out = _plain(p.scale) if f.flat else scale, torch.empty_like(w)
    _cpu.fake(
        _grid(f), w.numel(), _group(f, tuple(w.shape)), _typed(w), _typed(divisor), _typed(scale),
        _typed(zero), span(out), None if mask is None else span(mask), torch.get_num_threads(),
    )  # fmt: skip
    return out


class _Fake(torch.autograd.Function):
    """Straight through where w lay inside the range. Keeps one bit an element."""

    @staticmethod
    def forward(ctx, w: Tensor, f: Format, p: QParams) -> Tensor:
        mask = torch.empty(-(-w.numel() // 8), dtype=torch.uint8)
        ctx.save_for_backward(mask)
        return _rounded(w, f, p, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (mask,) = ctx.saved_tensors
        grad = grad.contiguous()
        dw = torch.empty_like(grad)
        _cpu.fake_grad(grad.numel(), _typed(grad), span(mask), span(dw), torch.get_num_threads())
        return dw, None, None


def fake(w: Tensor, f: Format, p: QParams | None = None) -> Tensor:
    """See halfbyte.kernels.fake. Scales that are learned are the reference's business."""
    p = p or _found(w.detach(), f)
    if torch.is_grad_enabled():
        if p.scale.requires_grad or (p.zero is not None and p.zero.requires_grad):
            return reference.fake(w, f, p)
        if w.requires_grad:
            return _Fake.apply(w, f, p)  # pyright: ignore[reportReturnType]
    return _rounded(w.detach(), f, p, None)
