"""AWQ: weights that are multiplied with large inputs are made larger before they are rounded, so that their errors
weigh less (arXiv:2306.00978)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from halfbyte.transforms import scaling

if TYPE_CHECKING:
    from halfbyte.models import Edge, Edges
    from halfbyte.transforms import Fed, Target

SAYS = "activation-aware scaling of channels"
ALPHAS = [i / 20 for i in range(20)]


def apply(
    model: nn.Module, edges: Edges, fed: Mapping[str, Fed], targets: Mapping[str, Target], seed: int
) -> dict[str, Any]:
    """See halfbyte.transforms.Apply. Scales are mean magnitudes of inputs to a power that is chosen for each edge."""

    def candidates(edge: Edge, x: Fed) -> dict[float, Tensor]:
        mean = scaling.by_channel(edge, x.rows.abs().double().mean(0), "mean")
        return {a: mean**a for a in ALPHAS}

    return scaling.choose(model, edges, fed, targets, candidates, inputs=False)
