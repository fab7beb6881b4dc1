"""Distillation (arXiv:1503.02531): a model is held to what another says of every token, not to the text alone.

    KL(p || q) = sum_v p_v (log p_v - log q_v),      dKL/dz = q - p

with p the teacher's distribution over the vocabulary, q the student's and z the logits that q comes from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.data import Batch

_ROWS = 256  # whose distributions are in memory at a time


@dataclass(frozen=True)
class Distillation:
    """A loss as `train` takes it. share: of the divergence from the teacher; the rest is cross-entropy."""

    teacher: nn.Module
    share: float = 1.0

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Summed over the batch's targets, in float32."""
        with torch.no_grad():
            theirs, _ = targets(self.teacher, batch)
        ours, labels = targets(model, batch)
        loss = self.share * kl(ours, theirs)
        if self.share < 1:
            loss = loss + (1 - self.share) * nn.functional.cross_entropy(ours.float(), labels, reduction="sum")
        return loss


def targets(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The logits of what is to be predicted, in the model's dtype (targets, vocabulary or classes), and the labels."""
    logits = model(**batch.inputs).logits
    if batch.labels.ndim == 1:
        return logits, batch.labels
    labels = batch.labels[:, 1:]
    wanted = labels != -100
    return logits[:, :-1][wanted], labels[wanted]


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of logits (n, vocabulary), summed over n in float32; differentiable in the student's."""
    return _Kl.apply(student, teacher)  # pyright: ignore[reportReturnType]


class _Kl(torch.autograd.Function):
    """Makes the gradient along with the loss, some rows at a time: no distribution is kept."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        total, gradient = torch.zeros((), device=student.device), torch.empty_like(student)
        for z, t, g in zip(student.split(_ROWS), teacher.split(_ROWS), gradient.split(_ROWS), strict=True):
            q, p = z.float().log_softmax(-1), t.float().log_softmax(-1)
            likely = p.exp()
            total += (likely * (p - q)).sum()
            g.copy_(q.exp_().sub_(likely))
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None
