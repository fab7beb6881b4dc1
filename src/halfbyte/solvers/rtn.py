"""Round to nearest: each weight by itself, with the scale search that its format names. No data; where the mean squares
of the inputs are known, they weigh the search's errors (an importance matrix)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from halfbyte import kernels
from halfbyte.formats import Format
from halfbyte.qtensor import QParams, QTensor

SAYS = "round to nearest, scales by the search that measured best for each format; it needs no text, and weighs by it"


def solve(
    block: nn.Module, inputs: list[Any] | None, targets: list[Tensor] | None, sites: Mapping[str, Any]
) -> dict[str, QTensor]:
    """See halfbyte.solvers.Solve."""
    return {
        name: quantize(site.op.weight.value(), site.format, None if site.moments is None else site.moments.squares)
        for name, site in sites.items()
    }


def quantize(w: Tensor, f: Format, squares: Tensor | None = None) -> QTensor:
    """w (..., out, in) rounded to nearest. squares: of the inputs, float32 (in,)."""
    return kernels.quantize(w, f, None if squares is None else weighed(w, f, squares))


def weighed(w: Tensor, f: Format, squares: Tensor) -> QParams:
    """Scales by the least sum of squared errors, each times the mean square of its input."""
    return kernels.qparams(w, f, "mse", squares)
