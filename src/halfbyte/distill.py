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


Predicts = Callable[[Batch], Tensor]  # a teacher: of a batch's targets the logits, (targets, vocabulary), or others


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
    return _Kl.apply(student, teacher, lambda t, log_q: t.float().log_softmax(-1))  # pyright: ignore[reportReturnType]


def kl_of_likeliest(student: Tensor, kept: Tensor) -> Tensor:
    """KL(teacher || student) where of the teacher its likeliest tokens are known, and how likely all others are
    together: the whole divergence is this or more, and this where the student parts the others as the teacher does.
    Summed over n in float32; differentiable in the student's logits (n, vocabulary). kept: see `likeliest`."""
    return _Kl.apply(student, kept, _parted)  # pyright: ignore[reportReturnType]


def _parted(kept: Tensor, log_q: Tensor) -> Tensor:
    """The teacher's log p (n, vocabulary), its others parted as in q."""
    log_p, bits = kept.chunk(2, -1)
    these = bits.contiguous().view(torch.int32).long()
    others_p = (1 - log_p.exp().sum(-1, keepdim=True)).clamp(min=torch.finfo(torch.float32).eps).log()
    others_q = log_q.scatter(1, these, -torch.inf).logsumexp(-1, keepdim=True)
    return (log_q + (others_p - others_q)).scatter(1, these, log_p)


class _Kl(torch.autograd.Function):
    """Makes the gradient along with the loss, some rows at a time: no distribution is kept."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, log_p: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """log_p: the teacher's distribution from what of it is given, and the student's."""
        total, gradient = torch.zeros((), device=student.device), torch.empty_like(student)
        for z, t, g in zip(student.split(_ROWS), teacher.split(_ROWS), gradient.split(_ROWS), strict=True):
            q = z.float().log_softmax(-1)
            p = log_p(t, q)
            likely = p.exp()
            total += (likely * (p - q)).sum()
            g.copy_(q.exp_().sub_(likely))
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None


@dataclass(frozen=True)
class Distillation:
    """A loss as `train` takes it. share: of the divergence from the teacher; the rest is cross-entropy. apart: how far
    the student's logits are from what the teacher gives."""

    teacher: Predicts
    share: float = 1.0
    apart: Callable[[Tensor, Tensor], Tensor] = kl

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Summed over the batch's targets, in float32."""
        with torch.no_grad():
            theirs = self.teacher(batch)
        ours, labels = targets(model, batch)
        loss = self.share * self.apart(ours, theirs)
        if self.share < 1:
            loss = loss + (1 - self.share) * nn.functional.cross_entropy(ours.float(), labels, reduction="sum")
        return loss


def asked(teacher: nn.Module) -> Predicts:
    """A teacher that is run on every batch."""
    return lambda batch: targets(teacher, batch)[0]


class Kept:
    """What a teacher says of every target, found once and kept in a file."""

    @torch.no_grad()
    def __init__(self, found: Predicts, batches: Iterable[Batch], file: Path) -> None:
        """found: of a batch, (targets, width), of one dtype. Raises InputError for labels of whole texts."""
        self._where: dict[bytes, tuple[int, int]] = {}
        count, rows = 0, torch.empty(0, 1)
        with file.open("wb") as f:
            for batch in batches:
                if batch.labels.ndim == 1:
                    raise InputError("--cache-teacher keeps what is said of tokens; leave it out for labels.")
                rows, (keys, counts) = found(batch), _rows(batch)
                for row, key in zip(rows.split(counts), keys, strict=True):
                    if key not in self._where:
                        f.write(row.contiguous().view(torch.uint8).numpy().tobytes())
                        self._where[key] = count, len(row)
                        count += len(row)
        self._dtype, self._width = rows.dtype, rows.shape[-1]
        size = count * self._width * self._dtype.itemsize
        self._all = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8) if size else None

    def __call__(self, batch: Batch) -> Tensor:
        """(targets, width), of a batch whose rows were seen."""
        keys, _ = _rows(batch)
        places = torch.cat([torch.arange(at, at + n) for at, n in (self._where[key] for key in keys)])
        assert self._all is not None
        return self._all.view(self._dtype).reshape(-1, self._width)[places]


def remembered(teacher: nn.Module, head: nn.Module, batches: Iterable[Batch], file: Path) -> Predicts:
    """A teacher that is run once: its last hidden states are kept, in its dtype, and its head, which is all that must
    stay in memory, is run on them again. Raises InputError where the model does more with its head's product than give
    it back."""
    seen: list[Tensor] = []
    checked = False

    def states(batch: Batch) -> Tensor:
        nonlocal checked
        logits, _ = targets(teacher, batch)
        found = seen.pop()[:, :-1][batch.labels[:, 1:] != -100]
        if not checked:
            _check(head(found), logits)
            checked = True
        return found

    hook = head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        kept = Kept(states, batches, file)
    finally:
        hook.remove()
    return lambda batch: head(kept(batch))


def _check(again: Tensor, logits: Tensor) -> None:
    digits = 4 if logits.dtype.itemsize == 2 else 64  # by which products of other shapes may differ
    off = digits * torch.finfo(logits.dtype).eps * logits.float().abs().max()
    if not (again.float() - logits.float()).abs().max() <= off:
        raise InputError("--cache-teacher: this model changes its logits after its head; leave it out.")


def likeliest(teacher: nn.Module, k: int, batches: Iterable[Batch], file: Path) -> Predicts:
    """A teacher that is run once, for `kl_of_likeliest`: log p of every target's k likeliest tokens is kept, and then
    their numbers, as int32's bits: (targets, 2 k), float32."""

    def top(batch: Batch) -> Tensor:
        logits, _ = targets(teacher, batch)
        values, indices = logits.topk(min(k, logits.shape[-1]))
        rest = logits.float().logsumexp(-1, keepdim=True)
        return torch.cat([values.float() - rest, indices.int().view(torch.float32)], -1)

    return Kept(top, batches, file)


def _rows(batch: Batch) -> tuple[list[bytes], list[int]]:
    """Of each row: what tells it from others, up to its last target; and how many targets it has."""
    wanted = batch.labels[:, 1:] != -100
    keys = []
    for i, row in enumerate(wanted):
        end = int(row.nonzero().max()) + 2 if row.any() else 0
        places = torch.arange(batch.labels.shape[1]).expand_as(batch.labels)
        told = [batch.input_ids, batch.labels, places if batch.position_ids is None else batch.position_ids]
        keys.append(hashlib.sha256(torch.stack([t[i, :end] for t in told]).numpy().tobytes()).digest())
    return keys, wanted.sum(1).tolist()
