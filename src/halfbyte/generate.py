"""Text from a model, by transformers' own generate()."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from halfbyte import kv_cache
from halfbyte.data import encode_prompt
from halfbyte.errors import InputError

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


@dataclass
class Generated:
    """text: what was added. tokens: how many. tokens_per_second: of decoding, the prompt's reading not counted."""

    text: str
    tokens: int
    tokens_per_second: float


class _Clock:
    """A streamer that notes when the tokens come, and passes text on."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self.times: list[float] = []
        self._ids: list[int] = []
        self._tokenizer, self._on_text, self._said = tokenizer, on_text, ""

    def put(self, value: torch.Tensor) -> None:
        if value.numel() == 1:  # the prompt comes first, whole
            self._ids.append(int(value))
            text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
            if not text.endswith("\ufffd"):  # half a character: wait for its other bytes
                self._on_text(text[len(self._said) :])
                self._said = text
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str | list[dict[str, str]],
    max_new_tokens: int = 64,
    chat: bool = False,
    temperature: float = 0.0,
    on_text: Callable[[str], None] = lambda text: None,
    cache: str | None = None,
) -> Generated:
    """Continues a prompt; with `chat` (or a list of messages) answers it through the chat template.

    Greedy at temperature 0. cache: the format that keys and values are kept in, see kv_cache.parse; as floats if left
    out. Raises InputError for an empty prompt, a model that does not write text, or one without a chat template.
    """
    if getattr(model, "generation_config", None) is None:
        raise InputError(f"{type(model).__name__} is no model that writes text.")
    ids = _prompt_ids(tokenizer, prompt, chat)
    if not ids:
        raise InputError("--prompt is empty: give the model something to go on from.")
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if most is not None and len(ids) + max_new_tokens > most:
        raise InputError(
            f"--max-new-tokens {max_new_tokens} after a prompt of {len(ids)} are more than the {most} tokens that this "
            "model takes."
        )
    config: Any = copy.deepcopy(model.generation_config)  # the model's own stays as it is: it is saved with it
    config.update(max_new_tokens=max_new_tokens, max_length=None, do_sample=temperature > 0, num_beams=1)
    # greedy decoding uses no sampling settings, and transformers warns of those that are there
    config.update(**({"temperature": temperature} if temperature > 0 else dict.fromkeys(_SAMPLING)))
    config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if cache is not None:
        config.update(use_cache=True, cache_implementation=None)
    clock = _Clock(tokenizer, on_text)
    tokens = torch.tensor([ids])
    with torch.inference_mode(), _kept(model, cache) as kept:
        out = model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=tokens, attention_mask=torch.ones_like(tokens), generation_config=config, streamer=clock,
            **kept,
        )  # fmt: skip
    new = out[0, len(ids) :].tolist()
    spent = clock.times[-1] - clock.times[1] if len(clock.times) > 2 else 0.0
    speed = (len(new) - 1) / spent if spent else 0.0
    return Generated(tokenizer.decode(new, skip_special_tokens=True), len(new), round(speed, 2))


@contextmanager
def _kept(model: nn.Module, cache: str | None) -> Iterator[dict[str, Any]]:
    """Keyword arguments for generate() that keep keys and values in a format; none without one. What the model's own
    settings say of caches, and transformers would hold against ours, is set aside meanwhile."""
    if cache is None:
        yield {}
        return
    kept, own = kv_cache.quantized(model, kv_cache.parse(cache)), cast(Any, model.generation_config)
    before, own.cache_implementation = own.cache_implementation, None
    try:
        yield {k: v for k, v in kept.items() if k != "use_cache"}  # which is in the settings already
    finally:
        own.cache_implementation = before


def _prompt_ids(tokenizer: Any, prompt: str | list[dict[str, str]], chat: bool) -> list[int]:
    if not chat and isinstance(prompt, str):
        return encode_prompt(prompt, tokenizer)
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("--chat: this model's tokenizer has no chat template; leave the flag out.")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    out = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return list(out["input_ids"])
