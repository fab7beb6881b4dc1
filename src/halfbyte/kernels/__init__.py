"""Quantize, dequantize, fake-quantize, multiply: what is done with a format's bytes.

One function a job; the fastest kernel that can serve a call does. Today that is the reference in torch.
"""

from __future__ import annotations

from torch import Tensor

from halfbyte.formats import Format, parse
from halfbyte.kernels import reference
from halfbyte.kernels.search import SEARCHES
from halfbyte.kernels.search import qparams as _qparams
from halfbyte.qtensor import QParams, QTensor

__all__ = ["SEARCHES", "dequantize", "fake", "linear", "linear_grad", "qparams", "quantize", "served_by"]


def qparams(w: Tensor, format: str | Format, how: str | None = None, weight: Tensor | None = None) -> QParams:
    """Scale and zero point of w in a format; see halfbyte.kernels.search.qparams for `how` and `weight`."""
    return _qparams(w, parse(format), how, weight)


def quantize(w: Tensor, format: str | Format, qparams: QParams | None = None) -> QTensor:
    """w (..., out, in), any float dtype, rounded to the nearest values of a format.

    qparams: scale and zero point; left out, the format's default search finds them (no data needed).
    Raises InputError for an unknown format, a group that does not divide the inputs, NaN or infinity.
    """
    return reference.quantize(w, parse(format), qparams)


def dequantize(q: QTensor) -> Tensor:
    """The tensor q stands for, in the dtype of its source."""
    return q.dequantize()


def fake(w: Tensor, format: str | Format, qparams: QParams | None = None) -> Tensor:
    """dequantize(quantize(w, format, qparams)), bit for bit, with a gradient: straight through for w, LSQ's for
    the scale and zero of `qparams` where those require one."""
    return reference.fake(w, parse(format), qparams)


def linear(x: Tensor, q: QTensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times the transposed q (out, in), plus bias, in x's dtype; differentiable in x and bias."""
    return reference.linear(x, q, bias)


def linear_grad(dy: Tensor, q: QTensor) -> Tensor:
    """dy (..., out) times q (out, in): the gradient that `linear` passes to x."""
    return reference.linear_grad(dy, q)


def served_by() -> dict[str, str]:
    """Which kernel serves each job, and why no faster one does."""
    why = "reference (torch): there is no other kernel yet"
    return dict.fromkeys(("quantize", "dequantize", "fake", "linear", "linear_grad"), why)
