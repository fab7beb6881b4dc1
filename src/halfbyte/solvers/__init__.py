"""Float weights of a block -> QTensors. A solver is a file here and a row in SOLVERS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from halfbyte.errors import InputError
from halfbyte.formats import Format
from halfbyte.kernels.half import half_products
from halfbyte.layers import Op
from halfbyte.qtensor import QTensor
from halfbyte.solvers import autoround, gptq, hqq, rtn
from halfbyte.solvers.closing import Part


@dataclass(frozen=True)
class Moments:
    """What is known of an op's inputs from calibration text. squares: their mean squares, float32 (in,). gram: the mean
    of x x^T, float32 (in, in), or None where only the squares were asked for."""

    squares: Tensor
    gram: Tensor | None = None


@dataclass(frozen=True)
class Site:
    """A weight to be quantized: the op that uses it, into which format, and what is known of its inputs. closes:
    whether what it gives is added to what the block is, so that it can make good what was lost before it; of its inputs
    nothing is known beforehand: they come from the codes of the others. left: what the block is without it, once those
    before it have their codes, where that is known already. meant: the weight that its codes were found for, where that
    is not its own."""

    op: Op
    format: Format
    moments: Moments | None = None
    closes: bool = False
    left: list[Part] = field(default_factory=list)
    meant: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Call:
    """How a block is called: on the hidden states x (batch, tokens, width), with masks and positions. half: whether
    its products are in bfloat16. matter: which directions of what it gives matter, (width, width), or None if all do
    alike (see halfbyte.matters)."""

    x: Tensor
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    half: bool = False
    matter: Tensor | None = None

    def __call__(self, block: nn.Module) -> Tensor:
        """The hidden states that the block makes of it."""
        with half_products(self.half):
            out = block(self.x, *self.args, **self.kwargs)
        return out[0] if isinstance(out, tuple) else out


class Solve(Protocol):
    """block: a module whose ops are float. inputs: how it is called on calibration data, a list over batches; targets:
    what it gives in the float model, whose blocks before it are float too, (batch, tokens, width), or, where a site
    closes that is not the last to add to it, what it is there. Both None where there is no text, or no block: weights
    outside the blocks are solved together; and for those that are solved in turn by their moments. Sites by op's
    name."""

    def __call__(
        self,
        block: nn.Module,
        inputs: list[Call] | None,
        targets: list[Tensor] | None,
        sites: Mapping[str, Site],
    ) -> dict[str, QTensor]: ...


class Refine(Protocol):
    """Codes of all of a block's weights -> codes by which it gives what is nearer to the targets. As in Solve."""

    def __call__(
        self,
        block: nn.Module,
        inputs: list[Call],
        targets: list[Tensor],
        sites: Mapping[str, Site],
        codes: dict[str, QTensor],
    ) -> dict[str, QTensor]: ...


@dataclass(frozen=True)
class Solver:
    """needs_data: whether calibration text is needed; says: what is printed of it. uses: which moments of inputs it
    takes, "squares" (it does without where there are none), "gram" or nothing. outside: the solver of weights outside
    the blocks, for one that needs data. in_turn: whether a block's weights are solved one after the other, each on what
    those before it give as codes; else together. refine: what makes better codes of those of a whole block."""

    name: str
    solve: Solve
    needs_data: bool
    says: str
    uses: Literal["", "squares", "gram"] = ""
    outside: str = "gptq"
    in_turn: bool = False
    refine: Refine | None = None


SOLVERS: dict[str, Solver] = {
    s.name: s
    for s in (
        Solver("rtn", rtn.solve, False, rtn.SAYS, "squares"),
        Solver("hqq", hqq.solve, False, hqq.SAYS),
        Solver("gptq", gptq.solve, True, gptq.SAYS, "gram", in_turn=True),
        Solver("autoround", gptq.solve, True, autoround.SAYS, "gram", in_turn=True, refine=autoround.refine),
    )
}


def solver(name: str) -> Solver:
    """Raises InputError for an unknown one."""
    if name not in SOLVERS:
        raise InputError(f"--solver {name}: there is no such solver; those are {', '.join(SOLVERS)}.")
    return SOLVERS[name]
