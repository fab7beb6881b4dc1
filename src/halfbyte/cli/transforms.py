"""What is done to a model's floats before they become codes, as it is announced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from halfbyte.cli.console import say

if TYPE_CHECKING:
    from halfbyte.run import Run
    from halfbyte.steps import Transform


def announce(steps: Sequence[Transform], run: Run, say: Callable[[str], None] = say) -> None:
    """Says what will be done before. Raises InputError for what cannot be."""
    from halfbyte.scheme import to_scheme
    from halfbyte.transforms import transform

    for step in steps:
        row, scheme = transform(step.name), to_scheme(step.scheme, step.group_size)
        if row.rounds_inputs and not any(r.input for r in getattr(scheme, "rules", ())):
            say(f"--transform {step.name} is for schemes that round inputs: {scheme.name} does not, but it is done.")
        step.check(run)
        more = step.adds(run)
        apart = f"; the head gets a weight of its own, {more / 1e6:.1f} MB more" if more else ""
        say(f"  before: {row.says}{apart}")
