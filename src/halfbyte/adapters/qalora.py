"""QA-LoRA (arXiv:2309.14717): s B A on inputs that are pooled by the groups of a quantized base, so that it adds one
number to all weights of a group, which the group's zero point takes in: merged, the codes are what they were.

As PEFT has it: of n inputs in groups of g, A (r, n / g) sees each group's mean times n / g, so that a weight of the
group p gets (s n / g^2) (B A)[:, p].

Of that a zero point holds what its dtype does, which in 16 bit is nothing of a small number. So in eval the sum of a
group's inputs is multiplied with what the zero point will have changed by once it is merged: what is measured beside
codes is what ships. Training sees the sum itself, of which it learns more: rounding changes with every step, and the
loss with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfbyte.adapters.lora import LowRank
from halfbyte.errors import InputError
from halfbyte.layers import Codes, Linear, Weight
from halfbyte.qtensor import unshiftable


class QaLora(LowRank):
    """The adapter of one weight. qalora_group_size: how many neighbouring inputs share a number. Raises InputError
    where that does not divide the inputs."""

    def __init__(self, weight: Weight, qalora_group_size: int, **settings: Any) -> None:
        inputs = weight.shape[1]
        if type(qalora_group_size) is not int or qalora_group_size < 1 or inputs % qalora_group_size:
            raise InputError(f"qalora_group_size {qalora_group_size} does not divide the {inputs} inputs of a layer.")
        super().__init__(weight, **settings)
        self.qalora_group_size, self.groups = qalora_group_size, inputs // qalora_group_size
        a = torch.empty(self.r, self.groups, device=weight.device, dtype=torch.float32)
        self.lora_A = nn.Parameter(nn.init.kaiming_uniform_(a, a=math.sqrt(5)))
        self._held: tuple[object, object, Tensor] | None = None

    def forward(self, x: Tensor, y: Tensor, op: Linear | None = None) -> Tensor:
        if op is not None and not self.training and (held := self.held(op.weight)) is not None:
            return y + F.linear(x.unflatten(-1, (held.shape[-1], -1)).sum(-1), held.to(x.dtype))
        pooled = self.dropped(x).unflatten(-1, (self.groups, -1)).mean(-1) * self.groups
        return y + self.factored(pooled) * self.scaling

    def held(self, weight: Weight) -> Tensor | None:
        """What the zero points of the weight's codes hold of `shift`: float32 (out, groups of the codes), with the
        gradient of it all. None where these take none in."""
        made, sources = weight.stored, (self.lora_A, self.lora_B)
        if torch.is_grad_enabled() or any(t.is_inference() for t in sources):  # which do not count their changes
            by = self.shift()
            taken = weight.taken_in(by)
            if taken is None:
                return None
            whole = by.repeat_interleave(taken.shape[-1] // by.shape[-1], -1)
            return whole + (taken - whole).detach()
        state = tuple((t._version, t.data_ptr()) for t in sources)
        if self._held is None or self._held[0] is not made or self._held[1] != state:
            taken = weight.taken_in(self.shift())
            if taken is None:
                return None
            self._held = made, state, taken
        return self._held[2]

    def shift(self) -> Tensor:
        """What is added to every weight of a group: float32 (out, groups)."""
        return self.low_rank() * (self.groups / self.qalora_group_size)

    def delta(self) -> Tensor:
        """The shifts, each for all of its group: float32 (out, in)."""
        return self.shift().repeat_interleave(self.qalora_group_size, 1)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of the LoRA that adds the same."""
        a, b = super().factors()
        return a.repeat_interleave(self.qalora_group_size, 1) * (self.groups / self.qalora_group_size), b

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "use_qalora": True, "qalora_group_size": self.qalora_group_size}


def group_size(weights: Mapping[str, Weight]) -> int:
    """The smallest number of neighbours that are whole groups of every base (by its op's name). Raises InputError where
    a base has no zero points that take a shift in, or there is no such number that divides all inputs: to PEFT it is
    one for all layers."""
    sizes: dict[str, int] = {}
    for name, w in weights.items():
        if not isinstance(w.stored, Codes):
            raise InputError(f"use_qalora: {name} is no codes, whose zero points would take in what is learned.")
        if (why := unshiftable(w.stored.q)) is not None:
            raise InputError(f"use_qalora: {name}: {why}.")
        sizes[name] = _group(w.stored, w)
    size = math.lcm(*sizes.values())
    if uneven := next((n for n, w in weights.items() if w.shape[1] % size), None):
        found = ", ".join(map(str, sorted(set(sizes.values()))))
        raise InputError(
            f"use_qalora: the base's groups are of {found}, and none but {size} holds them all, which does not divide "
            f"the {weights[uneven].shape[1]} inputs of {uneven}: choose a --group-size that all layers have."
        )
    return size


def check_group_size(weights: Mapping[str, Weight], size: Any) -> None:
    """Raises InputError for a size of which codes have longer groups: what is learned would differ within one, and no
    zero point takes that in."""
    for name, w in weights.items():
        if type(size) is not int or not isinstance(w.stored, Codes) or unshiftable(w.stored.q) is not None:
            continue
        if size % (group := _group(w.stored, w)):
            raise InputError(
                f"qalora_group_size {size}: the codes of {name} have groups of {group}, and a zero point for each; "
                f"give a multiple of {group}."
            )


def _group(codes: Codes, weight: Weight) -> int:
    """How many neighbouring inputs share a zero point."""
    group = codes.q.format.group
    return group if isinstance(group, int) else weight.shape[1]
