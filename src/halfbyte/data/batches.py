"""Batches: rows padded to one length, in an order that depends on the seed alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from halfbyte.data.encode import Dataset, Row
from halfbyte.errors import InputError

IGNORED = -100  # the label that torch's cross entropy leaves out


@dataclass(frozen=True, eq=False)
class Batch:
    """B rows of T tokens.

    input_ids (B, T) int64. labels (B, T) int64, not shifted (the model shifts), -100 where the loss does not
    count; (B,) class ids for classification. attention_mask (B, T) int64, for classification only.
    position_ids (B, T) int64 if rows are packed, else None. tokens: without padding. targets: how many tokens
    the loss counts.

    Causal batches carry no attention mask, on purpose. Padding is on the right, where no real token looks, so
    the fast causal kernel applies; and transformers finds packed samples by their restarting positions, but
    only if there is no mask. A 4-D mask would be right under fewer conditions: eager attention adds a boolean
    one to the scores as 0 and 1, a float one must have the model's dtype, and both replace a sliding window.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    tokens: int
    targets: int

    @property
    def inputs(self) -> dict[str, Any]:
        """Keyword arguments for the model's forward, without the labels.

        use_cache=False is part of them: transformers does not look for packed samples when there is a cache,
        and they would silently attend to each other.
        """
        if self.attention_mask is not None:
            return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        positions = {} if self.position_ids is None else {"position_ids": self.position_ids}
        return {"input_ids": self.input_ids, **positions, "use_cache": False}

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def batches(dataset: Dataset, batch_size: int, *, seed: int, pad_token_id: int, start: int = 0) -> Iterator[Batch]:
    """Full batches without end: an epoch has every row once, in an order of its own, and runs into the next.

    The stream depends on the seed and on the dataset's length only; start=n begins at the n-th batch (from 0)
    of the same stream, at no cost for those before. Raises InputError for an empty dataset or no batch size.
    """
    _check(dataset, batch_size)
    return _stream(dataset, batch_size, seed, pad_token_id, start)


def eval_batches(dataset: Dataset, batch_size: int, pad_token_id: int) -> Iterator[Batch]:
    """Every row once, in order; the last batch may be smaller. Raises InputError like batches."""
    _check(dataset, batch_size)
    slices = (dataset.rows[i : i + batch_size] for i in range(0, len(dataset), batch_size))
    return (_batch(rows, pad_token_id) for rows in slices)


def stacked(found: Sequence[Batch], size: int) -> list[Batch]:
    """The same rows in the same order, neighbours of one length up to `size` together: nothing is padded."""
    groups: list[list[Batch]] = []
    for batch in found:
        if groups and len(groups[-1]) < size and _alike(groups[-1][0], batch):
            groups[-1].append(batch)
        else:
            groups.append([batch])
    return [_joined(group) for group in groups]


def _alike(a: Batch, b: Batch) -> bool:
    return all(
        (x is None) == (y is None) and (not isinstance(x, Tensor) or x.shape == y.shape)
        for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
    )


def _joined(group: list[Batch]) -> Batch:
    parts = {k: torch.cat([getattr(b, k) for b in group]) for k, v in vars(group[0]).items() if isinstance(v, Tensor)}
    counts = {k: sum(getattr(b, k) for b in group) for k in ("tokens", "targets")}
    return replace(group[0], **parts, **counts)


def _check(dataset: Dataset, batch_size: int) -> None:
    if not len(dataset):
        raise InputError("The data holds no rows, so there is nothing to make a batch of.")
    if batch_size < 1:
        raise InputError(f"The batch size is {batch_size}; it must be at least 1.")


def _stream(dataset: Dataset, batch_size: int, seed: int, pad_token_id: int, start: int) -> Iterator[Batch]:
    epoch, at = divmod(start * batch_size, len(dataset))
    order = _order(len(dataset), seed, epoch)
    while True:
        rows = []
        while len(rows) < batch_size:
            if at == len(order):
                epoch, at = epoch + 1, 0
                order = _order(len(dataset), seed, epoch)
            rows.append(dataset.rows[order[at]])
            at += 1
        yield _batch(rows, pad_token_id)


def _order(length: int, seed: int, epoch: int) -> list[int]:
    order = list(range(length))
    random.Random(f"{seed}/{epoch}").shuffle(order)  # a string seed is hashed: near seeds are not alike
    return order


def _batch(rows: Sequence[Row], pad_token_id: int) -> Batch:
    shape = (len(rows), max(len(row) for row in rows))
    input_ids = torch.full(shape, pad_token_id, dtype=torch.long)
    segments = torch.full(shape, -1, dtype=torch.long)  # the padding is a segment of its own
    targets = torch.zeros(shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)], segments[i, : len(row)] = row.input_ids, row.segments
        targets[i, : len(row)] = row.targets
    tokens = sum(len(row) for row in rows)
    classes = [row.label for row in rows if row.label is not None]
    if classes:
        return Batch(input_ids, torch.tensor(classes), (segments >= 0).long(), None, tokens, len(classes))
    packed = any(int(row.segments[-1]) > 0 for row in rows)
    return Batch(
        input_ids=input_ids,
        labels=input_ids.masked_fill(~targets, IGNORED),
        attention_mask=None,
        position_ids=_positions(segments) if packed else None,
        tokens=tokens,
        targets=int(targets.sum()),
    )


def _positions(segments: Tensor) -> Tensor:
    """(B, T) int64: how far each token is from the start of its segment."""
    index = torch.arange(segments.shape[1]).expand_as(segments)
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values
