"""LoRA (arXiv:2106.09685): W0 + s B A, with A (r, in) random, B (out, r) zero and s = lora_alpha / r."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfbyte.errors import InputError
from halfbyte.layers import Weight


class LowRank(nn.Module):
    """A and B for one weight, and their settings. Both are float32, whatever the model's dtype.

    use_rslora: s = lora_alpha / sqrt(r) (arXiv:2312.03732). Raises InputError for a rank below 1.
    """

    def __init__(
        self,
        weight: Weight,
        r: int = 16,
        lora_alpha: float = 32,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
    ) -> None:
        super().__init__()
        if r < 1:
            raise InputError(f"--r must be at least 1, not {r}.")
        if not 0 <= lora_dropout < 1:
            raise InputError(f"--lora-dropout must be at least 0 and below 1, not {lora_dropout}.")
        out_features, in_features = weight.shape
        self.r, self.lora_alpha, self.lora_dropout, self.use_rslora = r, lora_alpha, lora_dropout, use_rslora
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.lora_A = nn.Parameter(torch.empty(r, in_features, device=weight.device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r, device=weight.device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def dropped(self, x: Tensor) -> Tensor:
        """x (..., in), with dropout in training."""
        return F.dropout(x, self.lora_dropout, self.training)

    def factored(self, x: Tensor) -> Tensor:
        """B (A x), without s: (..., out), in x's dtype."""
        return F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))

    def low_rank(self) -> Tensor:
        """s B A, float32 (out, in)."""
        return self.scaling * (self.lora_B.float() @ self.lora_A.float())

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r), float32: s B A is what is added."""
        return self.lora_A.detach().float(), self.lora_B.detach().float()

    def state(self) -> dict[str, Tensor]:
        return {"lora_A.weight": self.lora_A.detach(), "lora_B.weight": self.lora_B.detach()}

    def settings(self) -> dict[str, Any]:
        return {
            "peft_type": "LORA",
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "use_rslora": self.use_rslora,
            "use_dora": False,
        }


class Lora(LowRank):
    """The low-rank adapter of one weight."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.factored(self.dropped(x)) * self.scaling

    def delta(self) -> Tensor:
        """s B A, float32 (out, in)."""
        return self.low_rank()
