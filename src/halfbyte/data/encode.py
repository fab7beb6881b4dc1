"""From records to rows of tokens: what is trained on, what is masked, what shares a row."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from halfbyte.data.chat import encode_chat
from halfbyte.data.records import Record, records, sha256
from halfbyte.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Sample = tuple[list[int], list[bool]]  # token ids, and which of them are to be predicted


@dataclass(frozen=True, eq=False)
class Row:
    """A line of a batch: one sample or window, or several packed samples.

    input_ids (T,) int64; targets (T,) bool, the tokens that the loss counts, never the first of a segment,
    which nothing comes before; segments (T,) int64, 0, 0, .., 1, 1, ..: tokens attend within their segment.
    label: the class of a classification row, else None.
    """

    input_ids: Tensor
    targets: Tensor
    segments: Tensor
    label: int | None = None

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Encoded records.

    kind: "text", "messages", "completion", "label" or "classification". sha256: of the records' canonical
    JSON. skipped: pieces (windows of a long sample) left out since no token of theirs can be a target: parts
    of a prompt. truncated: texts cut to max_length; only classification cuts. labels: by class id.
    """

    rows: list[Row]
    kind: str
    sha256: str
    skipped: int = 0
    truncated: int = 0
    labels: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def tokens(self) -> int:
        return sum(len(row) for row in self.rows)

    @property
    def target_tokens(self) -> int:
        """How many predictions the loss of one pass counts."""
        if self.kind == "classification":
            return len(self.rows)
        return sum(int(row.targets.sum()) for row in self.rows)


def encode(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    packing: bool = True,
    completion_only_loss: bool = True,
    assistant_only_loss: bool = True,
    labels: Sequence[str] | None = None,
) -> Dataset:
    """Rows of at most max_length tokens for training or measuring a causal model; no text is ever cut off.

    Domain text is joined by the end-of-text token and cut into windows that do not overlap; a last lone
    token, which nothing comes before, is left out. Without `packing` every record ends with that token and is
    cut on its own. Other shapes: a sample longer than max_length becomes several, and with `packing` samples
    share rows as separate segments. `labels`: the only labels allowed in labelled text.

    Raises InputError if there are no records, if they differ in shape, if a record cannot be encoded, or if
    no token at all would be trained on.
    """
    kind = _one_kind(records)
    if max_length < 3:
        raise InputError(f"--max-length {max_length}: a row has at least 3 tokens.")
    if kind == "text" and packing:
        pieces = _windows_of(_joined(records, tokenizer), max_length)
    else:
        samples = _samples(records, tokenizer, completion_only_loss, assistant_only_loss, labels)
        pieces = [piece for sample in samples for piece in _pieces(sample, max_length)]
    kept = [piece for piece in pieces if any(piece[1][1:])]
    if not kept:
        raise InputError(
            f"No token of the {len(records)} records ({records[0].where}, ...) would be trained on: all "
            "are masked (see completion_only_loss and assistant_only_loss), or the texts are too short."
        )
    groups = _packed(kept, max_length) if packing and kind != "text" else [[piece] for piece in kept]
    return Dataset([_row(group) for group in groups], kind, sha256(records), skipped=len(pieces) - len(kept))


def windows(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, context: int = 512) -> Dataset:
    """Domain text for perplexity: joined by the end-of-text token, windows of `context`, no overlap.

    Raises InputError like encode, and if the records are not domain text.
    """
    if (kind := _one_kind(records)) != "text":
        raise InputError(f'{records[0].where}: perplexity is measured on "text" records, not on {kind} records.')
    return encode(records, tokenizer, context)


def label_choices(records: Sequence[Record]) -> list[str]:
    """The sorted labels of labelled text. Raises InputError for another shape, or fewer than two labels."""
    if (kind := _one_kind(records)) != "label":
        raise InputError(f'{records[0].where}: labels come from "text" and "label" records, not {kind} records.')
    found = sorted({r["label"] for r in records})
    if len(found) < 2:
        raise InputError(f"All {len(records)} records have the label {found[0]!r}; there is nothing to tell apart.")
    return found


def encode_choices(
    record: Record, labels: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Row]:
    """A row per label, in order, whose targets are the label's tokens: their likelihood scores the label.

    The end-of-text token is scored too, as it is trained: without it a label that begins another one
    ("good", "good enough") would always win. A text that is too long loses tokens on the left. Raises
    InputError if max_length has no room for a label and a token of the text.
    """
    special = len(encode_prompt(record["text"], tokenizer)) - len(_plain(record["text"], tokenizer))
    rows = []
    for label in labels:
        prompt, completion = _label_sample(record["text"], label, tokenizer)
        room = max_length - len(completion) - special
        if room < 1:
            raise InputError(f"max_length {max_length} has no room for the label {label!r}; raise it.")
        text = prompt[:special] + prompt[special:][-room:]  # bos stays in front of a shortened text
        rows.append(_row([(text + completion, [False] * len(text) + [True] * len(completion))]))
    return rows


def encode_classification(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    labels: Sequence[str] | None = None,
) -> Dataset:
    """Labelled text for a classification head: ids with the tokenizer's special tokens, and a class id a row.

    The class id is the place in `labels`, by default label_choices(records). A text that is too long is cut
    as the tokenizer cuts (it has one label, so it cannot be split) and counted. Raises InputError for another
    shape or an unknown label.
    """
    names = tuple(labels if labels is not None else label_choices(records))
    if (kind := _one_kind(records)) != "label":
        raise InputError(f'{records[0].where}: a class needs "text" and "label" records, not {kind} records.')
    rows, truncated = [], 0
    for record in records:
        _check_label(record, names)
        ids = tokenizer(record["text"], verbose=False)["input_ids"]
        if len(ids) > max_length:
            ids = tokenizer(record["text"], truncation=True, max_length=max_length, verbose=False)["input_ids"]
            truncated += 1
        row = _row([(ids, [False] * len(ids))])
        rows.append(Row(row.input_ids, row.targets, row.segments, names.index(record["label"])))
    return Dataset(rows, "classification", sha256(records), truncated=truncated, labels=names)


def encode_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that a generation starts from: the prompt, after the special tokens that begin a text.

    Training encodes prompts with this too, so generate from these ids.
    """
    ids = list(tokenizer(prompt, verbose=False)["input_ids"])
    plain = _plain(prompt, tokenizer)
    # some tokenizers close every text with eos or sep, and nothing could be continued after that
    while len(ids) > len(plain) and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        ids.pop()
    return ids


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends a text: eos, or else bos, or else sep. Raises InputError if there is none."""
    for token in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.sep_token_id):
        if isinstance(token, int):
            return token
    raise InputError("The tokenizer has no eos, bos or sep token to end a text with; set tokenizer.eos_token.")


def _one_kind(found: Sequence[Record]) -> str:
    return records(found)[0].kind


def _plain(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _completion(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [*_plain(text, tokenizer), end_of_text(tokenizer)]


def _joined(records: Iterable[Record], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    stream: list[int] = []
    for record in records:
        stream += [*_plain(record["text"], tokenizer), end_of_text(tokenizer)]
    return stream[:-1]  # joined: between the records, not after the last


def _windows_of(stream: list[int], length: int) -> list[Sample]:
    ids = [stream[i : i + length] for i in range(0, len(stream), length)]
    return [(window, [True] * len(window)) for window in ids if len(window) > 1]


def _samples(
    records: Iterable[Record],
    tokenizer: PreTrainedTokenizerBase,
    completion_only_loss: bool,
    assistant_only_loss: bool,
    labels: Sequence[str] | None,
) -> Iterator[Sample]:
    """One sample a record (rarely more: see encode_chat), of any length."""
    for record in records:
        if record.kind == "messages":
            yield from encode_chat(record, tokenizer, assistant_only_loss)
            continue
        prompt: list[int] = []
        if record.kind == "text":
            completion = _completion(record["text"], tokenizer)
        elif record.kind == "label":
            _check_label(record, labels)
            prompt, completion = _label_sample(record["text"], record["label"], tokenizer)
        else:
            # Two calls, not one on the joined text: a token that straddles the boundary would not be there
            # when the model is given the prompt and has to write the completion.
            prompt = encode_prompt(record["prompt"], tokenizer)
            completion = _completion(record["completion"], tokenizer)
        yield prompt + completion, [not completion_only_loss] * len(prompt) + [True] * len(completion)


def _label_sample(text: str, label: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    return encode_prompt(text, tokenizer), _completion(" " + label, tokenizer)


def _check_label(record: Record, labels: Sequence[str] | None) -> None:
    if labels is not None and record["label"] not in labels:
        known = ", ".join(map(repr, labels))
        raise InputError(f'{record.where}: the "label" {record["label"]!r} is none of {known}.')


def _pieces(sample: Sample, length: int) -> list[Sample]:
    """Consecutive pieces of at most `length` tokens. None but a whole sample is a lone token."""
    ids, targets = sample
    cuts = [*range(0, len(ids), length), len(ids)]
    if len(cuts) > 2 and cuts[-1] - cuts[-2] == 1:
        cuts[-2] -= 1  # a lone last token (the end of text!) would have nothing to be predicted from
    return [(ids[a:b], targets[a:b]) for a, b in itertools.pairwise(cuts)]


def _packed(samples: Iterable[Sample], length: int) -> list[list[Sample]]:
    """Samples by row: each goes, in order, to the fullest row that still has room for it."""
    rows: list[list[Sample]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for sample in samples:
        need = len(sample[0])
        at = bisect.bisect_left(room, (need, -1))
        free, row = room.pop(at) if at < len(room) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(sample)
        bisect.insort(room, (free - need, row))
    return rows


def _row(samples: Sequence[Sample]) -> Row:
    targets = [target and i > 0 for _, marks in samples for i, target in enumerate(marks)]
    return Row(
        input_ids=torch.tensor([token for ids, _ in samples for token in ids], dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.bool),
        segments=torch.tensor([n for n, (ids, _) in enumerate(samples) for _ in ids], dtype=torch.long),
    )
