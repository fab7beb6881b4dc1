"""Quantizes a model a block at a time, feeding activations to the solvers that need them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.block import Block, Store, finite
from halfbyte.data import Batch
from halfbyte.errors import InputError
from halfbyte.feed import Feed, moments, watching
from halfbyte.formats import Format
from halfbyte.kernels.half import few_bits
from halfbyte.layers import ops
from halfbyte.matters import directions
from halfbyte.models import Kept, blocks
from halfbyte.qtensor import QTensor
from halfbyte.solvers import SOLVERS, Moments, Solver

__all__ = ["IN_MEMORY", "TOGETHER", "InMemory", "Store", "finite", "freeze", "inputs", "moments"]


@dataclass(frozen=True)
class InMemory:
    """The whole model is there, and stays. kept: where codes go to, if anywhere, so that a killed run goes on."""

    kept: Kept | None = None

    def bring(self, prefix: str) -> None: ...

    def passing(self) -> AbstractContextManager[None]:
        return nullcontext()

    def found(self, prefix: str, formats: Mapping[str, Format]) -> dict[str, QTensor] | None:
        return None if self.kept is None else self.kept.found(prefix, formats)

    def keep(self, prefix: str, codes: Mapping[str, QTensor]) -> None:
        if self.kept is not None:
            self.kept.keep(prefix, codes)

    def let_go(self, prefix: str) -> None: ...


IN_MEMORY = InMemory()
TOGETHER = 4  # rows of text that go through a block at a time


def freeze(
    model: nn.Module,
    chosen: Mapping[str, Format],
    solver: Solver,
    batches: list[Batch] | None = None,
    on_block: Callable[[int, int], None] = lambda done, total: None,
    squares: Mapping[str, Tensor] | None = None,
    store: Store = IN_MEMORY,
) -> None:
    """Makes codes of the named ops' weights, in place. A block is solved against what it gives in the float model, fed
    with what the already quantized blocks before it give, so that it makes good what they lost. A solver that can do
    without text, and only weighs by it, is told what the float model is fed. squares: op's name -> the mean squares of
    its inputs (in,), where they are known beforehand (an importance matrix).

    Raises InputError if the solver needs calibration and there is none, or for what holds NaN or infinity.
    """
    if solver.needs_data and not batches:
        raise InputError("this solver needs calibration text: add --calibration FILE.")
    by_name, named = dict(ops(model)), blocks(model)
    known = {n: Moments(s) for n, s in (squares or {}).items()}
    _check(model)
    feed = None
    if batches and (solver.needs_data or solver.uses):
        if named:
            store.bring(named[0][0])
            with store.passing():
                feed = Feed(model, [m for _, m in named], batches)
        elif solver.needs_data:
            raise InputError("this model has no list of blocks to calibrate one after the other.")
        else:
            known = moments(model, batches, list(chosen), solver.uses)
    if feed is not None and solver.refine:
        feed.half = few_bits(chosen.values(), feed.states[0].dtype)
        feed.matter = directions(feed, named, store)
    groups = _by_block([prefix for prefix, _ in named], chosen)
    for i, (prefix, names) in enumerate(groups):
        store.bring(prefix)
        module = model.get_submodule(prefix) if prefix else model
        _check(module, prefix)
        inside = {n: op for n, op in by_name.items() if not prefix or n.startswith(f"{prefix}.")}
        use = solver if prefix or not solver.needs_data else SOLVERS[solver.outside]
        block = Block(prefix, i, module, inside, {n: chosen[n] for n in names}, use, store)
        with store.passing():
            if feed is None:
                block.told(lambda: known)
            elif not prefix:
                block.told(partial(block.watched, feed.rest))
            elif solver.needs_data:
                block.held(feed)
            else:
                block.passed(feed)
        store.let_go(prefix)
        on_block(i + 1, len(groups))


@torch.no_grad()
def inputs(model: nn.Module, names: list[str], batches: list[Batch]) -> Iterator[tuple[str, Tensor]]:
    """The mean of x x^T over what each named op is fed, float32 (in, in), a block at a time; ops that are fed the same
    share one. Raises InputError for one that the batches do not reach, and for NaN and infinity."""
    named = blocks(model)
    feed, by_name = Feed(model, [m for _, m in named], batches) if named else None, dict(ops(model))
    for i, (prefix, inside) in enumerate(_by_block([prefix for prefix, _ in named], dict.fromkeys(names))):
        with watching(by_name, inside, "gram") as seen:
            if feed is None:
                for batch in batches:
                    model(**batch.inputs)
            elif prefix:
                feed.states = feed.floats = feed.run(i)
            else:
                feed.rest()
        found = seen.moments()
        for name in inside:
            if name not in found:
                raise InputError(f"the calibration text never reaches {name}, so that nothing is known of its inputs.")
            gram = found[name].gram
            assert gram is not None
            if not gram.isfinite().all():
                raise InputError(f"the inputs of {name} hold NaN or infinity on the calibration text.")
            yield name, gram


def _check(block: nn.Module, prefix: str = "") -> None:
    """Raises InputError for norms, biases and such that are there and hold NaN or infinity."""
    for name, p in block.named_parameters(prefix):
        if not name.endswith(".stored") and p.device.type != "meta" and not p.isfinite().all():
            raise InputError(f"{name} holds NaN or infinity.")


def _by_block(prefixes: list[str], chosen: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """(block's name, names of its ops that are chosen), in order; last, under "", those outside any block."""
    rest = dict.fromkeys(chosen)
    out = []
    for prefix in prefixes:
        names = [n for n in rest if n.startswith(f"{prefix}.")]
        for n in names:
            del rest[n]
        out.append((prefix, names))
    return [*out, ("", list(rest))] if rest else out
