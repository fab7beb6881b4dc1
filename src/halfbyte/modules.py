"""Any tensor, and any module of torch's, made codes, trained or not: no model on disk, no tokenizer, no text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from halfbyte import kernels
from halfbyte.errors import InputError
from halfbyte.formats import Format
from halfbyte.kernels.rounding import finite
from halfbyte.layers import Codes, Grid, Op, RoundsInputs, ops, swap, weights
from halfbyte.observe import observe
from halfbyte.plan import Entry, plan
from halfbyte.qtensor import QParams, QTensor
from halfbyte.scheme import Mix, Scheme, custom, scheme, static
from halfbyte.weight import check_learnable

M = TypeVar("M", bound=nn.Module)
Rules = list[dict[str, str]]


@overload
def quantize(w: Tensor, format: str | Format, qparams: QParams | None = None) -> QTensor: ...


@overload
def quantize(w: M, format: str | Scheme | Rules, qparams: None = None, calibration: Iterable[Any] = ()) -> M: ...


def quantize(w: Any, format: Any, qparams: QParams | None = None, calibration: Iterable[Any] = ()) -> Any:
    """A tensor in a format: see halfbyte.kernels.quantize. Or any nn.Module, in place, by a scheme (its name, or a list
    of rules): its Linear, Conv1d, Conv2d, Conv3d and Embedding layers become ops, whose weights are codes, to nearest.

    Convolutions take part as linear layers do, for here no folder that others read must hold them. The state dict holds
    the codes; a module of the same class that was quantized alike loads it. calibration: what scales of inputs are
    found on, where the scheme has static ones: batches, each a tensor, a tuple of arguments or a dict of them. Gives
    back the module, or the op where `w` is a layer itself. Raises InputError, before any weight is changed, for a
    scheme that the module cannot have; after, for batches that do not reach a layer or give it NaN.
    """
    if isinstance(w, Tensor):
        return kernels.quantize(w, format, qparams)
    batches = list(calibration)
    m, chosen = _planned(w, format, batches)
    with torch.no_grad():
        for op, e in chosen.values():
            if e.after is not None and not e.tied_to:
                op.weight.freeze(kernels.quantize(op.weight.value(), e.after))
    _round_inputs(m, chosen, batches)
    return m


def prepare_qat(
    m: nn.Module, format: str | Scheme | Rules, calibration: Iterable[Any] = (), learn: bool = False
) -> nn.Module:
    """Makes any nn.Module, in place, one whose training sees what it will ship as: the weights that `quantize` would
    make codes are seen through a Grid, inputs through their format, gradients straight through (arXiv:1308.3432). In
    eval it computes what `freeze` makes of it, to the bit. Train it with any loop, halfbyte.train.train too.

    Arguments and errors: as quantize has them. learn: whether the scales of weights are parameters too (LSQ,
    arXiv:1902.08153), from those that quantize finds; else they are found anew in every forward. Static scales of
    inputs are found once, here, and stand still in training: weights learn to live with them. Raises InputError also
    for weights that are codes already, which have nothing to train.
    """
    batches = list(calibration)
    m, chosen = _planned(m, format, batches)
    for name, (op, _) in chosen.items():
        if isinstance(op.weight.stored, Codes):
            raise InputError(f"{name} is codes already: train the float weights that they were made from.")
    held = {id(op.weight): (op.weight, e.after) for op, e in chosen.values() if e.after is not None}
    for _, f in held.values() if learn else ():
        check_learnable(f)
    for w, f in held.values():
        if not learn:
            w.grid = Grid(f)
            continue
        floats, trained = w.base().detach(), isinstance(w.stored, Tensor) and w.stored.requires_grad
        w.see_through(kernels.quantize(floats, f), floats)
        w.stored.requires_grad_(trained)
    _round_inputs(m, chosen, batches)
    return m


def freeze(m: M) -> M:
    """Ends quantization-aware training, in place: every weight that is seen through a grid becomes the codes that this
    makes of it, and the module is in eval. Gives it back. Raises InputError where no weight is."""
    seen = [w for w in weights(m).values() if w.grid is not None]
    if not seen:
        raise InputError("no weight of this module is seen through a grid: call prepare_qat before training.")
    for w in seen:
        w.freeze()
    return m.eval()


Chosen = dict[str, tuple[Op, Entry]]  # by op's name: what gets codes


def _planned(m: nn.Module, to: Any, batches: list[Any]) -> tuple[nn.Module, Chosen]:
    """The module with ops, and which of them get codes. Raises InputError."""
    chosen = scheme(to) if isinstance(to, str | Scheme) else custom(to)
    if isinstance(chosen, Mix):
        raise InputError(f"{chosen.name} is a mix of ggml's blocks, for language models alone; choose a scheme.")
    if chosen.static and not batches:
        raise InputError(f"{chosen.name} rounds inputs by scales that are found on data: give calibration=BATCHES.")
    m = swap(m)
    by_name = {f"{name}.weight": op for name, op in ops(m)}
    entries = [e for e in plan(m, chosen.everywhere()) if e.after is not None]
    for e in entries:
        if not finite(by_name[e.name].weight.value()):
            raise InputError(f"{e.name} holds NaN or infinity, which has no code in {e.after}.")
    return m, {e.name.removesuffix(".weight"): (by_name[e.name], e) for e in entries}


def _round_inputs(m: nn.Module, chosen: Chosen, batches: list[Any]) -> None:
    """Sets the input formats, and finds the scales of static ones, with the module in eval."""
    observed = {}
    for name, (op, e) in chosen.items():
        if isinstance(op, RoundsInputs):
            op.input = e.input
            if e.input is not None and static(e.input):
                observed[name] = e.input
    if not observed:
        return
    training = [part for part in m.modules() if part.training]
    m.eval()
    try:
        observe(m, observed, batches, call=_call)
    finally:
        for part in training:
            part.training = True


def _call(m: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return m(**batch)
    return m(*(batch if isinstance(batch, tuple | list) else (batch,)))
