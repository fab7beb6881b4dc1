"""Which kernel multiplies: C++ where it serves, else torch with the dequantized weight, and then a line in the log."""

from __future__ import annotations

import logging
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from halfbyte.kernels import cpu, elementwise
from halfbyte.qtensor import QTensor

_log = logging.getLogger(__name__)
_INPUTS = {*cpu.DTYPES, torch.uint8}  # uint8: the codes of an input


def linear(x: Tensor | QTensor, q: QTensor, bias: Tensor | None = None) -> Tensor:
    """See halfbyte.kernels.linear; without a gradient."""
    if isinstance(x, QTensor):
        return _linear_int8(x, q, bias)
    kernel = tiled(x, q)
    return _dense_linear(x, q, bias) if kernel is None else kernel.linear(x, bias)


def linear_grad(dy: Tensor, q: QTensor) -> Tensor:
    """See halfbyte.kernels.linear_grad."""
    kernel = tiled(dy, q)
    return dy @ _dense(q, dy) if kernel is None else kernel.linear_grad(dy)


def _dense(q: QTensor, x: Tensor) -> Tensor:
    """q in x's dtype; where C++ does it, in memory that the next call writes anew."""
    if elementwise.refuses("dequantize", q) is None and x.dtype in cpu.DTYPES and x.is_cpu:
        return elementwise.dequantize(q, cpu.buffer(prod(q.shape), x.dtype).view(q.shape))
    return q.dequantize().to(x.dtype)


def _dense_linear(x: Tensor, q: QTensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, _dense(q, x), bias)


def _linear_int8(x: QTensor, q: QTensor, bias: Tensor | None) -> Tensor:
    codes = x.canonical().parts["codes"]
    assert isinstance(codes, Tensor)
    kernel = tiled(codes, q)
    y = None if kernel is None else kernel.linear_int8(x, bias)
    if y is not None:
        return y
    if kernel is not None:
        fall_back(f"inputs are dequantized: no C++ kernel multiplies {x.format} with {q.format}")
    return linear(x.dequantize(), q, bias)


def ready(x: Tensor, q: QTensor) -> cpu.Tiled | None:
    """The C++ products with q, if it is laid out and they take x."""
    kernel = q.laid_out
    if kernel is None or not cpu.on or x.dtype not in _INPUTS or not x.is_cpu:
        return None
    assert isinstance(kernel, cpu.Tiled)
    kernel.follow(q)
    return kernel


def tiled(x: Tensor, q: QTensor) -> cpu.Tiled | None:
    """The C++ products with q, laying it out if need be; None, and a line in the log, where they refuse."""
    if (kernel := ready(x, q)) is not None:
        return kernel
    served = x.dtype in _INPUTS
    why = cpu.refuses(q) if served or not x.is_cpu else f"the C++ kernels do not multiply {x.dtype}"
    if why is None and not x.is_cpu:
        why = f"the input is on {x.device.type}, the weight is not"
    if why is None:
        q.laid_out = kernel = cpu.Tiled(q)
        return kernel
    if cpu.on or cpu.absent():  # else torch's kernels were asked for, and there is nothing to say
        fall_back(f"torch multiplies with the dequantized weight: {why}")
    return None


@lru_cache(maxsize=1024)
def fall_back(what: str) -> None:
    """Says once what is not done by the fast kernels, and why."""
    _log.warning("%s", what)
