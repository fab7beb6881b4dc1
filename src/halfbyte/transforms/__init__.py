"""A float model -> one that computes the same and quantizes better. A transform is a file here, a row in TRANSFORMS."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from halfbyte.errors import InputError
from halfbyte.formats import Format
from halfbyte.transforms import awq, hadamard, smooth

if TYPE_CHECKING:
    from halfbyte.models import Edges


@dataclass(frozen=True)
class Fed:
    """What an op is fed on calibration text. largest: the largest magnitude of each input, float32 (in,). rows: tokens'
    inputs, drawn at random, (n, in)."""

    largest: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Target:
    """What an op is to be quantized to: its weight, and its inputs where they are rounded."""

    weight: Format
    input: Format | None = None


class Apply(Protocol):
    """model: materialized, its ops' weights floats without adapters; changed in place. edges: where its channels go.
    fed, targets: by op's name, for those that have some. seed: of what is drawn at random. Gives back what is noted of
    it. Raises InputError, before anything is touched, for a model that it cannot be done to."""

    def __call__(
        self, model: nn.Module, edges: Edges, fed: Mapping[str, Fed], targets: Mapping[str, Target], seed: int
    ) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Transform:
    """says: what is printed of it. needs_data: whether it takes what ops are fed, and what they become. rounds_inputs:
    whether it is for schemes that round inputs. unties: whether the head must have a weight of its own. refuses: why
    the edges of a model do not let it, in words."""

    name: str
    apply: Apply
    says: str
    needs_data: bool = False
    rounds_inputs: bool = False
    unties: bool = False
    refuses: Callable[[Edges], str | None] = lambda edges: None


TRANSFORMS: dict[str, Transform] = {
    t.name: t
    for t in (
        Transform("awq", awq.apply, awq.SAYS, True),
        Transform("smooth", smooth.apply, smooth.SAYS, True, True),
        Transform("hadamard", hadamard.apply, hadamard.SAYS, unties=True, refuses=hadamard.refuses),
    )
}


def transform(name: str) -> Transform:
    """Raises InputError for an unknown one."""
    if name not in TRANSFORMS:
        raise InputError(f"--transform {name}: there is no such transform; those are {', '.join(TRANSFORMS)}.")
    return TRANSFORMS[name]


def check_untie(untie: bool, names: Sequence[str]) -> None:
    """Raises InputError for a leave that no transform is there to use."""
    if untie and not any(transform(name).unties for name in names):
        those = " or ".join(t.name for t in TRANSFORMS.values() if t.unties)
        raise InputError(f"--untie: nothing gives the head a weight of its own without --transform {those}.")
