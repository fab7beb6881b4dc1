"""Float weights of a block -> QTensors. A solver is a file here and a row in SOLVERS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from halfbyte.errors import InputError
from halfbyte.formats import Format
from halfbyte.layers import Op
from halfbyte.qtensor import QTensor
from halfbyte.solvers import rtn


@dataclass(frozen=True)
class Site:
    """A weight to be quantized: the op that uses it, and into which format."""

    op: Op
    format: Format


class Solve(Protocol):
    """block: a module whose ops are float. inputs: what it was fed on calibration data, targets: what the float
    model gave, each a list of (tokens, width) or None for a solver that needs none. Sites by op's name."""

    def __call__(
        self,
        block: nn.Module,
        inputs: list[Tensor] | None,
        targets: list[Tensor] | None,
        sites: Mapping[str, Site],
    ) -> dict[str, QTensor]: ...


@dataclass(frozen=True)
class Solver:
    """needs_data: whether calibration text is needed; says: what is printed of it."""

    name: str
    solve: Solve
    needs_data: bool
    says: str


SOLVERS: dict[str, Solver] = {"rtn": Solver("rtn", rtn.solve, False, rtn.SAYS)}


def solver(name: str) -> Solver:
    """Raises InputError for an unknown one."""
    if name not in SOLVERS:
        raise InputError(f"--solver {name}: there is no such solver; those are {', '.join(SOLVERS)}.")
    return SOLVERS[name]
