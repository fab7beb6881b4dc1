"""Float weights of a block -> QTensors. A solver is a file here and a row in SOLVERS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor, nn

from halfbyte.errors import InputError
from halfbyte.formats import Format
from halfbyte.layers import Op
from halfbyte.qtensor import QTensor
from halfbyte.solvers import gptq, rtn


@dataclass(frozen=True)
class Moments:
    """What is known of an op's inputs from calibration text. squares: their mean squares, float32 (in,). gram: the mean
    of x x^T, float32 (in, in), or None where only the squares were asked for."""

    squares: Tensor
    gram: Tensor | None = None


@dataclass(frozen=True)
class Site:
    """A weight to be quantized: the op that uses it, into which format, and what is known of its inputs."""

    op: Op
    format: Format
    moments: Moments | None = None


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
    """needs_data: whether calibration text is needed; says: what is printed of it. uses: which moments of inputs it
    takes, "squares" (it does without where there are none), "gram" or nothing."""

    name: str
    solve: Solve
    needs_data: bool
    says: str
    uses: Literal["", "squares", "gram"] = ""


SOLVERS: dict[str, Solver] = {
    s.name: s
    for s in (
        Solver("rtn", rtn.solve, False, rtn.SAYS, "squares"),
        Solver("gptq", gptq.solve, True, gptq.SAYS, "gram"),
    )
}


def solver(name: str) -> Solver:
    """Raises InputError for an unknown one."""
    if name not in SOLVERS:
        raise InputError(f"--solver {name}: there is no such solver; those are {', '.join(SOLVERS)}.")
    return SOLVERS[name]
