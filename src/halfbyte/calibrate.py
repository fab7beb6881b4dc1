"""Quantizes a model a block at a time, feeding activations to the solvers that need them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from halfbyte.data import Batch
from halfbyte.errors import InputError
from halfbyte.feed import Feed, moments, moments_of, watching
from halfbyte.formats import Format
from halfbyte.kernels.half import few_bits
from halfbyte.layers import Op, ops
from halfbyte.models import blocks
from halfbyte.qtensor import QTensor
from halfbyte.solvers import SOLVERS, Moments, Site, Solver
from halfbyte.solvers.closing import Part, parts, seen_as, silent
from halfbyte.turns import Turns, together

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
        module = model.get_submodule(prefix) if prefix else model
        _check(module, prefix)
        inside = {n: op for n, op in by_name.items() if not prefix or n.startswith(f"{prefix}.")}
        use = solver if prefix or not solver.needs_data else SOLVERS[solver.outside]
        block = _Block(prefix, i, module, inside, {n: chosen[n] for n in names}, use, store)
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


@dataclass(frozen=True)
class _Block:
    """What is quantized together: a block, the i-th, or under the name "" what lies outside of all. ops: those inside,
    by name; formats: of those that get codes."""

    prefix: str
    i: int
    module: nn.Module
    ops: Mapping[str, Op]
    formats: Mapping[str, Format]
    solver: Solver
    store: Store

    def watched(self, run: Callable[[], Any]) -> dict[str, Moments]:
        """What is known of the inputs of the ops, from a run."""
        with watching(self.ops, list(self.formats), self.solver.uses) as seen:
            run()
        return seen.moments()

    def sites(self, closing: str | None = None) -> dict[str, Site]:
        return {n: Site(finite(n, self.ops[n], f), f, closes=n == closing) for n, f in self.formats.items()}

    def freeze(self, codes: Mapping[str, QTensor]) -> None:
        for name, q in codes.items():
            self.ops[name].weight.freeze(q)

    def told(self, find: Callable[[], Mapping[str, Moments]]) -> None:
        """Makes codes, from what is known of inputs."""
        codes = self.store.found(self.prefix, self.formats)
        if codes is None:
            codes = self._solved(self.sites(), find())
            self.store.keep(self.prefix, codes)
        self.freeze(codes)

    def passed(self, feed: Feed) -> None:
        """Makes codes, from what the float model feeds; its states go on."""
        with watching(self.ops, list(self.formats), self.solver.uses) as seen:
            given = feed.run(self.i)
        self.told(seen.moments)
        feed.states = feed.floats = given

    def held(self, feed: Feed) -> None:
        """Makes codes, against what the block gives in the float model; the states go on."""
        feed.half = few_bits(self.formats.values(), feed.states[0].dtype)
        with together(self.ops) as order:
            given = feed.targets(self.i)
        calls, last = feed.calls(self.i), f"{self.prefix}.{feed.closing(self.i)}"
        closing = last if self.solver.uses == "gram" and last in self.formats else None
        codes, left = self.store.found(self.prefix, self.formats), []
        if codes is None:
            sites = self.sites(closing)
            if self.solver.in_turn:
                codes = self._in_turn(Turns(self.module, calls, {n: self.ops[n] for n in sites}, order), given, sites)
            else:
                known = self.watched(lambda: feed.until(self.i, self.ops.get(closing or "")))
                sites = {n: replace(site, moments=known.get(n)) for n, site in sites.items()}
                codes = self.solver.solve(self.module, calls, given, sites)
            self.store.keep(self.prefix, codes)
            left = sites[closing].left if closing else []
        if closing and not left:
            with seen_as(self.ops, {n: q for n, q in codes.items() if n != closing}):
                left = parts(self.module, calls, self.ops[closing])
        self.freeze(codes)
        feed.states = [part.closed(self.ops[closing]) for part in left] if closing else feed.run(self.i)
        feed.floats = given

    def _in_turn(self, turns: Turns, given: list[Tensor], sites: dict[str, Site]) -> dict[str, QTensor]:
        """Codes of weights in the order in which they are used, each told what it is fed where those before it have
        theirs. The one that closes the block is told what the block gives without it, and comes last."""
        codes: dict[str, QTensor] = {}
        closing = next((n for n, site in sites.items() if site.closes), None)
        with ExitStack() as stack:
            if closing is not None:
                stack.enter_context(silent(self.ops[closing]))
            for names, fed in turns:
                now = {n: sites[n] for n in names if n != closing}
                if len(now) < len(names):
                    last = fed
                if now:
                    found = self._solved(now, dict.fromkeys(now, moments_of(fed, self.solver.uses, turns.half)))
                    stack.enter_context(seen_as(self.ops, found))
                    codes |= found
            rest = [turns.given[k] for k in range(len(turns.calls))]
        codes |= self._solved({n: site for n, site in sites.items() if n not in codes and n != closing}, {})
        if closing is not None:
            sites[closing].left.extend(Part(x, y, turns.half) for x, y in zip(last, rest, strict=True))
            codes |= self.solver.solve(self.module, turns.calls, given, {closing: sites[closing]})
        return codes

    def _solved(self, sites: Mapping[str, Site], known: Mapping[str, Moments]) -> dict[str, QTensor]:
        """Codes, from what is known of inputs."""
        told = {n: replace(site, moments=known.get(n)) for n, site in sites.items()}
        return self.solver.solve(self.module, None, None, told)


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
