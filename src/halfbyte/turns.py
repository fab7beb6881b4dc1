"""A block's calls side by side, each waiting where it comes to a weight that has no codes yet: so every weight is
solved on what those before it in the block give as codes, and the block runs once."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from halfbyte.kernels.half import half_products
from halfbyte.solvers import Call


@contextmanager
def together(ops: Mapping[str, nn.Module]) -> Iterator[list[list[str]]]:
    """The ops' names as they are used inside, in order, those that are fed the same tensor together."""
    turns: list[list[str]] = []
    known: set[str] = set()
    last: list[Tensor] = []

    def look(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if name in known:
            return
        known.add(name)
        if last and last[0] is args[0]:
            turns[-1].append(name)
        else:
            turns.append([name])
        last[:] = args[:1]

    with ExitStack() as stack:
        for name, op in ops.items():
            stack.callback(op.register_forward_pre_hook(partial(look, name)).remove)
        yield turns


@dataclass(frozen=True)
class Turns:
    """ops: those whose weights are to be solved, by name; order: their names as `together` found them. One that is not
    among these has a turn of its own. given: what the block gives on each call, by its number, once all is iterated."""

    block: nn.Module
    calls: list[Call]
    ops: Mapping[str, nn.Module]
    order: list[list[str]]
    given: dict[int, Tensor] = field(default_factory=dict)

    @property
    def half(self) -> bool:
        return self.calls[0].half

    def __iter__(self) -> Generator[tuple[list[str], list[Tensor]]]:
        """The names of ops, and what they are fed by the calls that use them, in the calls' order: once each, and only
        then are they run, with the weights that they have when the next is asked for."""
        at = {name: (i, names) for i, names in enumerate(self.order) for name in names}
        done: set[str] = set()
        driver = getcurrent()

        def wait(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
            if name not in done:
                driver.switch(name, args[0])

        with ExitStack() as stack:
            for name, op in self.ops.items():
                stack.callback(op.register_forward_pre_hook(partial(wait, name)).remove)
            running = [greenlet(partial(self._run, i)) for i in range(len(self.calls))]
            for g in running:
                stack.callback(g.throw)  # what still waits when this is left early
            waiting = {i: found for i, g in enumerate(running) if (found := self._go_on(g))}
            while waiting:
                _, names = min(at.get(name, (len(at), [name])) for name, _ in waiting.values())
                here = sorted(i for i, (name, _) in waiting.items() if name in names)
                yield names, [waiting[i][1] for i in here]
                done.update(names)
                for i in here:
                    del waiting[i]
                    if found := self._go_on(running[i]):
                        waiting[i] = found

    def _run(self, i: int) -> None:
        self.given[i] = replace(self.calls[i], half=False)(self.block)

    def _go_on(self, g: greenlet) -> tuple[str, Tensor] | None:
        """Runs a call until it waits again: for which op, and what that is fed. Products in bfloat16 are a state of the
        thread, not of the call, so that it is set here."""
        with half_products(self.half):
            return g.switch()
