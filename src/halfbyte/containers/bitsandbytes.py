"""The layouts of bitsandbytes: NF4 and FP4, with or without double quantization, and LLM.int8. It needs no library.

A weight `X` of n numbers is `X.weight` uint8 (n/2, 1), the earlier number in the high nibble; blocks run over
the flattened (out, in) matrix. Beside it are `X.weight.absmax`, `X.weight.quant_map`, and the rest as JSON in
a uint8 tensor, `X.weight.quant_state.bitsandbytes__nf4`. Double quantization adds `nested_absmax` and
`nested_quant_map`, and keeps the mean of the constants as `nested_offset` in the JSON.

LLM.int8 has `X.weight` int8 (out, in), `X.SCB` float32 (out), the largest magnitude of each row, which 127 stands for,
and `X.weight_format`, 0. Its readers round inputs to 8 bits but for the outliers among them; halfbyte does not.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halfbyte.containers.words import typed
from halfbyte.errors import InputError
from halfbyte.formats import FORMATS, Format, Table
from halfbyte.qtensor import QTensor, check_parts

if TYPE_CHECKING:
    from halfbyte.containers import Get

METHOD = "bitsandbytes"
READER = "transformers + bitsandbytes"

_TYPES = {"nf4": "nf4", "fp4": "fp4-bnb"}  # bitsandbytes' name of a grid: ours
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FLOATS = tuple(_DTYPES.values())
_STATE = ".weight.quant_state.bitsandbytes__"
_INT8 = FORMATS["int8-bnb"]


def _type(f: Format) -> str | None:
    """bitsandbytes' name of the format's grid, None if it has none."""
    return next((theirs for theirs, ours in _TYPES.items() if f.grid == FORMATS[f"{ours}-g64"].grid), None)


def refuses(f: Format, role: str) -> str | None:
    """See Container. Conv1D is held as the Linear that bitsandbytes makes of it, (out, in)."""
    if role not in ("linear", "conv1d"):
        return f"it has no place for a weight of kind {role}"
    if f == _INT8:
        return None
    if _type(f) is None or not f.flat or f.scale not in ("float32", FORMATS["nf4-g64-dq"].scale):
        return f"it has no layout for {f.name}, only for nf4, nf4 with -dq, fp4-bnb and int8-bnb"
    if f.group not in _BLOCKS:
        return f"it has no blocks of {f.group}, only of {', '.join(map(str, _BLOCKS))}"
    return None


def encode(name: str, q: QTensor, input: Format | None = None) -> dict[str, Tensor]:
    """See Container. Codes and constants unchanged. Raises InputError for rows that are no whole blocks."""
    if q.format == _INT8:
        return _encode_int8(name, q)
    f, kind = q.format, _type(q.format)
    if q.shape[-1] % int(f.group):
        # bitsandbytes 0.50 takes constants by rows there on CPUs with AVX-512, and multiplies with wrong ones
        raise InputError(
            f"{name}: its {q.shape[-1]} inputs are no multiple of {f.group}; on some CPUs bitsandbytes reads "
            f"those wrongly. Choose a smaller block than {f.name} has, or keep this weight."
        )
    state: dict[str, Any] = {
        "quant_type": kind,
        "blocksize": f.group,
        "dtype": str(q.dtype).removeprefix("torch."),
        "shape": list(q.shape),
    }
    parts = q.tensors()
    out = {"weight": _swap_nibbles(parts["codes"])[:, None], "weight.quant_map": _map(f)}
    if isinstance(f.scale, Format):
        state["nested_blocksize"] = f.scale.group
        state["nested_dtype"] = "float32"
        state["nested_offset"] = parts["scale.offset"].item()
        out |= {"weight.absmax": parts["scale.codes"], "weight.nested_absmax": parts["scale.scale"]}
        out["weight.nested_quant_map"] = _map(f.scale)
    else:
        out["weight.absmax"] = parts["scale"]
    text = json.dumps(state).encode()
    out[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(text), dtype=torch.uint8)
    return {f"{name}.{k}": t.clone() for k, t in out.items()}  # a file refuses tensors that share memory


def _encode_int8(name: str, q: QTensor) -> dict[str, Tensor]:
    scale = q.tensors()["scale"].reshape(-1)
    largest = scale * 127
    # Of two that would be read as this scale it is the float16, in which bitsandbytes finds them.
    short = largest.half().float()
    return {
        f"{name}.weight": (q.codes ^ 128).view(torch.int8),  # two's complement: the highest bit turned
        f"{name}.SCB": torch.where(short / 127 == scale, short, largest),
        f"{name}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def _decode_int8(name: str, shape: tuple[int, ...], get: Get, dtype: torch.dtype) -> QTensor:
    codes = typed(f"{name}.weight", get(f"{name}.weight"), (torch.int8,), shape)
    largest = typed(f"{name}.SCB", get(f"{name}.SCB"), (torch.float32,), shape[:1])
    parts: dict[str, Tensor | QTensor] = {"codes": codes.view(torch.uint8) ^ 128, "scale": largest[:, None] / 127}
    return check_parts(QTensor(_INT8, shape, dtype, parts))


def _map(f: Format) -> Tensor:
    assert isinstance(f.grid, Table)
    return f.grid.codebook


def _swap_nibbles(packed: Tensor) -> Tensor:
    """Our first code is in the low nibble, theirs in the high one."""
    return (packed >> 4) | (packed << 4)


def config(sites: Mapping[str, tuple[QTensor, Format | None]], kept: list[str]) -> dict[str, Any]:
    """See Container. What transformers' BitsAndBytesConfig writes; each weight's own state decides for it.

    Raises InputError if a kept name would make readers skip a quantized module too, or weights of 8 and of 4 bits are
    mixed.
    """
    for k in kept:
        if hidden := next((n for n in sites if n.endswith(k) or n.startswith(f"{k}.")), None):
            raise InputError(f"bitsandbytes: readers that keep {k} would keep {hidden} too, which is quantized.")
    weights = [q for q, _ in sites.values()]
    eight = {q.format == _INT8 for q in weights} or {False}
    if len(eight) > 1:
        raise InputError("bitsandbytes: a folder has weights of 8 bits or of 4, not of both.")
    if eight == {True}:
        return _said(kept, 8)
    return {
        **_said(kept, 4),
        "bnb_4bit_quant_type": _type(weights[0].format) if weights else "nf4",
        "bnb_4bit_use_double_quant": any(isinstance(q.parts["scale"], QTensor) for q in weights),
        "bnb_4bit_compute_dtype": str(weights[0].dtype).removeprefix("torch.") if weights else "float32",
    }


def _said(kept: list[str], bits: int) -> dict[str, Any]:
    """What BitsAndBytesConfig says of its own accord."""
    return {
        "quant_method": METHOD,
        "_load_in_8bit": bits == 8,
        "_load_in_4bit": bits == 4,
        "llm_int8_threshold": 6.0,
        # even when empty: without a list readers choose for themselves
        "llm_int8_skip_modules": list(kept),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "load_in_4bit": bits == 4,
        "load_in_8bit": bits == 8,
    }


def formats(config: Mapping[str, Any], names: set[str], get: Get) -> dict[str, tuple[Format, Format | None]]:
    """See Container. Raises InputError for a state that cannot be read, and for rows of 8 bits in another order."""
    out: dict[str, tuple[Format, Format | None]] = {}
    if config.get("load_in_8bit") or config.get("_load_in_8bit"):
        for name in sorted(n.removesuffix(".SCB") for n in names if n.endswith(".SCB")):
            if (full := f"{name}.weight_format") in names and get(full).flatten()[:2].tolist() != [0]:
                raise InputError(f"{full}: the weight is in the order of a GPU; halfbyte reads rows (0) only.")
            out[name] = (_INT8, None)
        return out
    for full in sorted(n for n in names if _STATE in n):
        name, _, kind = full.rpartition(_STATE)
        out[name] = (_format(full, kind, _state(full, get)), None)
    return out


def _state(full: str, get: Get) -> dict[str, Any]:
    data = get(full)
    try:
        if data.dtype != torch.uint8 or data.numel() > 1 << 16:
            raise ValueError
        state = json.loads(bytes(data.flatten().tolist()))
    except (ValueError, RecursionError):
        raise InputError(f"{full} is not a JSON text in bytes.") from None
    if not isinstance(state, dict):
        raise InputError(f"{full} should hold a JSON object, not a {type(state).__name__}.")
    return state


def _format(full: str, kind: str, state: Mapping[str, Any]) -> Format:
    """The format that a state describes. Raises InputError."""
    if kind not in _TYPES or state.get("quant_type") != kind:
        said = state.get("quant_type", kind)
        raise InputError(f"{full}: the type is {reprlib.repr(said)}; halfbyte reads {', '.join(_TYPES)}.")
    block = state.get("blocksize")
    if type(block) is not int or block not in _BLOCKS:
        raise InputError(f"{full}: a blocksize of {reprlib.repr(block)} is none of {', '.join(map(str, _BLOCKS))}.")
    if "nested_blocksize" not in state:
        return FORMATS[f"{_TYPES[kind]}-g{block}"]
    nested = FORMATS["nf4-g64-dq"].scale
    assert isinstance(nested, Format)
    offset = state.get("nested_offset")
    sane = type(offset) is float and abs(offset) <= torch.finfo(torch.float32).max  # JSON may say NaN
    if state["nested_blocksize"] != nested.group or not sane:
        raise InputError(f"{full}: halfbyte reads double quantization in blocks of {nested.group} with an offset.")
    if kind != "nf4":
        raise InputError(f"{full}: halfbyte reads double quantization of nf4 only, not of {kind}.")
    return FORMATS[f"{_TYPES[kind]}-g{block}-dq"]


def decode(name: str, f: Format, shape: tuple[int, ...], get: Get, config: Mapping[str, Any] = {}) -> QTensor:
    """See Container."""
    if f == _INT8:
        return _decode_int8(name, shape, get, config.get("dtype", torch.float32))
    full = f"{name}{_STATE}{_type(f)}"
    state = _state(full, get)
    if _format(full, str(_type(f)), state) != f:
        raise InputError(f"{full}: the weight is not stored as {f.name}.")
    if state.get("shape") != list(shape):
        raise InputError(
            f"{full}: the weight's shape is {reprlib.repr(state.get('shape'))}; the model needs {list(shape)}."
        )
    said = state.get("dtype")
    dtype = _DTYPES.get(said) if isinstance(said, str) else None
    if dtype is None:
        raise InputError(f"{full}: the dtype is {reprlib.repr(said)}, not one of {', '.join(_DTYPES)}.")
    weight = f"{name}.weight"
    _check_map(f"{weight}.quant_map", f, get)
    stored = get(weight)  # of any dtype: bnb_4bit_quant_storage only changes what the bytes are called
    codes = _swap_nibbles(stored.contiguous().reshape(-1).view(torch.uint8))
    scale = _absmax(weight, f, f.groups(shape), state, get)
    try:
        return check_parts(QTensor(f, shape, dtype, {"codes": codes, "scale": scale}))
    except InputError as e:
        raise InputError(f"{weight}: {e}") from None


def _check_map(full: str, f: Format, get: Get) -> None:
    """Raises InputError if the file's map is not the format's: its codes would stand for other values."""
    theirs, ours = get(full), _map(f)
    if theirs.dtype != ours.dtype or theirs.shape != ours.shape or not torch.allclose(theirs, ours, 0, 1e-6):
        raise InputError(f"{full}: its values are not those of {f.name}.")


def _absmax(weight: str, f: Format, groups: tuple[int, ...], state: Mapping[str, Any], get: Get) -> Tensor | QTensor:
    """The block constants: float32 (groups,), or codes of them where they are quantized themselves."""
    nested = f.scale
    absmax = _typed(f"{weight}.absmax", torch.uint8 if isinstance(nested, Format) else torch.float32, groups, get)
    if not isinstance(nested, Format):
        return absmax
    _check_map(f"{weight}.nested_quant_map", nested, get)
    outer = _typed(f"{weight}.nested_absmax", torch.float32, nested.groups(groups), get)
    offset = torch.tensor(float(state["nested_offset"]), dtype=torch.float32)
    return QTensor(nested, groups, torch.float32, {"codes": absmax, "scale": outer, "offset": offset})


def _typed(full: str, dtype: torch.dtype, shape: tuple[int, ...], get: Get) -> Tensor:
    """A tensor of the file, flat. Raises InputError if it is of another dtype or size."""
    t = get(full)
    if t.dtype != dtype or t.numel() != prod(shape):
        raise InputError(f"{full} should hold {prod(shape)} numbers of {dtype}, not {tuple(t.shape)} {t.dtype}.")
    return t.reshape(shape)
