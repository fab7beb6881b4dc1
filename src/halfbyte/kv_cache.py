"""The keys and values that a model keeps of earlier tokens: as floats, or as codes, a token at a time."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from halfbyte import formats, kernels
from halfbyte.errors import InputError
from halfbyte.formats import Format
from halfbyte.qtensor import QTensor

SHORT = {"int8": "int8-channel"}  # 4 bits by token lose more than 4-bit weights do: they are asked for by their names
_ROOM = 64  # tokens by which memory grows at least


def parse(name: str) -> Format:
    """The format of a --kv-cache: int8, or any name of FORMATS whose scales are a token's own: one a head
    (channel) or one a group of its numbers. Raises InputError."""
    f = formats.parse(SHORT.get(name, name))
    if f.flat or f.center or f.group == "tensor" or isinstance(f.scale, Format):
        raise InputError(
            f"--kv-cache {name}: its scales are shared by more than a token, and tokens come one at a time; take "
            "int8, or a format such as q8_0."
        )
    return f


def floats(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments for a model's forward that make it keep keys and values as they are. Raises InputError for a
    model that does not go on from earlier tokens."""
    return {"use_cache": True, _argument(model): DynamicCache(config=_config(model))}


def quantized(model: nn.Module, f: Format) -> dict[str, Any]:
    """Keyword arguments for a model's forward, or generate(), that make it keep keys and values in a format.

    Attention reads all of them from there, those of the present token too: so it makes no difference whether tokens
    come one by one or all at once, and what is measured on whole texts is what generating loses. Raises InputError for
    a model without keys and values, one that keeps other things with them, and heads that groups do not divide.
    """
    config = _config(model).get_text_config(decoder=True)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if isinstance(f.group, int) and size % f.group:
        raise InputError(f"--kv-cache {f.name}: a group of {f.group} does not divide this model's heads of {size}.")
    cache: Any = DynamicCache(config=config)
    cache.layers = [_quantized(layer, f) for layer in cache.layers]
    if not any(isinstance(layer, _Held) for layer in cache.layers):
        raise InputError(f"--kv-cache {f.name}: {type(model).__name__} keeps no keys and values.")
    return {"use_cache": True, _argument(model): cache}


def nbytes(kept: dict[str, Any]) -> int:
    """Bytes of the keys and values that a model keeps, given what `floats` or `quantized` gave."""
    cache = next(v for v in kept.values() if isinstance(v, DynamicCache))
    return sum(
        sum(h.nbytes for h in layer.held)
        if isinstance(layer, _Held)
        else sum(t.nbytes for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if t is not None)
        for layer in cache.layers
    )


def _config(model: nn.Module) -> Any:
    """The config. Raises InputError if it is not that of a model that goes on from earlier tokens."""
    config: Any = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False) or not getattr(model, "can_generate", bool)():
        raise InputError(f"{type(model).__name__} keeps no keys and values of earlier tokens to go on from.")
    return config


def _argument(model: nn.Module) -> str:
    """What the forward calls its cache: transformers has renamed it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _quantized(layer: Any, f: Format) -> Any:
    """The like of a layer of transformers' cache, holding codes."""
    if type(layer) is DynamicLayer:
        return _Layer(f)
    if type(layer) is DynamicSlidingWindowLayer:
        return _SlidingLayer(f, layer.sliding_window)
    if type(layer) is LinearAttentionLayer or not hasattr(layer, "keys"):
        return layer  # a state of one size, however many tokens there were, or nothing
    raise InputError(f"--kv-cache {f.name}: a {type(layer).__name__} keeps more than keys and values.")


class Tokens:
    """Vectors of tokens in a format, (batch, heads, tokens, size), to which more are added; those that are held are
    not rounded again. In memory tokens come first, so that a new one is written behind the last."""

    def __init__(self, f: Format) -> None:
        self.format = f
        self._first, self._end, self._size, self._dtype = 0, 0, 0, torch.float32
        self._parts: dict[str, Tensor] = {}  # those of a QTensor, with room for more tokens

    def __len__(self) -> int:
        return self._end - self._first

    @property
    def nbytes(self) -> int:
        """Bytes taken, room for more included."""
        return sum(p.nbytes for p in self._parts.values())

    def add(self, x: Tensor) -> None:
        """Rounds x (batch, heads, tokens, size), float."""
        new = kernels.quantize(x.permute(2, 0, 1, 3).contiguous(), self.format).tensors()
        self._dtype, self._size, count = x.dtype, x.shape[3], x.shape[2]
        if not self._parts or self._end + count > len(self._parts["codes"]):
            room = len(self) + count + max(_ROOM, len(self) // 8)
            self._move({k: p.new_empty(room, *p.shape[1:]) for k, p in new.items()})
        for name, part in new.items():
            self._parts[name][self._end : self._end + count] = part
        self._end += count

    def _move(self, to: dict[str, Tensor]) -> None:
        for name, part in self._parts.items():
            to[name][: len(self)] = part[self._first : self._end]
        self._parts, self._first, self._end = to, 0, len(self)

    def value(self) -> Tensor:
        """What is held, as floats (batch, heads, tokens, size)."""
        held = {k: p[self._first : self._end] for k, p in self._parts.items()}
        q = QTensor(self.format, (*held["scale"].shape[:3], self._size), self._dtype, {**held})
        return kernels.dequantize(q).permute(1, 2, 0, 3)

    def keep(self, most: int) -> None:
        """Lets go of all but the last tokens."""
        self._first = max(self._first, self._end - most)

    def select(self, rows: Tensor) -> None:
        """Takes other rows of the batch, as a beam search does."""
        self._parts = {k: p.index_select(1, rows) for k, p in self._parts.items()}


class _Held:
    """A cache's layer whose keys and values are held as codes; transformers' own stay None."""

    is_croppable = False
    held: tuple[Tokens, Tokens]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def add(self, *states: Tensor) -> tuple[Tensor, Tensor]:
        self.is_initialized = True
        for tokens, x in zip(self.held, states, strict=True):
            tokens.add(x)
        return self.held[0].value(), self.held[1].value()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for tokens in self.held:
            tokens.select(beam_idx)


class _Layer(_Held, DynamicLayer):
    def __init__(self, f: Format) -> None:
        super().__init__()
        self.held = Tokens(f), Tokens(f)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.add(key_states, value_states)

    def get_seq_length(self) -> int:
        return len(self.held[0])


class _SlidingLayer(_Held, DynamicSlidingWindowLayer):
    """Holds the tokens that the next one will see."""

    def __init__(self, f: Format, sliding_window: int) -> None:
        super().__init__(sliding_window)
        self.held = Tokens(f), Tokens(f)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.cumulative_length += key_states.shape[2]
        out = self.add(key_states, value_states)
        for tokens in self.held:
            tokens.keep(self.sliding_window - 1)
        return out
