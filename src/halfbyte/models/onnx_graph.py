"""Decoders in ONNX: a row for each architecture, and the graph that they share. Its inputs and outputs are named as
optimum and onnxruntime-genai name them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from onnx import TensorProto, helper
from torch import nn

from halfbyte.errors import InputError
from halfbyte.formats import Format
from halfbyte.models.loading import Loaded
from halfbyte.models.onnx_saving import TYPES, Graph
from halfbyte.models.onnx_weights import Weights

_ROPES = ("default", "linear", "yarn", "llama3")  # whose angles are a position times a constant
_ACTIVATIONS = ("silu", "gelu_new", "gelu_pytorch_tanh", "gelu", "relu")


@dataclass(frozen=True)
class Architecture:
    """model: the name of its class. The others are names of modules in it, or in a block.

    norms: before attention, after it, before the MLP, after it; "" where there is none. qkv, up: one projection each,
    or one for all. gated: whether the MLP's first half, through the activation, multiplies the second. slides:
    whether a window that the config names holds for "all" layers or for those that it says ("some"). centered: norms
    multiply by 1 + w. fixed: what else must be in a config for the graph to be right.
    """

    model: str
    embedding: str = "model.embed_tokens"
    positions: str = ""
    layers: str = "model.layers"
    last: str = "model.norm"
    norms: tuple[str, str, str, str] = ("input_layernorm", "", "post_attention_layernorm", "")
    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    head_norms: bool = False
    out: str = "o_proj"
    up: tuple[str, ...] = ("gate_proj", "up_proj")
    gated: bool = True
    down: str = "down_proj"
    activation: str = "hidden_act"
    slides: str = ""
    centered: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)


ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM"),
    "mistral": Architecture("MistralForCausalLM", slides="all"),
    "qwen2": Architecture("Qwen2ForCausalLM", slides="some"),
    "qwen3": Architecture("Qwen3ForCausalLM", slides="some", head_norms=True),
    "phi3": Architecture("Phi3ForCausalLM", slides="all", qkv=("qkv_proj",), up=("gate_up_proj",)),
    "gemma3_text": Architecture(
        "Gemma3ForCausalLM", slides="some", head_norms=True, centered=True, activation="hidden_activation",
        norms=("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
               "post_feedforward_layernorm"),
        fixed={"final_logit_softcapping": None, "attn_logit_softcapping": None, "use_bidirectional_attention": False},
    ),
    "gpt2": Architecture(
        "GPT2LMHeadModel", "transformer.wte", "transformer.wpe", "transformer.h", "transformer.ln_f",
        ("ln_1", "", "ln_2", ""), "attn", ("c_attn",), False, "c_proj", ("c_fc",), False, "c_proj",
        "activation_function", fixed={"add_cross_attention": False},
    ),
}  # fmt: skip


def architecture_of(model: Any) -> Architecture:
    """The row of a model. Raises InputError where there is none, or its config asks for what the graph lacks."""
    config, made = model.config, type(model).__name__
    row = ARCHITECTURES.get(config.model_type)
    if row is None or row.model != made:
        raise InputError(
            f"{made} is not written to ONNX yet; {', '.join(a.model for a in ARCHITECTURES.values())} are."
        )
    for key, value in row.fixed.items():
        if (getattr(config, key, value) or None) != (value or None):
            raise InputError(f"{made} with {key} = {getattr(config, key)} is not written to ONNX yet.")
    if (act := getattr(config, row.activation)) not in _ACTIVATIONS:
        raise InputError(f"the activation {act} is not written to ONNX yet; {', '.join(_ACTIVATIONS)} are.")
    kinds = set(getattr(config, "layer_types", None) or ()) if row.slides == "some" else set()
    if odd := kinds - {"full_attention", "sliding_attention"}:
        raise InputError(f"layers of type {min(odd)} are not written to ONNX yet.")
    if not row.positions:
        said = model.model.rotary_emb.rope_type
        for rope in said.values() if isinstance(said, dict) else [said]:
            if rope not in _ROPES:
                raise InputError(f"rotary scaling of type {rope} is not written to ONNX yet; {', '.join(_ROPES)} are.")
    return row


def floats(loaded: Loaded, dtype: torch.dtype | None) -> torch.dtype:
    """What floats are in the graph: the dtype that is asked for, else the model's; bfloat16 becomes float32."""
    chosen = dtype or loaded.config.dtype
    return torch.float16 if chosen == torch.float16 else torch.float32


def build(loaded: Loaded, formats: Mapping[str, Format], dtype: torch.dtype | None = None) -> Graph:
    """The graph of a model, no weight of which has been read. formats: op's name -> what its weight is rounded to.
    dtype: what all others become, codes among them; None leaves them as they are. Raises InputError for what ONNX, or
    the graph, cannot say."""
    row = architecture_of(loaded.model)
    graph = Graph(floats(loaded, dtype))
    weights = Weights(graph, loaded, formats, dtype is not None)
    _Decoder(graph, weights, row, loaded.model).build()
    if unused := weights.unused():
        raise InputError(f"the graph of {row.model} has no place for {unused[0]}.")
    return graph


class _Decoder:
    """Builds the graph. Values in it are (batch, sequence, width) unless something else is said."""

    def __init__(self, graph: Graph, weights: Weights, row: Architecture, model: Any) -> None:
        self.g, self.w, self.row, self.model, self.config = graph, weights, row, model, model.config
        self.size: int = model.get_submodule(f"{row.layers}.0.{row.attention}").head_dim
        self.heads: int = self.config.num_attention_heads
        self.kv: int = getattr(self.config, "num_key_value_heads", None) or self.heads
        self.angles: dict[str, tuple[str, str]] = {}
        self.masks: dict[int | None, str] = {}

    def build(self) -> None:
        g, row, layers = self.g, self.row, self.config.num_hidden_layers
        ids, long = ("batch_size", "sequence_length"), TensorProto.INT64
        for name, shape in (("input_ids", ids), ("attention_mask", (ids[0], "total_sequence_length")),
                            ("position_ids", ids)):  # fmt: skip
            g.inputs.append(helper.make_tensor_value_info(name, long, shape))
        self._put(g.outputs, "logits", *ids, self.config.vocab_size)
        x = self.w.embed(row.embedding, "input_ids")
        if row.positions:
            x = g("Add", x, self.w.embed(row.positions, "position_ids"))
        for i in range(layers):
            x = self._block(i, x)
        logits = self.w.linear("lm_head", self._norm(row.last, x))
        g("Identity", logits, output="logits")

    def _put(self, where: list[Any], name: str, *shape: str | int) -> None:
        where.append(helper.make_tensor_value_info(name, TYPES[self.g.dtype], shape))

    def _block(self, i: int, x: str) -> str:
        at, (before, after, second, end) = f"{self.row.layers}.{i}", self.row.norms
        y = self._attend(i, self._norm(f"{at}.{before}", x))
        x = self.g("Add", x, self._norm(f"{at}.{after}", y) if after else y)
        y = self._mlp(f"{at}.mlp", self._norm(f"{at}.{second}", x))
        return self.g("Add", x, self._norm(f"{at}.{end}", y) if end else y)

    def _norm(self, name: str, x: str) -> str:
        """x of any shape, normalized along its last dimension in float32."""
        g, module = self.g, self.model.get_submodule(name)
        if isinstance(module, nn.LayerNorm):
            return g("LayerNormalization", x, self.w.vector(f"{name}.weight"), self.w.vector(f"{name}.bias"),
                     epsilon=module.eps)  # fmt: skip
        f32, wide = torch.float32, g.wide(x)
        mean = g("ReduceMean", g("Pow", wide, g.number(2, f32)), g.integers(-1), keepdims=1)
        eps = getattr(module, "variance_epsilon", None) or module.eps
        y = g("Div", wide, g("Sqrt", g("Add", mean, g.number(eps, f32))))
        if self.row.centered:
            return g.narrow(g("Mul", y, self.w.vector(f"{name}.weight", f32, plus=1.0)))
        return g("Mul", g.narrow(y), self.w.vector(f"{name}.weight"))

    def _mlp(self, at: str, x: str) -> str:
        g, row = self.g, self.row
        halves = [self.w.linear(f"{at}.{name}", x) for name in row.up]
        if row.gated and len(halves) == 1:
            halves = g.split(halves[0], *[self.config.intermediate_size] * 2)
        y = self._activate(halves[0])
        return self.w.linear(f"{at}.{row.down}", g("Mul", y, halves[1]) if row.gated else y)

    def _activate(self, x: str) -> str:
        match getattr(self.config, self.row.activation):
            case "silu":
                return self.g("Mul", x, self.g("Sigmoid", x))
            case "relu":
                return self.g("Relu", x)
            case "gelu":
                return self.g("Gelu", x)
            case _:
                return self.g("Gelu", x, approximate="tanh")

    def _attend(self, i: int, x: str) -> str:
        g, at = self.g, f"{self.row.layers}.{i}.{self.row.attention}"
        module = self.model.get_submodule(at)
        query, key, value = self._heads(at, i, x)
        query = g.reshape(g("Mul", query, g.number(module.scaling)), 0, 0, self.kv, self.heads // self.kv, self.size)
        query = g("Transpose", query, perm=(0, 2, 3, 1, 4))  # (batch, kv, heads that share a key, sequence, size)
        key, value = self._cached(i, "key", key), self._cached(i, "value", value)
        key = g("Unsqueeze", g("Transpose", key, perm=(0, 1, 3, 2)), g.integers(2))
        scores = g.wide(g("MatMul", query, key))
        lowest = g.number(torch.finfo(torch.float32).min, torch.float32)  # not -inf: a row may have nothing to see
        shares = g.narrow(g("Softmax", g("Where", self._mask(self._window(i)), scores, lowest), axis=-1))
        y = g("MatMul", shares, g("Unsqueeze", value, g.integers(2)))
        y = g.reshape(g("Transpose", y, perm=(0, 3, 1, 2, 4)), 0, 0, self.heads * self.size)
        return self.w.linear(f"{at}.{self.row.out}", y)

    def _heads(self, at: str, i: int, x: str) -> tuple[str, str, str]:
        """Query, key and value, (batch, sequence, heads, size), normalized and rotated as the model does."""
        g, size = self.g, self.size
        parts = [self.w.linear(f"{at}.{name}", x) for name in self.row.qkv]
        if len(parts) == 1:
            parts = g.split(parts[0], *(n * size for n in (self.heads, self.kv, self.kv)))
        query, key, value = (g.reshape(p, 0, 0, -1, size) for p in parts)
        if self.row.head_norms:
            query, key = self._norm(f"{at}.q_norm", query), self._norm(f"{at}.k_norm", key)
        if not self.row.positions:
            query, key = self._rotate(query, i), self._rotate(key, i)
        return query, key, value

    def _cached(self, i: int, what: str, new: str) -> str:
        """Past and new keys or values, (batch, kv, total, size)."""
        g, past, present = self.g, f"past_key_values.{i}.{what}", f"present.{i}.{what}"
        shape = ("batch_size", self.kv, "past_sequence_length", self.size)
        self._put(g.inputs, past, *shape)
        self._put(g.outputs, present, *shape[:2], "total_sequence_length", shape[3])
        return g("Concat", past, g("Transpose", new, perm=(0, 2, 1, 3)), axis=2, output=present)

    def _rotate(self, x: str, i: int) -> str:
        """Turns the first numbers of every head, half of them with the other half, by angles of the position."""
        g, size = self.g, self.size
        cos, sin, half = *self._angles(i), self._frequencies(i)[0].numel()
        a, b, *rest = g.split(x, half, half, *([size - 2 * half] if size > 2 * half else []))
        turned = g("Sub", g("Mul", a, cos), g("Mul", b, sin)), g("Add", g("Mul", b, cos), g("Mul", a, sin))
        return g("Concat", *turned, *rest, axis=-1)

    def _angles(self, i: int) -> tuple[str, str]:
        """Cosine and sine, (batch, sequence, 1, half), of a layer's kind."""
        kind = self._kind(i)
        if kind not in self.angles:
            g, (frequencies, scaling) = self.g, self._frequencies(i)
            at = g("Cast", g("Unsqueeze", "position_ids", g.integers(2, 3)), to=TensorProto.FLOAT)
            angle = g("Mul", at, g.constant(frequencies))
            cos, sin = (g("Mul", g(op, angle), g.number(scaling, torch.float32)) for op in ("Cos", "Sin"))
            self.angles[kind] = g.narrow(cos), g.narrow(sin)
        return self.angles[kind]

    def _frequencies(self, i: int) -> tuple[torch.Tensor, float]:
        """float32 (half,) and what cosine and sine are multiplied with: the model's own, whatever scaled them."""
        rotary, kind = self.model.model.rotary_emb, self._kind(i)
        own = "" if hasattr(rotary, "inv_freq") else f"{kind}_"
        found = getattr(rotary, f"{own}inv_freq").float().cpu(), getattr(rotary, f"{own}attention_scaling")
        return found[0].contiguous(), float(found[1])

    def _kind(self, i: int) -> str:
        kinds = getattr(self.config, "layer_types", None) if self.row.slides == "some" else None
        return kinds[i] if kinds else "full_attention"

    def _window(self, i: int) -> int | None:
        """How many tokens a layer sees, its own among them; None for all."""
        slides = self.row.slides == "all" or self._kind(i) == "sliding_attention"
        return getattr(self.config, "sliding_window", None) if slides else None

    def _mask(self, window: int | None) -> str:
        """What a token may look at: bool, (batch, 1, 1, sequence, total)."""
        if window not in self.masks:
            g = self.g
            total, new = (g("Shape", name, start=1, end=2) for name in ("attention_mask", "input_ids"))
            zero, one = (g.constant(torch.tensor(v)) for v in (0, 1))
            total, new = g("Squeeze", total), g("Squeeze", new)
            keys = g("Range", zero, total, one)
            queries = g("Unsqueeze", g("Range", g("Sub", total, new), total, one), g.integers(1))
            seen = g("LessOrEqual", keys, queries)
            if window is not None:
                seen = g("And", seen, g("Greater", keys, g("Sub", queries, g.constant(torch.tensor(window)))))
            given = g("Unsqueeze", g("Greater", "attention_mask", zero), g.integers(1, 2, 3))
            self.masks[window] = g("And", given, seen)
        return self.masks[window]
