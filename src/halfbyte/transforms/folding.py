"""What scaling and turning channels does to weights: computed in float64, rounded once to a weight's own dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from halfbyte.errors import InputError
from halfbyte.layers import Weight

if TYPE_CHECKING:
    from halfbyte.models import Edge

Change = Callable[[Tensor], Tensor]
_PART = 4096  # rows, or columns, that are in float64 at a time


def scale(model: nn.Module, edge: Edge, s: Tensor, centered: bool) -> None:
    """What gives the edge's channels divides them by s, float64 (channels,), and what reads them multiplies them by it.
    centered: norms hold w - 1. Raises InputError for what a weight's dtype does not hold."""
    if edge.norm:
        norm: Any = model.get_submodule(edge.source)
        set_gain(edge.source, norm, gain(norm, centered) / s, centered)
        if getattr(norm, "bias", None) is not None:
            put(f"{edge.source}.bias", norm.bias, norm.bias.double() / s)
    else:
        outputs(model, edge.source, lambda w: among(w, edge.rows, lambda rows: rows / s[:, None]))
    by = s if edge.columns is None else s[edge.columns]
    for name in edge.readers:
        inputs(model, name, lambda w: w * by)


def inputs(model: nn.Module, name: str, change: Change) -> None:
    """Changes what a matrix (out, in), or a table of rows, makes of its inputs: `change` is given some of its rows,
    (n, in) in float64, and gives as many."""
    w = matrix(model, name)
    _store(model, name, torch.cat([held(name, change(part.double()), w.dtype) for part in w.split(_PART)]))


def outputs(model: nn.Module, name: str, change: Change) -> None:
    """Changes what a linear layer gives: `change` is given some columns of its matrix, (out, n) in float64, and gives
    as many; then its bias, as one."""
    w = matrix(model, name)
    _store(model, name, torch.cat([held(name, change(part.double()), w.dtype) for part in w.split(_PART, 1)], 1))
    bias: Any = model.get_submodule(name).bias
    if bias is not None:
        put(f"{name}.bias", bias, change(bias.double()[:, None])[:, 0])


def among(w: Tensor, rows: Tensor | None, change: Change) -> Tensor:
    """w with some of its rows changed; None: all."""
    if rows is None:
        return change(w)
    out = w.clone()
    out[rows] = change(w[rows])
    return out


def by_head(w: Tensor, turn: Tensor) -> Tensor:
    """w (heads * d, n) with the d rows of each head turned by `turn` (d, d)."""
    return (turn @ w.reshape(-1, len(turn), w.shape[1])).reshape(w.shape)


def gain(norm: Any, centered: bool) -> Tensor:
    """What a norm multiplies channels by, float64."""
    return norm.weight.detach().double() + centered


def set_gain(name: str, norm: Any, value: Tensor, centered: bool) -> None:
    put(f"{name}.weight", norm.weight, value - float(centered))


def put(name: str, parameter: Tensor, value: Tensor) -> None:
    """Writes a value over a parameter. Raises InputError for what its dtype does not hold."""
    parameter.data.copy_(held(name, value, parameter.dtype))


def held(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A value in a dtype. Raises InputError for numbers that it does not hold."""
    out = value.to(dtype)
    if not out.isfinite().all():
        raise InputError(f"{name} would hold what is no number of {dtype}: transform the model in --dtype float32.")
    return out


def matrix(model: nn.Module, name: str) -> Tensor:
    """The weight of an op (out, in), or of a table that is none."""
    module: Any = model.get_submodule(name)
    return (module.weight.value() if isinstance(module.weight, Weight) else module.weight).detach()


def _store(model: nn.Module, name: str, value: Tensor) -> None:
    module: Any = model.get_submodule(name)
    if isinstance(module.weight, Weight):
        module.weight.store(value)
    else:
        module.weight.data = value
