"""Where a model's channels go from one matrix straight into others: a row an architecture. There they may be scaled or
turned, and be scaled or turned back by what reads them, without changing what the model computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import InputError
from halfbyte.layers import Weight, ops
from halfbyte.models.gguf import head_dim
from halfbyte.models.structure import tied


@dataclass(frozen=True)
class Edge:
    """Channels, what gives them, and all that is fed by them.

    source: a norm's name, or, unless `norm`, an op's. readers: ops' names, which are fed by nothing else. rows: which
    of the source's outputs the channels are, int64 (channels,); None for all. columns: which channel each input of a
    reader is, int64 (in,); None where each is its own. head: so many channels in a row are one head's of attention,
    mixed with nothing but themselves; 0 where they are not.
    """

    source: str
    readers: tuple[str, ...]
    norm: bool = False
    rows: Tensor | None = None
    columns: Tensor | None = None
    head: int = 0


@dataclass(frozen=True)
class Edges:
    """Of one model. blocks: the edges inside of each block. final: from the last norm to the head. embeddings: names of
    modules whose rows begin the residual stream. writers: names of the ops that add to it. centered: norms hold w - 1.
    tied: whether the head and an embedding share their weight. unturned: why the stream cannot be turned, in words."""

    blocks: tuple[tuple[Edge, ...], ...]
    final: Edge
    embeddings: tuple[str, ...]
    writers: tuple[str, ...]
    centered: bool = False
    tied: bool = False
    unturned: str | None = None


@dataclass(frozen=True)
class _Architecture:
    """model_types: transformers' names. blocks: the list's name; names of its modules are inside of a block. norms: a
    norm -> what it feeds. value: what gives attention's values -> what reads their mixture. inner: what gives what the
    second half of an MLP reads, where an input's factor passes through; None where it does not. second: that half.
    """

    model_types: tuple[str, ...]
    blocks: str
    norms: Mapping[str, tuple[str, ...]]
    value: tuple[str, str]
    inner: str | None
    second: str
    embeddings: tuple[str, ...]
    final: str
    value_rows: Callable[[Any], Tensor | None] = lambda config: None
    inner_rows: Callable[[Any], Tensor | None] = lambda config: None
    centered: bool = False
    unturned: str | None = None
    refuses: Callable[[Any], str | None] = field(default=lambda config: None)


def _kv_heads(config: Any) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _last_values(config: Any) -> Tensor:
    """Queries, keys and values one after the other."""
    n = _kv_heads(config) * head_dim(config)
    start = config.num_attention_heads * head_dim(config) + n
    return torch.arange(start, start + n)


def _values_by_head(config: Any) -> Tensor:
    """Query, key and value of a head, then of the next."""
    size = head_dim(config)
    return torch.arange(3 * config.hidden_size).reshape(-1, 3, size)[:, 2].reshape(-1)


def _opt(config: Any) -> str | None:
    if not config.do_layer_norm_before or config._remove_final_layer_norm:
        return "its norms come after what is added to the stream"
    if config.word_embed_proj_dim != config.hidden_size:
        return "its embeddings are projected to another width"
    if not config.layer_norm_elementwise_affine:
        return "its norms have no weights"
    return "relu is not what lies between fc1 and fc2" if config.activation_function != "relu" else None


def _gpt2(config: Any) -> str | None:
    return "it has cross-attention" if config.add_cross_attention else None


_HEAD = "lm_head"  # by transformers' name, whatever a checkpoint calls it
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATED = ("mlp.gate_proj", "mlp.up_proj")
_VALUE = ("self_attn.v_proj", "self_attn.o_proj")
_EMBEDDINGS = ("model.embed_tokens",)

ARCHITECTURES = (
    _Architecture(
        ("llama", "mistral", "qwen2", "qwen3"), "model.layers",
        {"input_layernorm": _QKV, "post_attention_layernorm": _GATED},
        _VALUE, "mlp.up_proj", "mlp.down_proj", _EMBEDDINGS, "model.norm",
    ),
    _Architecture(
        ("gemma3_text",), "model.layers", {"input_layernorm": _QKV, "pre_feedforward_layernorm": _GATED},
        _VALUE, "mlp.up_proj", "mlp.down_proj", _EMBEDDINGS, "model.norm", centered=True,
        unturned="norms with weights of their own lie between its layers and the stream",
    ),
    _Architecture(
        ("phi3",), "model.layers",
        {"input_layernorm": ("self_attn.qkv_proj",), "post_attention_layernorm": ("mlp.gate_up_proj",)},
        ("self_attn.qkv_proj", "self_attn.o_proj"), "mlp.gate_up_proj", "mlp.down_proj", _EMBEDDINGS, "model.norm",
        value_rows=_last_values,
        inner_rows=lambda config: torch.arange(config.intermediate_size, 2 * config.intermediate_size),
    ),
    _Architecture(
        ("gpt2",), "transformer.h", {"ln_1": ("attn.c_attn",), "ln_2": ("mlp.c_fc",)},
        ("attn.c_attn", "attn.c_proj"), None, "mlp.c_proj", ("transformer.wte", "transformer.wpe"), "transformer.ln_f",
        value_rows=_last_values, refuses=_gpt2,
    ),
    _Architecture(
        ("gpt_neox",), "gpt_neox.layers",
        {"input_layernorm": ("attention.query_key_value",), "post_attention_layernorm": ("mlp.dense_h_to_4h",)},
        ("attention.query_key_value", "attention.dense"), None, "mlp.dense_4h_to_h", ("gpt_neox.embed_in",),
        "gpt_neox.final_layer_norm", value_rows=_values_by_head,
    ),
    _Architecture(  # relu(s x) = s relu(x), so that a factor passes from fc1 to fc2
        ("opt",), "model.decoder.layers", {"self_attn_layer_norm": _QKV, "final_layer_norm": ("fc1",)},
        ("self_attn.v_proj", "self_attn.out_proj"), "fc1", "fc2",
        ("model.decoder.embed_tokens", "model.decoder.embed_positions"), "model.decoder.final_layer_norm",
        refuses=_opt,
    ),
)  # fmt: skip


def edges(model: Any) -> Edges:
    """Raises InputError for an architecture without a row here, and for a model that has other layers than its row."""
    config = model.config
    row = next((a for a in ARCHITECTURES if config.model_type in a.model_types), None)
    if row is None:
        known = sorted(t for a in ARCHITECTURES for t in a.model_types)
        raise InputError(
            f"models of type {config.model_type} have no row that says where channels go between their layers; "
            f"{', '.join(known)} have."
        )
    if (why := row.refuses(config)) is not None:
        raise InputError(f"channels of this {config.model_type} model cannot be scaled or turned: {why}.")
    found = Edges(
        tuple(_of_block(row, f"{row.blocks}.{i}.", config) for i in range(config.num_hidden_layers)),
        Edge(row.final, (_HEAD,), norm=True),
        row.embeddings,
        tuple(f"{row.blocks}.{i}.{n}" for i in range(config.num_hidden_layers) for n in (row.value[1], row.second)),
        row.centered, _HEAD in tied(model), row.unturned,
    )  # fmt: skip
    _check(model, found)
    return found


def head_bytes(model: Any) -> int:
    """What the head's weight takes, in its floats."""
    w = model.get_submodule(_HEAD).weight
    return w.shape.numel() * w.dtype.itemsize


@torch.no_grad()
def untie(model: Any) -> None:
    """Gives the head a weight of its own."""
    head = model.get_submodule(_HEAD)
    head.weight = Weight(torch.nn.Parameter(head.weight.base().detach().clone(), requires_grad=False))
    model.config.tie_word_embeddings = False


def _of_block(row: _Architecture, at: str, config: Any) -> tuple[Edge, ...]:
    heads, shared, size = config.num_attention_heads, _kv_heads(config), head_dim(config)
    columns = torch.arange(shared * size).reshape(shared, 1, size).expand(-1, heads // shared, -1).reshape(-1)
    norms = [Edge(at + n, tuple(at + r for r in readers), norm=True) for n, readers in row.norms.items()]
    value = Edge(at + row.value[0], (at + row.value[1],), False, row.value_rows(config), columns, size)
    inner = [] if row.inner is None else [Edge(at + row.inner, (at + row.second,), rows=row.inner_rows(config))]
    return (*norms, value, *inner)


def _check(model: Any, found: Edges) -> None:
    """Raises InputError if a layer named is missing, or one is there that is not named: what that reads is unknown."""
    within = [e for block in found.blocks for e in block]
    readers = {r for e in (*within, found.final) for r in e.readers} | set(found.writers)
    there = {n for n, _ in ops(model)} - set(found.embeddings)
    modules = {n for n, _ in model.named_modules(remove_duplicate=False)}
    sources = {e.source for e in (*within, found.final)} | set(found.embeddings)
    if odd := sorted((readers ^ there) | (sources - modules)):
        raise InputError(
            f"{type(model).__name__}: {odd[0]} is not where models of type {model.config.model_type} have it, so that "
            "it is not known what its channels are."
        )
