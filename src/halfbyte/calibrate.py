"""Quantizes a model a block at a time, feeding activations to the solvers that need them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.data import Batch
from halfbyte.errors import InputError
from halfbyte.formats import Format
from halfbyte.layers import Linear, ops
from halfbyte.models import blocks
from halfbyte.solvers import SOLVERS, Moments, Site, Solver


def freeze(
    model: nn.Module,
    chosen: Mapping[str, Format],
    solver: Solver,
    batches: list[Batch] | None = None,
    on_block: Callable[[int, int], None] = lambda done, total: None,
    squares: Mapping[str, Tensor] | None = None,
) -> None:
    """Makes codes of the named ops' weights, in place. A block is solved against the float model's outputs, fed
    with what the already quantized blocks before it give. A solver that can do without text, and only weighs by it, is
    told what the float model is fed. squares: op's name -> the mean squares of its inputs (in,), where they are known
    beforehand (an importance matrix).

    Weights outside the blocks are rounded to nearest whatever the solver. Raises InputError if the solver needs
    calibration and there is none.
    """
    if solver.needs_data and not batches:
        raise InputError("this solver needs calibration text: add --calibration FILE.")
    by_name = dict(ops(model))
    groups = _by_block(model, chosen)
    feed = _Feed(model, batches) if batches and solver.needs_data else None
    known = {n: Moments(s) for n, s in (squares or {}).items()}
    if batches and feed is None and solver.uses:
        known = moments(model, batches, list(chosen), solver.uses)
    for i, (prefix, names) in enumerate(groups):
        block = model.get_submodule(prefix) if prefix else model
        use = solver if prefix or not solver.needs_data else SOLVERS["rtn"]
        inputs = targets = None
        told = known
        if feed is not None:
            with _watching(model, names, use.uses) as seen:
                targets = feed.run(block) if prefix else _run(model, batches or [])
            inputs, told = feed.inputs if prefix else None, seen.moments()
        sites = {n: Site(by_name[n], chosen[n], told.get(n)) for n in names}
        for name, q in use.solve(block, inputs, targets, sites).items():
            by_name[name].weight.freeze(q)
        if feed is not None and prefix:
            feed.inputs = feed.run(block)
        on_block(i + 1, len(groups))


def moments(model: nn.Module, batches: list[Batch], names: list[str], uses: str) -> dict[str, Moments]:
    """Of the named ops' inputs, by op's name: their "squares", or the whole "gram". What is fed nothing is left out; of
    a weight that an embedding and a head share it is what the head is fed."""
    with _watching(model, names, uses) as seen:
        _run(model, batches)
    return seen.moments()


@torch.inference_mode()
def _run(model: nn.Module, batches: list[Batch]) -> None:
    for batch in batches:
        model(**batch.inputs)


def _by_block(model: nn.Module, chosen: Mapping[str, Format]) -> list[tuple[str, list[str]]]:
    """(block's name, names of its ops that are chosen), in order; last, under "", those outside any block."""
    rest = dict.fromkeys(chosen)
    out = []
    for prefix, _ in blocks(model):
        names = [n for n in rest if n.startswith(prefix + ".")]
        for n in names:
            del rest[n]
        out.append((prefix, names))
    return [*out, ("", list(rest))] if rest else out


class _Seen:
    """Sums of squares, or of x x^T, over what ops are fed. Ops that are fed the same tensor share one sum."""

    def __init__(self, gram: bool) -> None:
        self.gram, self.count = gram, {}
        self.sums: dict[str, Tensor] = {}
        self._last: tuple[Tensor | None, str] = None, ""
        self._same: dict[str, str] = {}

    def add(self, name: str, x: Tensor) -> None:
        """What an op is fed, once more: x (..., in)."""
        last, owner = self._last
        if last is x and name not in self.sums:
            self._same[name] = owner
            return
        self._last = x, name
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        new = rows.T @ rows if self.gram else rows.square().sum(0)
        self.sums[name] = self.sums[name] + new if name in self.sums else new
        self.count[name] = self.count.get(name, 0) + len(rows)

    def moments(self) -> dict[str, Moments]:
        """By op's name; what was fed nothing is left out."""
        own = {}
        for name, total in self.sums.items():
            mean = total / max(1, self.count[name])
            own[name] = Moments(mean.diagonal().clone(), mean) if self.gram else Moments(mean)
        return own | {name: own[owner] for name, owner in self._same.items()}


@contextmanager
def _watching(model: nn.Module, names: list[str], uses: str) -> Iterator[_Seen]:
    """What the named ops are fed inside."""
    seen, by_name = _Seen(uses == "gram"), dict(ops(model))
    wanted = {id(by_name[n].weight): n for n in names} if uses else {}
    handles = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: seen.add(name, args[0])

    for op in by_name.values():
        if isinstance(op, Linear) and id(op.weight) in wanted:
            handles.append(op.register_forward_pre_hook(hook(wanted[id(op.weight)])))
    try:
        yield seen
    finally:
        for h in handles:
            h.remove()


class _Reached(Exception):
    """The first block was reached: its inputs are known."""


class _Feed:
    """The hidden states between blocks, a list over batches, and each batch's other arguments."""

    def __init__(self, model: nn.Module, batches: list[Batch]) -> None:
        first = blocks(model)
        if not first:
            raise InputError("this model has no list of blocks to calibrate one after the other.")
        self.inputs: list[Tensor] = []
        self._kwargs: list[dict[str, Any]] = []

        def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kwargs = dict(kwargs)
            self.inputs.append(args[0] if args else kwargs.pop("hidden_states"))
            self._kwargs.append(kwargs)
            raise _Reached

        handle = first[0][1].register_forward_pre_hook(catch, with_kwargs=True)
        try:
            for batch in batches:
                with torch.inference_mode():
                    try:
                        model(**batch.inputs)
                    except _Reached:
                        continue
        finally:
            handle.remove()

    @torch.inference_mode()
    def run(self, block: nn.Module) -> list[Tensor]:
        """The block's outputs on the present inputs."""
        outputs = [block(x, **kw) for x, kw in zip(self.inputs, self._kwargs, strict=True)]
        return [o[0] if isinstance(o, tuple) else o for o in outputs]
