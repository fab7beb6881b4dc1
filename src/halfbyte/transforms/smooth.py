"""SmoothQuant: inputs that stand out are made smaller, and the weights that they meet larger, until both can be rounded
(arXiv:2211.10438)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from halfbyte.transforms import folding, scaling

if TYPE_CHECKING:
    from halfbyte.models import Edge, Edges
    from halfbyte.transforms import Fed, Target

SAYS = "what stands out in inputs is moved into the weights"
ALPHAS = [i / 20 for i in range(6, 20)]


def apply(
    model: nn.Module, edges: Edges, fed: Mapping[str, Fed], targets: Mapping[str, Target], seed: int
) -> dict[str, Any]:
    """See halfbyte.transforms.Apply. Scales are max|x|^a / max|w|^(1 - a), with an `a` that is chosen for each edge."""

    def candidates(edge: Edge, x: Fed) -> dict[float, Tensor]:
        w = torch.stack([folding.matrix(model, n).abs().amax(0) for n in edge.readers]).amax(0)
        weights, largest = (scaling.by_channel(edge, t.double(), "amax") for t in (w, x.largest))
        return {a: largest**a / weights ** (1 - a) for a in ALPHAS}

    return scaling.choose(model, edges, fed, targets, candidates, inputs=True)
