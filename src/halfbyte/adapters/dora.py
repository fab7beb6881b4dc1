"""DoRA (arXiv:2402.09353): m (W0 + s B A) / ||W0 + s B A|| by output row, with m (out,) trained beside LoRA's A and B.

m starts as the norms of W0's rows. As in PEFT (and section 4.3 of the paper), the norm follows A and B but has no
gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.adapters.lora import LowRank
from halfbyte.layers import Linear, Weight


class Dora(LowRank):
    """The adapter of one weight, of which it keeps nothing: it is given that anew each time. m is float32."""

    needs_base = True

    def __init__(self, weight: Weight, **settings: Any) -> None:
        super().__init__(weight, **settings)
        with torch.no_grad():  # B is 0; asked as it will be in training, so that m / norm is 1 exactly
            self.lora_magnitude_vector = nn.Parameter(_norms(self._moved(weight.base())))

    def forward(self, x: Tensor, y: Tensor, op: Linear) -> Tensor:
        with torch.no_grad():
            norms = _norms(self._moved(op.weight.base()))
        ratio = self.lora_magnitude_vector / norms
        if self.training and self.lora_dropout:
            x = self.dropped(x)
            product = op.product(x)  # y was made of an x that nothing was dropped from
        else:
            product = y if op.bias is None else y - op.bias.to(y.dtype)
        added = (ratio * self.scaling).to(x.dtype) * self.factored(x)
        return y + (ratio - 1).to(x.dtype) * product + added

    def delta(self, base: Tensor) -> Tensor:
        """What makes W' of W0 when it is added: float32 (out, in), from W0 (out, in)."""
        moved = self._moved(base)
        return (self.lora_magnitude_vector / _norms(moved.detach()))[:, None] * moved - base.float()

    def _moved(self, base: Tensor) -> Tensor:
        """W0 + s B A, float32 (out, in)."""
        return base.float() + self.low_rank()

    def state(self) -> dict[str, Tensor]:
        return {**super().state(), "lora_magnitude_vector": self.lora_magnitude_vector.detach()}

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "use_dora": True}


def _norms(w: Tensor) -> Tensor:
    """The norm of each row; not quite 0 for a row of zeros, which stays zeros rather than 0 / 0."""
    return torch.linalg.vector_norm(w, dim=1).clamp_min(torch.finfo(torch.float32).tiny)
