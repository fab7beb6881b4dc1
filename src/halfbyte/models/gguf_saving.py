"""A model -> a GGUF file, one tensor at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.containers import ggml
from halfbyte.containers import gguf as container
from halfbyte.errors import InputError
from halfbyte.formats import FORMATS, Format
from halfbyte.layers import Linear, Op
from halfbyte.models import gguf, gguf_tokenizer
from halfbyte.models.loading import Loaded
from halfbyte.models.saving import Value, cast, parameters, rounded

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def refuses(loaded: Loaded, formats: Mapping[str, Format], floats: torch.dtype | None = None) -> str | None:
    """Why no GGUF file can hold the model as `save` would write it, in words; None if one can."""
    try:
        gguf.metadata(loaded.config)
        for name, op, _ in parameters(loaded):
            gguf.architecture_of(loaded.config).tensor(name, loaded.config)
            if op is not None and op.weight.grid is not None:
                return f"{name} is still seen through a grid: freeze it before saving"
            f = _format(name, op, formats, floats)
            if f is not None and op is not None:
                ggml.row_bytes(f, op.weight.shape[-1])
            if isinstance(op, Linear) and op.input is not None:
                return f"{name}: its inputs are rounded to {op.input}, which GGUF's readers do not do"
    except InputError as e:
        return str(e).rstrip(".")
    return None


def save(
    loaded: Loaded, path: Path, formats: Mapping[str, Format], floats: torch.dtype | None = None,
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
) -> None:  # fmt: skip
    """Writes the model as a GGUF file. formats: op's name -> what its weight is rounded to, to nearest. floats: the
    dtype that all others get, codes among them; if None they stay the codes or floats that they are. What has one
    dimension is float32.

    Raises InputError where `refuses` would have said why, and for values that a dtype cannot hold.
    """
    if (why := refuses(loaded, formats, floats)) is not None:
        raise InputError(f"{why}.")
    config, tokenizer = loaded.config, loaded.tokenizer
    arch, dtype = gguf.architecture_of(config), floats or config.dtype
    heads: dict[str, tuple[str, tuple[int, ...]]] = {}
    values: list[Callable[[], Value]] = []
    for name, op, get in parameters(loaded):
        f = _format(name, op, formats, floats)
        shape = tuple(op.weight.shape if op is not None else loaded.model.get_parameter(name).shape)
        kind = f.name if f is not None else "f32" if len(shape) == 1 else _kind(dtype)
        heads[arch.tensor(name, config)] = kind, shape
        values.append(partial(_value, name, get, f, dtype, config))
    extra = dict(gguf.extra_tensors(config))
    heads |= {n: ("f32", tuple(t.shape)) for n, t in extra.items()}

    def stream() -> Iterator[tuple[str, Value]]:
        for i, (tensor, get) in enumerate(zip(heads, values, strict=False)):
            yield tensor, get()
            on_tensor(i + 1, len(heads))
        yield from extra.items()

    said = gguf.metadata(config) | _general(loaded, heads)
    if tokenizer is not None:
        generation = getattr(loaded.model, "generation_config", None)
        said |= gguf_tokenizer.metadata(tokenizer, config.vocab_size, generation)
    container.write(path, said, heads, stream())


def _format(name: str, op: Op | None, formats: Mapping[str, Format], floats: torch.dtype | None) -> Format | None:
    """The format of a parameter in the file; None for floats."""
    kept = None if op is None or floats else op.weight.format
    return formats.get(name.removesuffix(".weight"), kept)


def _kind(dtype: torch.dtype) -> str:
    return next(k for k, d in container.FLOATS.items() if d == dtype)


def _value(name: str, get: Callable[[], Value], f: Format | None, dtype: torch.dtype, config: Any) -> Value:
    """A parameter as the file holds it."""
    v = get()
    if f is not None:
        v = rounded(name, v, f)
    else:
        v = v if isinstance(v, Tensor) else v.dequantize()
        v = v if v.ndim == 1 else cast(name, v, dtype)
    return gguf.placed(name, v, config)


def _general(loaded: Loaded, heads: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, container.Value]:
    """Name and kind of the file. file_type: that of most weights, as llama.cpp numbers them."""
    import gguf as package

    count: Counter[str] = Counter()
    for kind, shape in heads.values():
        if len(shape) > 1:
            count[kind] += shape[0] * shape[-1]
    most = count.most_common(1)[0][0].upper()
    named = {"F32": "ALL_F32", "Q4_K": "MOSTLY_Q4_K_M", "Q5_K": "MOSTLY_Q5_K_M", "Q3_K": "MOSTLY_Q3_K_M"}
    kind = getattr(package.LlamaFileType, named.get(most, f"MOSTLY_{most}"), None)
    out: dict[str, container.Value] = {"general.type": "model", "general.name": Path(loaded.source).stem or "model"}
    if kind is not None:
        out["general.file_type"] = int(kind)
    if any(k.lower() in FORMATS for k in count):
        out["general.quantization_version"] = 2
    return out
