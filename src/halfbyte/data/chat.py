"""Conversations through the model's chat template, and which of their tokens the assistant wrote."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from halfbyte.data.records import Record
from halfbyte.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]  # characters from, to
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


def encode_chat(
    record: Record, tokenizer: PreTrainedTokenizerBase, assistant_only_loss: bool = True
) -> list[tuple[list[int], list[bool]]]:
    """Token ids of a "messages" record, as apply_chat_template gives them, and which of them are targets.

    With assistant_only_loss the targets are what the assistant has to write: its content and the marker that
    ends its turn; not the header of the turn, and not the line break after the marker. A template with
    {% generation %} markers says itself which tokens these are.

    One pair (ids, targets) comes back, unless the template writes earlier turns differently once a later turn
    follows (thinking templates do). Then each assistant turn comes as a pair of its own, ending with that
    turn, because that is the text in which the model will have to write it.

    Raises InputError for a tokenizer without a chat template, messages that the template refuses, and
    messages in which what the assistant wrote cannot be told apart.
    """
    if not tokenizer.chat_template:
        raise InputError(
            f'{record.where}: "messages" need a chat template, and this tokenizer has none; take the '
            'instruct version of the model, set chat_template, or write "prompt" and "completion" records.'
        )
    messages = record["messages"]
    if not assistant_only_loss:
        ids = _tokens(_rendered(messages, tokenizer, record.where), tokenizer)["input_ids"]
        return [(ids, [True] * len(ids))]
    if not any(m["role"] == "assistant" for m in messages):
        raise InputError(f'{record.where}: no message has the role "assistant", so there is nothing to learn.')
    if not tokenizer.is_fast:
        raise InputError("Finding the assistant's tokens needs a fast tokenizer; set assistant_only_loss: false.")
    if _MARKER.search(tokenizer.get_chat_template()):
        return [_marked(messages, tokenizer, record.where)]
    return [_targets(text, spans, tokenizer) for text, spans in _turns(messages, tokenizer, record.where)]


def _turns(messages: list[Any], tokenizer: PreTrainedTokenizerBase, where: str) -> list[tuple[str, list[Span]]]:
    """Texts with the spans to learn: the whole conversation, or one text per assistant turn."""
    turns = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        text = _rendered(messages[: i + 1], tokenizer, where)
        start = _start(messages[: i + 1], text, tokenizer, where)
        end = len(text.rstrip())
        if message["content"].strip() and text.rstrip().endswith(message["content"].rstrip()):
            end = len(text)  # no marker ends the turn, so the white space does, and is to be learnt
        turns.append((text, (start, max(start, end))))
    whole = _rendered(messages, tokenizer, where)
    if all(whole.startswith(text[:end]) for text, (_, end) in turns):
        return [(whole, [span for _, span in turns])]
    return [(text, [span]) for text, span in turns]


def _start(messages: list[Any], text: str, tokenizer: PreTrainedTokenizerBase, where: str) -> int:
    """Where in `text`, the rendered messages, the last of them begins to be the assistant's own writing."""
    before = messages[:-1]
    if before:
        header = _rendered(before, tokenizer, where, add_generation_prompt=True)
    else:  # no template renders no messages; the header is what would come after this one
        prompt = _rendered(messages, tokenizer, where, add_generation_prompt=True)[len(text) :]
        header = text[: text.find(prompt) + len(prompt)] if prompt and prompt in text else "\0"
    if not text.startswith(header):
        raise InputError(
            f"{where}: the chat template begins an assistant turn ({header[-40:]!r}) differently from how it "
            "writes one, so its tokens cannot be told apart; put {% generation %} and {% endgeneration %} "
            "around what the assistant writes in the template, or set assistant_only_loss: false."
        )
    return len(header)


def _targets(text: str, spans: list[Span], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    tokens = _tokens(text, tokenizer, return_offsets_mapping=True)
    # A token that is half header, such as " Hello" where the header ends with a space, is a target too: the
    # assistant's first word is in it. transformers takes overlapping tokens for {% generation %} as well.
    targets = [any(a < end and b > start for start, end in spans) for a, b in tokens["offset_mapping"]]
    return tokens["input_ids"], targets


def _marked(messages: list[Any], tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[list[int], list[bool]]:
    try:
        tokens: Any = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs={"verbose": False}
        )
    except (TemplateError, ValueError) as e:
        raise InputError(f"{where}: the chat template refuses these messages: {e}") from None
    return tokens["input_ids"], [bool(m) for m in tokens["assistant_masks"]]


def _rendered(
    messages: list[Any], tokenizer: PreTrainedTokenizerBase, where: str, add_generation_prompt: bool = False
) -> str:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except (TemplateError, ValueError) as e:
        raise InputError(f"{where}: the chat template refuses these messages: {e}") from None
    return str(text)


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
    # the template has written the special tokens already; verbose=False: we split what is too long ourselves
    return tokenizer(text, add_special_tokens=False, verbose=False, **options)
