"""One block while it is quantized: from what its ops are fed to codes, and on to what the next block is fed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor, nn

from halfbyte.errors import InputError
from halfbyte.feed import Feed, moments_of, watching
from halfbyte.formats import Format
from halfbyte.kernels import rounding
from halfbyte.kernels.half import few_bits
from halfbyte.layers import Op
from halfbyte.qtensor import QTensor
from halfbyte.solvers import Moments, Site, Solver
from halfbyte.solvers.closing import Part, adding, parts, seen_as, silent
from halfbyte.turns import Turns, together


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


@dataclass(frozen=True)
class Block:
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

    def told(self, find: Callable[[], Mapping[str, Moments]]) -> None:
        """Makes codes, from what is known of inputs."""
        codes = self.store.found(self.prefix, self.formats)
        if codes is None:
            codes = self._solved(self._sites([]), find())
            self.store.keep(self.prefix, codes)
        self._freeze(codes)

    def passed(self, feed: Feed) -> None:
        """Makes codes, from what the float model feeds; its states go on."""
        with watching(self.ops, list(self.formats), self.solver.uses) as seen:
            given = self._sound(feed.run(self.i))
        self.told(seen.moments)
        feed.states = feed.floats = given

    def held(self, feed: Feed) -> None:
        """Makes codes, against what the block gives in the float model; the states go on."""
        feed.half = few_bits(self.formats.values(), feed.states[0].dtype)
        ends, solved = self._ends(feed), {n: self.ops[n] for n in self.formats}
        with together(solved) as order, adding([self.ops[n] for n in ends[:-1]]) as added:
            given = self._sound(feed.targets(self.i))
        codes, left = self.store.found(self.prefix, self.formats), []
        calls, closing = feed.calls(self.i), ends[-1] if ends else None
        if codes is None:
            sites = self._sites(ends)
            if self.solver.in_turn:
                streams = {
                    n: [x + y.reshape(x.shape) for x, y in zip(feed.floats, ys, strict=True)]
                    for n, ys in zip(ends[:-1], added, strict=True)
                }
                streams |= {closing: given} if closing else {}
                codes = self._in_turn(Turns(self.module, calls, solved, order), streams, sites)
            else:
                known = self.watched(lambda: feed.run(self.i))
                codes = self.solver.solve(self.module, calls, given, _told(sites, known))
            if self.solver.refine:
                codes = self.solver.refine(self.module, calls, given, sites, codes)
            self.store.keep(self.prefix, codes)
            left = sites[closing].left if closing else []
        if closing and not left:
            with seen_as(self.ops, {n: q for n, q in codes.items() if n != closing}):
                left = parts(self.module, calls, self.ops[closing])
        self._freeze(codes)
        feed.states = [part.closed(self.ops[closing]) for part in left] if closing else feed.run(self.i)
        feed.floats = given

    def _sound(self, given: list[Tensor]) -> list[Tensor]:
        """What the block gives. Raises InputError for NaN and infinity, and names a weight that has them."""
        if not all(x.isfinite().all() for x in given):
            for name, f in self.formats.items():
                finite(name, self.ops[name], f)
            raise InputError(
                f"{self.prefix} gives NaN or infinity on the calibration text, before it is quantized: numbers "
                f"overflow in {given[0].dtype}, or a weight is broken."
            )
        return given

    def _ends(self, feed: Feed) -> list[str]:
        """Those of the ops that are to make good what was lost before them, the one that closes the block last."""
        names = [f"{self.prefix}.{n}" for n in feed.ends(self.i)] if self.solver.in_turn else []
        if not names or names[-1] not in self.formats:
            return []
        return [n for n in names if n in self.formats]

    def _in_turn(self, turns: Turns, ends: dict[str, list[Tensor]], sites: dict[str, Site]) -> dict[str, QTensor]:
        """Codes of weights in the order in which they are used, each told what it is fed where those before it have
        theirs. ends: what the block is, in the float model, once each of these has added to it; such a weight is told
        what the block is without it. That of the last is known when all others have theirs."""
        codes: dict[str, QTensor] = {}
        closing = next(reversed(ends), None)

        def ended(name: str, fed: list[Tensor], rest: list[Tensor]) -> dict[str, QTensor]:
            sites[name].left.extend(Part(x, y, turns.half) for x, y in zip(fed, rest, strict=True))
            return self.solver.solve(self.module, turns.calls, ends[name], {name: sites[name]})

        with ExitStack() as stack:
            if closing is not None:
                stack.enter_context(silent(self.ops[closing]))
            running = iter(turns)
            stack.callback(running.close)  # now, where a solver raises, and not when it is collected
            for names, fed in running:
                now = {n: sites[n] for n in names if n not in ends}
                told = moments_of(fed, self.solver.uses, turns.half) if now else None
                found = self._solved(now, dict.fromkeys(now, told)) if told else {}
                for n in names:
                    if n == closing:
                        last = fed
                    elif n in ends:
                        found |= ended(n, fed, [call.x for call in turns.calls])
                        sites[n].left.clear()  # what comes needs the memory
                stack.enter_context(seen_as(self.ops, found))
                codes |= found
        codes |= self._solved({n: site for n, site in sites.items() if n not in codes and n != closing}, {})
        if closing is not None:
            codes |= ended(closing, last, [turns.given[k] for k in range(len(turns.calls))])
        return codes

    def _solved(self, sites: Mapping[str, Site], known: Mapping[str, Moments]) -> dict[str, QTensor]:
        return self.solver.solve(self.module, None, None, _told(sites, known))

    def _sites(self, ends: list[str]) -> dict[str, Site]:
        return {n: Site(finite(n, self.ops[n], f), f, closes=n in ends) for n, f in self.formats.items()}

    def _freeze(self, codes: Mapping[str, QTensor]) -> None:
        for name, q in codes.items():
            self.ops[name].weight.freeze(q)


def _told(sites: Mapping[str, Site], known: Mapping[str, Moments]) -> dict[str, Site]:
    return {n: replace(site, moments=known.get(n)) for n, site in sites.items()}


def finite(name: str, op: Op, f: Format) -> Op:
    """The op. Raises InputError if its weight holds what no code stands for."""
    if not rounding.finite(op.weight.value()):
        raise InputError(f"{name}.weight holds NaN or infinity, which has no code in {f.name}.")
    return op
