"""Distillation (arXiv:1503.02531): a model is held to what another says of every token, not to the text alone.

    KL(p || q) = sum_v p_v (log p_v - log q_v),      dKL/dz = q - p

with p the teacher's distribution over the vocabulary, q the student's and z the logits that q comes from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.data import Batch
from halfbyte.errors import InputError

_ROWS = 256  # whose distributions are in memory at a time


Predicts = Callable[[Batch], Tensor]  # a teacher: the logits of a batch's targets, (targets, vocabulary)


@dataclass(frozen=True)
class Distillation:
    """A loss as `train` takes it. share: of the divergence from the teacher; the rest is cross-entropy."""

    teacher: Predicts
    share: float = 1.0

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Summed over the batch's targets, in float32."""
        with torch.no_grad():
            theirs = self.teacher(batch)
        ours, labels = targets(model, batch)
        loss = self.share * kl(ours, theirs)
        if self.share < 1:
            loss = loss + (1 - self.share) * nn.functional.cross_entropy(ours.float(), labels, reduction="sum")
        return loss


def asked(teacher: nn.Module) -> Predicts:
    """A teacher that is run on every batch."""
    return lambda batch: targets(teacher, batch)[0]


class Remembered:
    """A teacher that is run once: its last hidden states of the targets are kept in a file, and its head, which is all
    that must stay in memory, is run on them again."""

    @torch.no_grad()
    def __init__(self, teacher: nn.Module, head: nn.Module, batches: Iterable[Batch], file: Path) -> None:
        """file: to be written, dtype of the states, (targets, width). Raises InputError where the model does more with
        its head's product than give it back."""
        self._head, self._file, self._where = head, file, dict[bytes, tuple[int, int]]()
        seen: list[Tensor] = []
        hook = head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        count = 0
        try:
            with file.open("wb") as f:
                for batch in batches:
                    if batch.labels.ndim == 1:
                        raise InputError("--cache-teacher keeps what is said of tokens; leave it out for labels.")
                    logits, _ = targets(teacher, batch)
                    states = seen.pop()
                    if not count:
                        self._check(states[:, :-1][batch.labels[:, 1:] != -100], logits)
                    for row, key, wanted in zip(states, *_rows(batch), strict=True):
                        if key not in self._where:
                            kept = row[wanted]
                            f.write(kept.contiguous().view(torch.uint8).numpy().tobytes())
                            self._where[key] = count, len(kept)
                            count += len(kept)
        finally:
            hook.remove()
        self._dtype, self._width = states.dtype, states.shape[-1]
        size = count * self._width * self._dtype.itemsize
        self._states = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8) if size else None

    def _check(self, states: Tensor, logits: Tensor) -> None:
        again = self._head(states)
        digits = 4 if logits.dtype.itemsize == 2 else 64  # by which products of other shapes may differ
        off = digits * torch.finfo(logits.dtype).eps * logits.float().abs().max()
        if not (again.float() - logits.float()).abs().max() <= off:
            raise InputError("--cache-teacher: this model changes its logits after its head; leave it out.")

    def __call__(self, batch: Batch) -> Tensor:
        keys, _ = _rows(batch)
        places = torch.cat([torch.arange(at, at + n) for at, n in (self._where[key] for key in keys)])
        assert self._states is not None
        states = self._states.view(self._dtype).reshape(-1, self._width)
        return self._head(states[places])


def _rows(batch: Batch) -> tuple[list[bytes], list[Tensor]]:
    """Of each row: what tells it from others, up to its last target; and the places whose next token is a target."""
    wanted = torch.nn.functional.pad(batch.labels[:, 1:] != -100, (0, 1))
    keys = []
    for i, row in enumerate(wanted):
        end = int(row.nonzero().max()) + 2 if row.any() else 0
        places = torch.arange(batch.labels.shape[1]).expand_as(batch.labels)
        told = [batch.input_ids, batch.labels, places if batch.position_ids is None else batch.position_ids]
        keys.append(hashlib.sha256(torch.stack([t[i, :end] for t in told]).numpy().tobytes()).digest())
    return keys, list(wanted)


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
