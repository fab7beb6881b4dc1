"""The arithmetic that every kernel is held against, in plain torch. Slow, exact, on any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte.formats import SOURCE, Format, Integers
from halfbyte.kernels.rounding import normalize, round_to_grid
from halfbyte.kernels.search import qparams
from halfbyte.qtensor import QParams, QTensor, decode, grid_values, grouped, pack, ungrouped

Quantize = Callable[[Tensor, Format], QTensor]


def _store(values: Tensor, how: str | Format, dtype: torch.dtype, quantize: Quantize) -> Tensor | QTensor:
    """A matrix of scales or zeros -> the part that is kept."""
    if isinstance(how, Format):
        return quantize(values.detach().float(), how)
    to = dtype if how == SOURCE else getattr(torch, how)
    top = torch.finfo(to).max
    return values.detach().clamp(-top, top).to(to)


def store_qparams(
    p: QParams, f: Format, dtype: torch.dtype, quantize: Quantize | None = None
) -> dict[str, Tensor | QTensor]:
    """QParams -> the parts "scale" and "zero" of a QTensor whose source has this dtype. quantize: what makes codes of
    scales that are themselves quantized; this module's, unless another is given."""
    if p.stored is not None:
        return dict(p.stored)
    quantize = quantize or _quantize
    parts: dict[str, Tensor | QTensor] = {"scale": _store(p.scale, f.scale, dtype, quantize)}
    if f.zero == "integer":
        assert p.zero is not None
        assert isinstance(f.grid, Integers)
        parts["zero"] = p.zero.detach().round().clamp(0, f.grid.top).to(torch.uint8)
    elif f.zero is not None:
        assert p.zero is not None
        parts["zero"] = _store(p.zero, f.zero, dtype, quantize)
    return parts


class Rounded(NamedTuple):
    """Each (groups, n): what was rounded, its codes (whole numbers), and where it lay inside the grid's range."""

    x: Tensor
    codes: Tensor
    inside: Tensor


def round_to_format(w: Tensor, f: Format, given: QParams) -> tuple[dict[str, Tensor | QTensor], QParams, Rounded]:
    """What quantizing and fake-quantizing share: the parts that are kept of the QParams, the QParams as they are
    after storage (scales rounded to their dtype), and w rounded.

    Codes are chosen for the scales as stored, so that none of their rounding is lost; but in bitsandbytes'
    formats for those given, since its codes are wanted one for one.
    """
    parts = store_qparams(given, f, w.dtype)
    stored = QTensor(f, tuple(w.shape), w.dtype, parts).qparams
    p = QParams(given.scale.detach(), stored.zero) if f.flat else stored
    x = normalize(grouped(w, f), f, p)
    codes, inside = round_to_grid(x, f, p.zero)
    return parts, stored, Rounded(x, codes, inside)


def quantize(w: Tensor, f: Format, p: QParams | None = None) -> QTensor:
    """See halfbyte.kernels.quantize."""
    w, shape = w.detach(), tuple(w.shape)
    offset: dict[str, Tensor | QTensor] = {}
    if f.center:
        mean = w.float().mean() if w.numel() else torch.zeros((), device=w.device)
        w, offset = w - mean, {"offset": mean}
    parts, _, rounded = round_to_format(w, f, p or qparams(w, f))
    codes = ungrouped(rounded.codes, shape).to(torch.uint8)
    packed = pack(codes.reshape(-1) if f.flat else codes, f.bits)
    return QTensor(f, shape, w.dtype, {"codes": packed, **parts, **offset})


_quantize = quantize  # by a name that store_qparams does not hide


class _Fake(torch.autograd.Function):
    """The value of dequantize(quantize(w)); the gradient as if rounding were not there.

    dw passes where w lay inside the range and is 0 where it was clipped (straight-through estimator,
    arXiv:1308.3432). The scale's gradient is LSQ's, arXiv:1902.08153 eq. 3: (code value) - x inside, the code
    value outside; an integer zero point gets -scale outside (LSQ+, arXiv:2004.09576), a float zero 1 outside.
    """

    @staticmethod
    def forward(ctx, w: Tensor, scale: Tensor, zero: Tensor | None, given: QParams, f: Format) -> Tensor:
        _, p, (x, codes, inside) = round_to_format(w, f, QParams(scale, zero, given.stored))
        ctx.f, ctx.shape, ctx.groups = f, tuple(w.shape), scale.shape
        learned = scale.requires_grad or (zero is not None and zero.requires_grad)
        ctx.save_for_backward(inside, *((x, codes, p.scale, p.zero) if learned else ()))
        return ungrouped(decode(codes, f, p), tuple(w.shape)).to(w.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        inside, *learned = ctx.saved_tensors
        rows = grouped(grad, ctx.f)
        dw = ungrouped(rows * inside, ctx.shape).to(grad.dtype)
        if not learned:
            return dw, None, None, None, None
        x, codes, scale, zero = learned
        value = grid_values(codes, ctx.f, None if zero is None else zero.reshape(-1, 1))
        dscale = (rows * (value - x * inside)).sum(1).reshape(ctx.groups)
        dzero = None
        if zero is not None:
            outside = -scale.reshape(-1, 1) if ctx.f.zero == "integer" else 1.0
            dzero = (rows * ~inside * outside).sum(1).reshape(ctx.groups)
        return dw, dscale, dzero, None, None


def fake(w: Tensor, f: Format, p: QParams | None = None) -> Tensor:
    """See halfbyte.kernels.fake."""
    if p is None:
        p = qparams(w.detach(), f)
    return _Fake.apply(w, p.scale, p.zero, p, f)  # pyright: ignore[reportReturnType]
