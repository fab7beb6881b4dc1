"""Quantizes a model a block at a time, feeding activations to the solvers that need them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.data import Batch
from halfbyte.errors import InputError
from halfbyte.formats import Format
from halfbyte.layers import ops
from halfbyte.models import blocks
from halfbyte.solvers import SOLVERS, Site, Solver


def freeze(
    model: nn.Module,
    chosen: Mapping[str, Format],
    solver: Solver,
    batches: list[Batch] | None = None,
    on_block: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Makes codes of the named ops' weights, in place. A block is solved against the float model's outputs, fed
    with what the already quantized blocks before it give.

    Weights outside the blocks are rounded to nearest whatever the solver. Raises InputError if the solver needs
    calibration and there is none.
    """
    if solver.needs_data and not batches:
        raise InputError("this solver needs calibration text: add --calibration FILE.")
    by_name = dict(ops(model))
    groups = _by_block(model, chosen)
    feed = _Feed(model, batches) if solver.needs_data and batches else None
    for i, (prefix, names) in enumerate(groups):
        block = model.get_submodule(prefix) if prefix else model
        sites = {n: Site(by_name[n], chosen[n]) for n in names}
        inputs = targets = None
        if feed is not None and prefix:
            inputs, targets = feed.inputs, feed.run(block)
        use = solver if prefix or not solver.needs_data else SOLVERS["rtn"]
        for name, q in use.solve(block, inputs, targets, sites).items():
            by_name[name].weight.freeze(q)
        if feed is not None and prefix:
            feed.advance(block)
        on_block(i + 1, len(groups))


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

    def advance(self, block: nn.Module) -> None:
        """Makes the block's outputs the next one's inputs."""
        self.inputs = self.run(block)
