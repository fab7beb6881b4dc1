"""Text that a model writes itself, to measure or calibrate on where there is no data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor, nn

from halfbyte import kv_cache
from halfbyte.data import Dataset, Row, encode_prompt, end_of_text
from halfbyte.errors import InputError

ROWS, LENGTH = 16, 512
_TOGETHER = 16  # rows that are drawn side by side: their keys and values are in memory at once


@dataclass(frozen=True)
class Turns:
    """What stands between the texts that the model writes, as token ids. opening: before the first. answer: from a
    user's text to the assistant's, question: from there to the next user's; both begin with what closes a turn, and are
    empty where there is no chat template."""

    opening: list[int]
    answer: list[int]
    question: list[int]


def able(model: nn.Module) -> bool:
    """Whether a model writes text: goes on from what it has written."""
    try:
        return bool(kv_cache.floats(model))
    except InputError:
        return False


def sample(
    model: nn.Module,
    tokenizer: Any,
    n: int = ROWS,
    length: int = LENGTH,
    seed: int = 0,
    on_token: Callable[[int, int], None] = lambda done, total: None,
) -> Dataset:
    """n rows of `length` tokens, each drawn from the model's own distribution (temperature 1) given those before it.

    With a chat template a row begins as an opened user's turn: the model writes the question, then the answer, then
    the next question. Without one it begins with the token that begins or ends a text. No end of text ends a row: the
    next turn, or the next text, is opened. Targets are the tokens that were drawn, not those of the template.

    The rows are ids, since text need not be tokenized as it was drawn. They depend on model, n, length and seed alone.
    Raises InputError for a model that does not write text, or has no room for rows of this length.
    """
    kv_cache.floats(model)  # what does not write text is refused before the work
    turns, ends = turns_of(tokenizer), _ends(model, tokenizer)
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if most is not None and length > most:
        raise InputError(f"rows of {length} tokens are more than the {most} that this model takes: --context {most}.")
    if length <= len(turns.opening):
        raise InputError(f"rows of {length} tokens have no room after the {len(turns.opening)} that open a text.")
    generator = torch.Generator().manual_seed(seed)
    rows: list[_Growing] = []
    for first in range(0, n, _TOGETHER):
        fresh = [_Growing(turns, ends) for _ in range(min(_TOGETHER, n - first))]
        _grow(model.eval(), fresh, length, len(tokenizer), generator, on_token)
        rows += fresh
    digest = hashlib.sha256(json.dumps([r.ids for r in rows]).encode()).hexdigest()
    return Dataset([r.row() for r in rows], "self", digest)


def turns_of(tokenizer: Any) -> Turns:
    """What a tokenizer's chat template puts around texts; without one, or where it refuses a plain conversation, only
    the token that begins a text, or else the one that ends it."""
    texts = ("first-text", "second-text", "third-text")
    messages = [{"role": r, "content": t} for r, t in zip(("user", "assistant", "user"), texts, strict=True)]
    rendered = ""
    if getattr(tokenizer, "chat_template", None):
        try:
            rendered = str(tokenizer.apply_chat_template(messages, tokenize=False))
        except (TemplateError, ValueError):
            rendered = ""
    pieces = []
    for text in texts:
        piece, found, rendered = rendered.partition(text)
        if not found:
            return Turns(encode_prompt("", tokenizer) or [end_of_text(tokenizer)], [], [])
        # a blank before a text is the first of its own tokens
        pieces.append(list(tokenizer(piece.rstrip(" "), add_special_tokens=False)["input_ids"]))
    return Turns(pieces[0] or [end_of_text(tokenizer)], *pieces[1:])


def _ends(model: nn.Module, tokenizer: Any) -> set[int]:
    """The tokens that end a text or a turn."""
    own = getattr(model.generation_config, "eos_token_id", None)
    return {end_of_text(tokenizer), *(own if isinstance(own, list) else [] if own is None else [own])}


class _Growing:
    """A row as it grows: its ids, which of them were drawn, and what the template has yet to say."""

    def __init__(self, turns: Turns, ends: set[int]) -> None:
        self.ids, self.drawn = list(turns.opening), [False] * len(turns.opening)
        self._turns, self._ends, self._asking = turns, ends, True
        self._given: list[int] = []

    def add(self, token: int) -> None:
        """A token that was drawn, unless the template has a say."""
        self.drawn.append(not self._given)
        if self._given:
            token = self._given.pop(0)
        elif token in self._ends:
            self._given = self._after(token)
        self.ids.append(token)

    def _after(self, end: int) -> list[int]:
        """What follows an end: the other's turn if it closes a turn, else a text is opened anew."""
        turn = self._turns.answer if self._asking else self._turns.question
        closes = turn[:1] == [end]
        self._asking = not self._asking if closes else True
        opened = turn if closes else self._turns.opening
        return opened[1:] if opened[0] == end else list(opened)

    def row(self) -> Row:
        ids = torch.tensor(self.ids, dtype=torch.long)
        return Row(ids, torch.tensor(self.drawn, dtype=torch.bool), torch.zeros_like(ids))


@torch.inference_mode()
def _grow(
    model: nn.Module, rows: list[_Growing], length: int, known: int, generator: torch.Generator,
    on_token: Callable[[int, int], None],
) -> None:  # fmt: skip
    """Draws all rows to their length, side by side."""
    kept, at = kv_cache.floats(model), 0
    while (done := len(rows[0].ids)) < length:
        ids = torch.tensor([r.ids[at:] for r in rows], device=model.device)  # pyright: ignore[reportArgumentType]
        out, at = model(input_ids=ids, **kept), done
        for row, token in zip(rows, _draw(out.logits[:, -1, :known], generator), strict=True):
            row.add(token)
        on_token(done + 1, length)


def _draw(logits: Tensor, generator: torch.Generator) -> list[int]:
    """A token a row of logits (rows, vocabulary). Raises InputError where the model computes NaN."""
    if logits.isnan().any():
        raise InputError("the model computes NaN: a weight holds NaN or infinity, or numbers overflow in its dtype.")
    return torch.multinomial(logits.float().cpu().softmax(-1), 1, generator=generator)[:, 0].tolist()
