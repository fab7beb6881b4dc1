"""LoRA (arXiv:2106.09685): W0 + s B A, with A (r, in), B (out, r) and s = lora_alpha / r.

Where A and B begin is a row of STARTS. Those of a start that `moves`, whose B0 A0 is not 0, add what they have changed
by: s (B A - B0 A0). That is what training beside the residual base W0 - s B0 A0 gives, and the base stays as it is. It
is computed as s ((B - B0) A + B0 (A - A0)): exactly 0 at first, and in 16 bit no difference of large numbers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfbyte.adapters.starts import EMBEDDING, check, start
from halfbyte.errors import InputError
from halfbyte.layers import Weight


class LowRank(nn.Module):
    """A and B for one weight, and their settings. Both are float32, whatever the model's dtype.

    use_rslora: s = lora_alpha / sqrt(r) (arXiv:2312.03732). init_lora_weights: a name of STARTS, or True; told: what
    that start has to be told; looked_up: the weight is an embedding's. Raises InputError for a rank below 1, and for a
    start that cannot be.
    """

    lora_A0: Tensor | None  # noqa: N815
    lora_B0: Tensor | None  # noqa: N815

    def __init__(
        self,
        weight: Weight,
        r: int = 16,
        lora_alpha: float = 32,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        told: Tensor | None = None,
        looked_up: bool = False,
    ) -> None:
        super().__init__()
        if r < 1:
            raise InputError(f"--r must be at least 1, not {r}.")
        if not 0 <= lora_dropout < 1:
            raise InputError(f"--lora-dropout must be at least 0 and below 1, not {lora_dropout}.")
        check(True if looked_up else init_lora_weights, r, weight.shape)
        self.r, self.lora_alpha, self.lora_dropout, self.use_rslora = r, lora_alpha, lora_dropout, use_rslora
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        begin, self.looked_up = EMBEDDING if looked_up else start(init_lora_weights), looked_up
        a, b = begin.make(weight, r, self.scaling, told)
        self.lora_A, self.lora_B = nn.Parameter(a), nn.Parameter(b)
        self.register_buffer("lora_A0", a.clone() if begin.moves else None)
        self.register_buffer("lora_B0", b.clone() if begin.moves else None)

    def dropped(self, x: Tensor) -> Tensor:
        """x (..., in), with dropout in training."""
        return F.dropout(x, self.lora_dropout, self.training)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """(A, B) of the products whose sum is what is added, without s."""
        if self.lora_A0 is None or self.lora_B0 is None:
            return [(self.lora_A, self.lora_B)]
        return [(self.lora_A, self.lora_B - self.lora_B0), (self.lora_A - self.lora_A0, self.lora_B0)]

    def factored(self, x: Tensor) -> Tensor:
        """B (A x), without s: (..., out), in x's dtype."""
        first, *rest = (F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) for a, b in self._pairs())
        return sum(rest, first)

    def low_rank(self) -> Tensor:
        """s B A, float32 (out, in)."""
        first, *rest = (b.float() @ a.float() for a, b in self._pairs())
        return self.scaling * sum(rest, first)

    def _joined(self) -> tuple[Tensor, Tensor]:
        """A and B of a plain LoRA: of one that moved, of twice the rank."""
        a, b = zip(*self._pairs(), strict=True)
        return torch.cat(a).detach(), torch.cat(b, 1).detach()

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r), float32: s B A is what is added, with the settings' alpha and r."""
        return self._joined()

    def state(self) -> dict[str, Tensor]:
        """`_joined`, by PEFT's names."""
        if self.looked_up:  # which PEFT holds turned: its rows are columns of what is looked up
            return {"lora_embedding_A": self.lora_B.detach().T, "lora_embedding_B": self.lora_A.detach().T}
        a, b = self._joined()
        return {"lora_A.weight": a, "lora_B.weight": b}

    def settings(self) -> dict[str, Any]:
        """Those of the plain LoRA that `state` is; alpha follows the rank, so that s stays."""
        times = len(self._pairs())
        return {
            "peft_type": "LORA",
            "r": times * self.r,
            "lora_alpha": self.lora_alpha * (math.sqrt(times) if self.use_rslora else times),
            "lora_dropout": self.lora_dropout,
            "use_rslora": self.use_rslora,
            "use_dora": False,
        }


class Lora(LowRank):
    """The low-rank adapter of one weight."""

    def rows(self, ids: Tensor, y: Tensor) -> Tensor:
        """y, the rows of an embedding that ids (...) name: (..., width), to which those of s B A are added."""
        b = F.embedding(ids, self.lora_B).to(y.dtype)
        return y + (b @ self.lora_A.to(y.dtype)) * self.scaling

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.factored(self.dropped(x)) * self.scaling

    def delta(self) -> Tensor:
        """s B A, float32 (out, in)."""
        return self.low_rank()
