"""Quantizes a model a block at a time, feeding activations to the solvers that need them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from halfbyte.data import Batch
from halfbyte.errors import InputError
from halfbyte.feed import Feed, moments, watching
from halfbyte.formats import Format
from halfbyte.kernels.half import few_bits
from halfbyte.layers import Op, ops
from halfbyte.models import blocks
from halfbyte.qtensor import QTensor
from halfbyte.solvers import SOLVERS, Moments, Site, Solver
from halfbyte.solvers.closing import Part, parts, seen_as

__all__ = ["IN_MEMORY", "TOGETHER", "Store", "finite", "freeze", "inputs", "moments"]


class Store(Protocol):
    """Where weights are while a model is quantized: whatever runs is brought in first, and let go after. Blocks are
    told by their names; "" is all that lies outside of them."""

    def bring(self, prefix: str) -> None: ...

    def passing(self) -> AbstractContextManager[None]:
        """Inside, what lies outside the blocks is there when it runs."""
        ...

    def found(self, prefix: str, formats: Mapping[str, Format]) -> dict[str, QTensor] | None:
        """The codes that were kept of a block, by op's name; None if it is still to be solved."""
        ...

    def keep(self, prefix: str, codes: Mapping[str, QTensor]) -> None: ...

    def let_go(self, prefix: str) -> None: ...


class InMemory:
    """The whole model is there, and stays."""

    def bring(self, prefix: str) -> None: ...

    def passing(self) -> AbstractContextManager[None]:
        return nullcontext()

    def found(self, prefix: str, formats: Mapping[str, Format]) -> dict[str, QTensor] | None: ...

    def keep(self, prefix: str, codes: Mapping[str, QTensor]) -> None: ...

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
    groups = _by_block([prefix for prefix, _ in named], chosen)
    for i, (prefix, names) in enumerate(groups):
        store.bring(prefix)
        block = model.get_submodule(prefix) if prefix else model
        _check(block, prefix)
        formats = {n: chosen[n] for n in names}
        codes = store.found(prefix, formats)
        use = solver if prefix or not solver.needs_data else SOLVERS[solver.outside]
        given, told, closing = None, known, None
        if feed is not None:
            held = bool(prefix) and solver.needs_data  # to what the block gives in the float model
            feed.half = held and few_bits(formats.values(), feed.states[0].dtype)
            with store.passing():
                given = feed.targets(i) if held and feed.apart(i) else None
                if held and use.uses == "gram" and (last := f"{prefix}.{feed.closing(i)}") in formats:
                    closing = last
                if codes is None or (prefix and given is None):
                    inside = {n: op for n, op in by_name.items() if not prefix or n.startswith(f"{prefix}.")}
                    with watching(inside, [n for n in names if n != closing], use.uses) as seen:
                        given = _passed(feed, i if prefix else None, given, by_name.get(closing or ""))
                    told = seen.moments()
        left: list[Part] = []
        if codes is None:
            sites = {n: Site(finite(n, by_name[n], f), f, told.get(n), n == closing) for n, f in formats.items()}
            codes = use.solve(block, feed.calls(i) if feed and prefix else None, given, sites)
            store.keep(prefix, codes)
            left = sites[closing].left if closing else []
        if feed is not None and closing is not None and not left:
            with seen_as(by_name, {n: q for n, q in codes.items() if n != closing}):
                left = parts(block, feed.calls(i), by_name[closing])
        for name, q in codes.items():
            by_name[name].weight.freeze(q)
        if feed is not None and given is not None:
            after = [part.closed(by_name[closing]) for part in left] if closing else feed.run(i) if held else given
            feed.states, feed.floats = after, given
        left.clear()  # the next block needs the memory
        store.let_go(prefix)
        on_block(i + 1, len(groups))


def _passed(feed: Feed, i: int | None, given: list[Tensor] | None, last: nn.Module | None) -> list[Tensor] | None:
    """Runs block i, or what comes after all blocks, on the present states, up to where `last` is used if what the block
    gives in the float model is known; returns that."""
    if i is None:
        return feed.rest()
    if given is None:
        return feed.run(i)
    if last is None:
        feed.run(i)
    else:
        feed.until(i, last)
    return given


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


def finite(name: str, op: Op, f: Format) -> Op:
    """The op. Raises InputError if its weight holds what no code stands for."""
    if not op.weight.value().isfinite().all():
        raise InputError(f"{name}.weight holds NaN or infinity, which has no code in {f.name}.")
    return op


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
