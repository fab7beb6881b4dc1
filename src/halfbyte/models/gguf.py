"""Architectures in GGUF: a row each, which says how a config and the tensors' names and values go in and out."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from halfbyte.containers.gguf import File, Value
from halfbyte.errors import InputError
from halfbyte.layers import ops
from halfbyte.models.structure import tied
from halfbyte.qtensor import QTensor
from halfbyte.scheme import Part

_SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "vocab_size": "vocab_size",
}
_DECODER = {
    **_SIZES,
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}


@dataclass(frozen=True)
class Architecture:
    """name: GGUF's. model_types: transformers' names of it; the first is what a file is read as. model: its class.

    keys: metadata key, without the name in front -> the config's attribute. rotary: whether positions are rotations,
    with a head's size of its own. interleaved: the tensors whose rows are paired as (0, 1) (2, 3) ... there, where
    transformers pairs (0, d/2) (1, d/2 + 1) ...: name -> the attribute with the number of heads. centered: norms are
    stored as 1 + w. fixed: attributes that the program which reads a file takes for granted.
    """

    name: str
    model_types: tuple[str, ...]
    model: str
    keys: Mapping[str, str]
    rotary: bool = True
    interleaved: Mapping[str, str] = field(default_factory=dict)
    centered: bool = False
    fixed: Callable[[Any], Mapping[str, Any]] = lambda config: {}

    def tensor(self, parameter: str, config: Any) -> str:
        """GGUF's name of a parameter. Raises InputError if it has none."""
        found = _names(self.name, config.num_hidden_layers).get_name(parameter, (".weight", ".bias"))
        if found is None:
            raise InputError(f"{parameter}: GGUF's architecture {self.name} has no name for it.")
        return found

    def rows(self, tensor: str, config: Any) -> Tensor | None:
        """The order of rows in the file, as indices of transformers' rows; None where it is the same."""
        heads = next((a for t, a in self.interleaved.items() if f".{t}." in tensor), None)
        if heads is None:
            return None
        n = getattr(config, heads)
        return torch.arange(n * head_dim(config)).reshape(n, 2, -1).transpose(1, 2).reshape(-1)

    def offset(self, tensor: str) -> float:
        """What the file's values of a tensor are larger by."""
        return 1.0 if self.centered and tensor.endswith("norm.weight") else 0.0


@cache
def _names(architecture: str, blocks: int) -> Any:
    """The gguf package's table of names."""
    import gguf

    arch = next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == architecture)
    return gguf.get_tensor_name_map(arch, blocks)


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _gemma3(config: Any) -> dict[str, Any]:
    """What llama.cpp takes for granted of a gemma3 file."""
    period = [(i + 1) % 6 == 0 for i in range(config.num_hidden_layers)]
    return {
        "layer_types": ["full_attention" if full else "sliding_attention" for full in period],
        "query_pre_attn_scalar": head_dim(config),
        "hidden_activation": "gelu_pytorch_tanh",
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
        "use_bidirectional_attention": False,
    }


def _silu(config: Any) -> dict[str, Any]:
    return {"hidden_act": "silu"}


ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture("llama", ("llama", "mistral"), "LlamaForCausalLM", _DECODER, fixed=_silu,
                     interleaved={"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}),
        Architecture("qwen2", ("qwen2",), "Qwen2ForCausalLM", _DECODER, fixed=_silu),
        Architecture("qwen3", ("qwen3",), "Qwen3ForCausalLM", _DECODER, fixed=_silu),
        Architecture("phi3", ("phi3",), "Phi3ForCausalLM", _DECODER, fixed=_silu),
        Architecture("gemma3", ("gemma3_text",), "Gemma3ForCausalLM", _DECODER, centered=True, fixed=_gemma3),
        Architecture("gpt2", ("gpt2",), "GPT2LMHeadModel",
                     {**_SIZES, "feed_forward_length": "n_inner",
                      "attention.layer_norm_epsilon": "layer_norm_epsilon"}, rotary=False,
                     fixed=lambda config: {"activation_function": "gelu_new", "scale_attn_weights": True,
                                           "scale_attn_by_inverse_layer_idx": False}),
    )
}  # fmt: skip
_SLIDING = "attention.sliding_window"


def architecture_of(config: Any) -> Architecture:
    """The row of a transformers config. Raises InputError where GGUF, or halfbyte, has none for it, or where the file
    could not say what the config says."""
    found = next((a for a in ARCHITECTURES.values() if config.model_type in a.model_types), None)
    if found is None:
        known = sorted(t for a in ARCHITECTURES.values() for t in a.model_types)
        raise InputError(f"models of type {config.model_type} are not written to GGUF yet; {', '.join(known)} are.")
    for key, value in found.fixed(config).items():
        if (ours := getattr(config, key, value)) != value:
            raise InputError(f"GGUF's architecture {found.name} has no word for {key} = {ours}: readers take {value}.")
    return found


def metadata(config: Any) -> dict[str, Value]:
    """What a file says of the architecture. Raises InputError as `architecture_of` does, and for a kind of rotary
    scaling that GGUF does not know."""
    arch = architecture_of(config)
    said: dict[str, Any] = {key: getattr(config, attribute) for key, attribute in arch.keys.items()}
    said["feed_forward_length"] = said["feed_forward_length"] or 4 * config.hidden_size  # GPT-2's default
    if arch.rotary:
        said |= {"attention.key_length": head_dim(config), "attention.value_length": head_dim(config)}
        said |= _rope(config)
    if (window := getattr(config, "sliding_window", None)) and _slides(config):
        said[_SLIDING] = window
    elif arch.name == "phi3":
        said[_SLIDING] = config.max_position_embeddings  # its readers want one
    if arch.name == "llama" and window:  # no reader lets this architecture forget
        said["context_length"] = min(said["context_length"], window)
    return {"general.architecture": arch.name, **{f"{arch.name}.{k}": v for k, v in said.items()}}


def _slides(config: Any) -> bool:
    return config.model_type in ("gemma3_text", "phi3")


def _rope(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    if "full_attention" in rope:  # Gemma: a theta for each kind of layer
        local = rope["sliding_attention"]
        if local.get("rope_theta") != 10000.0 or local.get("rope_type", "default") != "default":
            raise InputError(f"GGUF's readers take rope_theta 10000 for sliding layers; the config says {local}.")
        rope = rope["full_attention"]
    kind = rope.get("rope_type", "default")
    rotated = int(head_dim(config) * rope.get("partial_rotary_factor", 1.0))
    said: dict[str, Any] = {"rope.freq_base": float(rope["rope_theta"]), "rope.dimension_count": rotated}
    match kind:
        case "default" | "llama3":  # llama3's is a tensor
            return said
        case "linear" | "yarn":
            said |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
            if "original_max_position_embeddings" in rope:
                said["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
            odd = set(rope) - {"rope_type", "rope_theta", "factor", "original_max_position_embeddings", "type"}
            if odd:
                raise InputError(f"rope_parameters: {', '.join(sorted(odd))} of {kind} cannot be said in GGUF yet.")
            return said
    raise InputError(f"rope_parameters: rotary scaling of type {kind} is not written to GGUF yet.")


def rope_factors(config: Any) -> Tensor | None:
    """The tensor `rope_freqs.weight`: what every rotary frequency is divided by, float32 (head_dim / 2,). None unless
    the config scales as Llama 3 does."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":
        return None
    return _llama3(head_dim(config), **{k: rope[k] for k in ("rope_theta", *_LLAMA3)})


_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def _llama3(
    dim: int, rope_theta: float, factor: float, low_freq_factor: float, high_freq_factor: float,
    original_max_position_embeddings: int,
) -> Tensor:  # fmt: skip
    """Long waves are stretched by the factor, short ones not, and between them it goes smoothly (Llama 3.1)."""
    frequency = 1.0 / rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    waves = original_max_position_embeddings * frequency / (2 * math.pi)  # in the original context
    smooth = (waves - low_freq_factor) / (high_freq_factor - low_freq_factor)
    between = 1 / ((1 - smooth) / factor + smooth)
    return torch.where(waves < low_freq_factor, factor, torch.where(waves > high_freq_factor, 1.0, between))


def read_config(file: File) -> Any | None:
    """The transformers config of a file; None for an architecture that is no row here. Raises InputError for
    metadata that is missing or makes no sense."""
    import transformers

    arch = ARCHITECTURES.get(file.text("general.architecture"))
    if arch is None:
        return None
    said = {k.removeprefix(f"{arch.name}."): v for k, v in file.metadata.items() if k.startswith(f"{arch.name}.")}
    settings = {a: _number(file, arch, said, k) for k, a in arch.keys.items() if k != "vocab_size" or k in said}
    tokens = file.infos.get("token_embd.weight")
    if tokens is None or len(tokens.shape) != 2:
        raise InputError(f"{file.path}: it has no token_embd.weight.")
    settings["vocab_size"] = tokens.shape[0]
    if arch.rotary:
        size = said.get("attention.key_length", settings["hidden_size"] // max(1, settings["num_attention_heads"]))
        settings |= {"head_dim": int(size), "rope_parameters": _read_rope(file, arch, said, int(size))}
    if _SLIDING in said and arch.name == "gemma3":
        settings["sliding_window"] = int(said[_SLIDING])
    for name in ("bos", "eos", "pad"):
        key = f"tokenizer.ggml.{'padding' if name == 'pad' else name}_token_id"
        settings[f"{name}_token_id"] = _id(file.metadata.get(key))
    if "blk.0.attn_q.bias" in file and arch.name == "llama":
        settings["attention_bias"] = True
    settings["tie_word_embeddings"] = "output.weight" not in file
    settings["architectures"] = [arch.model]
    made = getattr(transformers, arch.model).config_class(**settings)
    for key, value in arch.fixed(made).items():
        setattr(made, key, value)
    return made


def _number(file: File, arch: Architecture, said: Mapping[str, Any], key: str) -> Any:
    value = said.get(key)
    if key == "attention.head_count_kv" and value is None:
        value = said.get("attention.head_count")
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1 << 31:
        raise InputError(f"{file.path}: {arch.name}.{key} is {str(value)[:40]}, where a number is needed.")
    return value


def _id(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 1 << 31 else None


def _read_rope(file: File, arch: Architecture, said: Mapping[str, Any], dim: int) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(said.get("rope.freq_base", 10000.0))}
    rotated = said.get("rope.dimension_count", dim)
    if rotated != dim:
        rope["partial_rotary_factor"] = rotated / dim
    kind = said.get("rope.scaling.type", "none")
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": float(said.get("rope.scaling.factor", 1.0))}
        if (original := said.get("rope.scaling.original_context_length")) is not None:
            rope["original_max_position_embeddings"] = int(original)
    elif kind != "none" or "rope_factors_long.weight" in file:
        raise InputError(f"{file.path}: rotary scaling of type {str(kind)[:40]} is not read yet.")
    if "rope_freqs.weight" in file:
        rope |= _read_llama3(file, rope["rope_theta"], dim)
    if arch.name == "gemma3":
        return {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    return rope


def _read_llama3(file: File, theta: float, dim: int) -> dict[str, Any]:
    """The settings whose factors are those of the file. Raises InputError if Llama 3's own are not."""
    found = file.get("rope_freqs.weight", torch.float32)
    assert isinstance(found, Tensor)
    settings = {**_LLAMA3, "factor": round(found.max().item(), 3)}
    if found.shape != (dim // 2,) or not torch.allclose(_llama3(dim, theta, **settings), found, 1e-3):
        raise InputError(f"{file.path}: its rope_freqs.weight is not Llama 3's.")
    return {"rope_type": "llama3", **settings}


_NOT_PARAMETERS = r"rope_freqs\.weight|.*\.attn_rot_embd(\.weight)?"


class Stored:
    """The weights of a file: a Source of halfbyte.models.checkpoint."""

    def __init__(self, file: File, config: Any, dtype: torch.dtype) -> None:
        self.file, self.config, self.dtype = file, config, dtype
        self.arch = architecture_of(config)

    def _tensor(self, name: str) -> str | None:
        try:
            return self.arch.tensor(name, self.config)
        except InputError:
            return None

    def __contains__(self, name: str) -> bool:
        return self._tensor(name) in self.file.infos

    def check(self, parameters: Mapping[str, Any]) -> None:
        """Raises InputError if the file lacks one of the model's parameters, tied ones counted once, or holds tensors
        that are none: what they do would be left out."""
        groups: dict[int, list[str]] = {}
        for name, p in parameters.items():
            groups.setdefault(id(p), []).append(name)
        if missing := next((g[0] for g in groups.values() if not any(n in self for n in g)), None):
            raise InputError(f"{self.file.path}: it lacks the tensor {self._tensor(missing) or missing}.")
        known = {self._tensor(n) for n in parameters}
        if extra := next((t for t in self.file if t not in known and not re.fullmatch(_NOT_PARAMETERS, t)), None):
            raise InputError(
                f"{self.file.path}: the tensor {extra} is no part of {self.arch.model} as the metadata describes it."
            )

    def input(self, name: str) -> tuple[None, None]:
        return None, None

    def get(self, name: str, shape: tuple[int, ...], turned: bool = False) -> Tensor | QTensor:
        """See Source: GGUF holds (out, in) also where transformers' own checkpoints are turned."""
        tensor = self.arch.tensor(name, self.config)
        value = self.file.get(tensor, self.dtype)
        if offset := self.arch.offset(tensor):
            assert isinstance(value, Tensor)
            value = value.float() - offset
        order = self.arch.rows(tensor, self.config)
        return value if order is None else _reorder(value, order.argsort())


def _reorder(value: Tensor | QTensor, order: Tensor) -> Tensor | QTensor:
    """Rows in another order. Raises InputError where there are not so many."""
    if value.shape[0] != len(order):
        raise InputError(f"a tensor of shape {tuple(value.shape)} has not the {len(order)} rows of its heads.")
    return value.rows(order) if isinstance(value, QTensor) else value[order]


def placed(parameter: str, value: Tensor | QTensor, config: Any) -> Tensor | QTensor:
    """A parameter of a model -> what the file holds for it. value: in the op's orientation. What has one dimension is
    kept in float32, as readers want it."""
    arch = architecture_of(config)
    tensor = arch.tensor(parameter, config)
    order = arch.rows(tensor, config)
    if order is not None:
        value = _reorder(value, order)
    if isinstance(value, Tensor) and value.ndim == 1:
        value = value.float() + arch.offset(tensor)
    return value


def extra_tensors(config: Any) -> Iterator[tuple[str, Tensor]]:
    """What a file holds that is no parameter of the model."""
    if (factors := rope_factors(config)) is not None:
        yield "rope_freqs.weight", factors


def parts(model: Any) -> list[Part]:
    """What a mix must know of each weight of a model. Raises InputError for an architecture without names in GGUF."""
    config, shared = model.config, tied(model)
    arch = architecture_of(config)
    out = []
    for name, op in ops(model):
        if name in shared:
            continue
        at = re.fullmatch(r"(?:blk\.(\d+)\.)?(.+)\.weight", arch.tensor(f"{name}.weight", config))
        assert at is not None
        sharing = config.num_attention_heads // (
            getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        )
        out.append(Part(name, at[2], int(at[1] or 0), config.num_hidden_layers, op.weight.shape[-1], sharing))
    return out
