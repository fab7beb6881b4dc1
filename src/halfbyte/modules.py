"""Any tensor, and any module of torch's, made codes: no model on disk, no tokenizer, no text."""

from __future__ import annotations

from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from halfbyte import kernels
from halfbyte.errors import InputError
from halfbyte.formats import Format
from halfbyte.layers import Linear, ops, swap
from halfbyte.plan import plan
from halfbyte.qtensor import QParams, QTensor
from halfbyte.scheme import Mix, Scheme, custom, scheme

M = TypeVar("M", bound=nn.Module)


@overload
def quantize(w: Tensor, format: str | Format, qparams: QParams | None = None) -> QTensor: ...


@overload
def quantize(w: M, format: str | Scheme | list[dict[str, str]], qparams: None = None) -> M: ...


def quantize(w: Any, format: Any, qparams: QParams | None = None) -> Any:
    """A tensor in a format: see halfbyte.kernels.quantize. Or any nn.Module, in place, by a scheme (its name, or a list
    of rules): its Linear, Conv1d, Conv2d, Conv3d and Embedding layers become ops, whose weights are codes, to nearest.

    Convolutions take part as linear layers do, for here no folder that others read must hold them. The state dict holds
    the codes; a module of the same class that was quantized alike loads it. Gives back the module, or the op where `w`
    is a layer itself. Raises InputError, before any weight is changed, for a scheme that the module cannot have.
    """
    return kernels.quantize(w, format, qparams) if isinstance(w, Tensor) else _module(w, format)


@torch.no_grad()
def _module(m: nn.Module, to: str | Scheme | list[dict[str, str]]) -> nn.Module:
    chosen = scheme(to) if isinstance(to, str | Scheme) else custom(to)
    if isinstance(chosen, Mix):
        raise InputError(f"{chosen.name} is a mix of ggml's blocks, for language models alone; choose a scheme.")
    if chosen.static:
        raise InputError(f"{chosen.name} rounds inputs by scales that are found on text, which a module has none of.")
    m = swap(m)
    by_name = {f"{name}.weight": op for name, op in ops(m)}
    entries = [e for e in plan(m, chosen.everywhere()) if e.after is not None]
    for e in entries:
        if not by_name[e.name].weight.value().isfinite().all():
            raise InputError(f"{e.name} holds NaN or infinity, which has no code in {e.after}.")
    for e in entries:
        op = by_name[e.name]
        if e.after is not None and not e.tied_to:
            op.weight.freeze(kernels.quantize(op.weight.value(), e.after))
        if isinstance(op, Linear):
            op.input = e.input
    return m
