"""The least loss that so many bytes buy: a format for each weight (a multiple-choice knapsack)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

_STATES = 2000  # partial choices that are kept side by side; of more, those nearest to the bound


@dataclass(frozen=True)
class Option:
    """One format of a weight: what it loses, and the bytes it takes."""

    name: str
    loss: float
    bytes: int


Table = Mapping[str, Sequence[Option]]


def allocate(table: Table, budget: int) -> dict[str, Option]:
    """An option for each weight, so that the sum of losses is the least that `budget` bytes in all allow.

    Options are bought in the order of what a byte saves, along each weight's convex hull, until none fits: the optimum
    but for the last one, within a bound that the order gives. Then all choices that the bound leaves open are compared.
    That is exact, unless more than _STATES of them stand side by side. Raises ValueError if the smallest options take
    more bytes than there are.
    """
    useful = {w: _useful(options) for w, options in table.items()}
    if sum(o[0].bytes for o in useful.values()) > budget:
        raise ValueError(f"the smallest options take more than {budget} bytes")
    found, price = _greedy(useful, budget)
    return _exact(useful, budget, found, price)


def _useful(options: Sequence[Option]) -> list[Option]:
    """By bytes, each with less loss than all smaller ones."""
    out: list[Option] = []
    for o in sorted(options, key=lambda o: (o.bytes, o.loss)):
        if not out or o.loss < out[-1].loss:
            out.append(o)
    return out


def _hull(options: list[Option]) -> list[Option]:
    """Of useful options those on the lower convex hull: a byte saves less with each."""
    out: list[Option] = []
    for o in options:
        while len(out) > 1 and _saved(out[-2], out[-1]) <= _saved(out[-2], o):
            out.pop()
        out.append(o)
    return out


def _saved(a: Option, b: Option) -> float:
    """Loss that a byte saves on the way from a to b."""
    return (a.loss - b.loss) / (b.bytes - a.bytes)


def _greedy(table: Mapping[str, list[Option]], budget: int) -> tuple[dict[str, Option], float]:
    """The options bought in order, and what a byte saves in the first that does not fit: 0 if all do."""
    hulls = {w: _hull(options) for w, options in table.items()}
    found = {w: hull[0] for w, hull in hulls.items()}
    left, price = budget - sum(o.bytes for o in found.values()), 0.0
    steps = [(-_saved(a, b), i, w, b) for w, h in hulls.items() for i, (a, b) in enumerate(pairwise(h))]
    for saved, _, w, b in sorted(steps, key=lambda s: s[:3]):
        more = b.bytes - found[w].bytes
        if more <= left:
            found[w], left = b, left - more
        elif not price:
            price = -saved
    return found, price


@dataclass(frozen=True)
class _State:
    """A choice for the weights so far. over: what it pays more than the bound allows for, at the price of a byte."""

    bytes: int
    loss: float
    over: float
    last: tuple[str, Option] | None = None
    before: _State | None = None


def _exact(table: Mapping[str, list[Option]], budget: int, found: dict[str, Option], price: float) -> dict[str, Option]:
    """`found`, or what has less loss. At a price of a byte, no choice is cheaper than the cheapest of every weight; so
    one that is better than `found` pays, over these, no more than the difference."""
    least = {w: min(o.loss + price * o.bytes for o in options) for w, options in table.items()}
    gap = sum(o.loss for o in found.values()) - (sum(least.values()) - price * budget)
    if gap <= 0:
        return found
    smallest = sum(options[0].bytes for options in table.values())
    states = [_State(0, 0.0, 0.0)]
    for w, options in table.items():
        smallest -= options[0].bytes
        more = [
            _State(s.bytes + o.bytes, s.loss + o.loss, over, (w, o), s)
            for o in options
            if (cost := o.loss + price * o.bytes - least[w]) <= gap
            for s in states
            if (over := s.over + cost) <= gap and s.bytes + o.bytes + smallest <= budget
        ]
        states = _undominated(more)
    best = min(states, key=lambda s: s.loss, default=None)
    if best is None or best.loss >= sum(o.loss for o in found.values()):
        return found
    return _choices(best)


def _undominated(states: list[_State]) -> list[_State]:
    """Those with less loss than all smaller ones."""
    out: list[_State] = []
    for s in sorted(states, key=lambda s: (s.bytes, s.loss)):
        if not out or s.loss < out[-1].loss:
            out.append(s)
    return out if len(out) <= _STATES else sorted(out, key=lambda s: s.over)[:_STATES]


def _choices(state: _State) -> dict[str, Option]:
    out = []
    while state.last is not None and state.before is not None:
        out.append(state.last)
        state = state.before
    return dict(reversed(out))
