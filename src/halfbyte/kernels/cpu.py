"""The C++ kernels: which calls they serve, and a QTensor's parts as they want them."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from halfbyte.formats import Float8, Format, Integers, Table
from halfbyte.qtensor import QTensor, grid_values

try:
    from halfbyte.kernels import _cpu  # pyright: ignore[reportAttributeAccessIssue]
except ImportError:  # installed without a compiler
    _cpu = None

if _cpu is not None and "HALFBYTE_ISA" in os.environ:
    _cpu.use_isa(os.environ["HALFBYTE_ISA"])


def span(t: Tensor) -> tuple[int, int]:
    return t.data_ptr(), t.nbytes


def name(d: torch.dtype) -> str:
    return str(d).removeprefix("torch.")


def table(f: Format) -> list[float]:
    """Grid value by code."""
    codes = torch.arange(1 << f.bits, dtype=torch.uint8)
    return grid_values(codes, f).tolist() if not isinstance(f.grid, Integers) else (codes.float() - f.grid.middle).tolist()


def values(part: Tensor | QTensor) -> Any:
    if isinstance(part, Tensor):
        if part.dtype == torch.uint8:
            return _cpu.Values.bytes(span(part))
        return _cpu.Values.floats(name(part.dtype), span(part))
    f = part.format
    inner = part.parts["scale"]
    group = f.group if isinstance(f.group, int) else part.shape[-1] if f.group == "channel" else 1 << 40
    offset = float(part.parts["offset"]) if "offset" in part.parts else 0.0
    return _cpu.Values.nested(f.bits, span(part.parts["codes"]), table(f), name(inner.dtype), span(inner), group, offset)


def matrix(q: QTensor) -> Any:
    f = q.format
    rows, cols = q.shape
    group = cols if f.group == "channel" else f.group
    m = _cpu.Matrix(
        rows=rows, cols=cols, bits=f.bits, group=group, codes=span(q.parts["codes"]), table=table(f),
        middle=float(f.grid.middle) if isinstance(f.grid, Integers) else None,
        scale=values(q.parts["scale"]), zero=values(q.parts["zero"]) if "zero" in q.parts else None,
        zero_added=f.zero not in (None, "integer"),
    )  # fmt: skip
    m.tile(False, torch.get_num_threads())
    return m
