"""What weights take in an output, format by format, before any is quantized: on disk, or in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from halfbyte import models
from halfbyte.containers import DEFAULTS, Container, container_for, ggml
from halfbyte.containers import gguf as gguf_file
from halfbyte.errors import InputError
from halfbyte.formats import Format, parse
from halfbyte.kernels import quantize
from halfbyte.layers import Op
from halfbyte.models import Loaded, gguf, gguf_tokenizer
from halfbyte.models.saving import parameters
from halfbyte.plan import inventory
from halfbyte.qtensor import QParams, stored_bytes

# What a format is chosen from where none are named; those that do not fit a weight's width are left out there.
GGUF = ("q2_k", "q3_k", "iq4_nl", "q4_0", "q4_k", "q5_0", "q5_1", "q5_k", "q6_k", "q8_0")
FOLDER = ("int2-g32", "int3-g64", "int3-g32", "int4-g128", "int4-g64", "int4-g32", "int5-g64", "int6-g64", "int8-g128",
          "int8-g64")  # fmt: skip
_KEPT = ("router", "position", "convolution")  # roles: these are small, and stay
_KEPT_IN_GGUF = ("position_embd", "ffn_gate_inp")  # places that llama.cpp never quantizes
_SLACK = 1 << 10  # bytes of a header beside its names: what kind of file it is
_ENTRY = 120  # bytes that a tensor takes in a header of safetensors, beside its name
_INFO = 48  # and in one of GGUF


@dataclass(frozen=True)
class Footprint:
    """choices: op's name -> format -> bytes, for all weights that may be quantized. kept: why others stay floats. rest:
    bytes of these and of all else; not less than what they will be. parameters: how many the model has."""

    choices: dict[str, dict[Format, int]]
    kept: dict[str, str]
    rest: int
    parameters: int

    @property
    def least(self) -> int:
        """Bytes with the smallest format everywhere."""
        return self.rest + sum(min(c.values()) for c in self.choices.values())

    @property
    def most(self) -> int:
        return self.rest + sum(max(c.values()) for c in self.choices.values())


def footprint(loaded: Loaded, formats: Sequence[Format], as_gguf: bool, disk: bool) -> Footprint:
    """Of a model, whose weights need not be in memory, in some formats: as a GGUF file or a folder. disk: whether bytes
    are those of the weight files, or those in memory that `Run.bits_per_weight` counts.

    Raises InputError for a format that the output cannot hold at all, or if no weight may be quantized to any.
    """
    role, shared, dtype = models.roles(loaded.model), models.tied(loaded.model), loaded.config.dtype
    container = None if as_gguf else _container(formats, set(role.values()))
    measure = _memory_bytes if not disk else _gguf_bytes if container is None else _folder_bytes(container)
    rest = 0 if not disk else _gguf_rest(loaded) if as_gguf else _SLACK
    choices: dict[str, dict[Format, int]] = {}
    kept: dict[str, str] = {}
    small = {p.name: p.place for p in models.parts(loaded.model) if p.place in _KEPT_IN_GGUF} if as_gguf else {}
    small |= {n: r for n, r in role.items() if r in _KEPT}
    for name, op, _ in parameters(loaded):
        module, shape = name.removesuffix(".weight"), _shape(loaded, name, op)
        if op is not None:
            refused = {f: _refuses(container, f, role[module], shape) for f in formats}
            fits = [f for f, why in refused.items() if why is None]
            if fits and module not in small:
                choices[module] = {f: measure(module, f, shape, dtype) for f in fits}
                continue
            kept[module] = f"{small[module]}: small" if module in small else str(refused[formats[0]])
        rest += measure(name, None, shape, dtype)
    if not choices:
        raise InputError(f"none of {', '.join(f.name for f in formats)} fits any weight of {loaded.source}.")
    counted = [e for e in inventory(loaded.model) if e.name.removesuffix(".weight") not in shared]
    return Footprint(choices, kept, rest, sum(e.parameters for e in counted))


def usual(loaded: Loaded, as_gguf: bool) -> list[Format]:
    """What is chosen from where no formats are named: all of GGUF, or as many of FOLDER as one layout holds."""
    if as_gguf:
        return [parse(n) for n in GGUF]
    role, names = _multiplied(set(models.roles(loaded.model).values())), [parse(n) for n in FOLDER]
    return max(([f for f in names if c.refuses(f, role) is None] for c in DEFAULTS), key=len)


def _multiplied(roles: set[str]) -> str:
    """The role of most weights."""
    return "conv1d" if "conv1d" in roles else "linear"


def _container(formats: Sequence[Format], roles: set[str]) -> Container:
    """The folder layout that holds all the formats."""
    return container_for({f.name: (f, _multiplied(roles)) for f in formats})


def _refuses(container: Container | None, f: Format, role: str, shape: tuple[int, ...]) -> str | None:
    """Why a weight cannot be held, in a folder's layout or in GGUF, in words; None if it can."""
    try:
        if container is None:
            ggml.row_bytes(f, shape[-1])
            return None
        f.groups(shape)
    except InputError as e:
        return str(e).rstrip(".")
    why = container.refuses(f, role)
    return None if why is None else f"{container.METHOD}: {why}"


def _shape(loaded: Loaded, name: str, op: Op | None) -> tuple[int, ...]:
    if op is not None:
        return tuple(op.weight.shape)
    held = dict(loaded.model.named_buffers()).get(name)
    return tuple(loaded.model.get_parameter(name).shape if held is None else held.shape)


def _memory_bytes(name: str, f: Format | None, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return prod(shape) * dtype.itemsize if f is None else stored_bytes(f, shape, dtype)


def _gguf_bytes(name: str, f: Format | None, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """With what fills a tensor up to the next multiple of 32."""
    if f is not None:
        size = prod(shape[:-1]) * ggml.row_bytes(f, shape[-1])
    else:
        size = prod(shape) * (4 if len(shape) == 1 else dtype.itemsize)
    return -(-size // 32) * 32


def _gguf_rest(loaded: Loaded) -> int:
    """All that is no tensor of the model: metadata, the tokenizer, where tensors lie, and tables that readers want."""
    config, arch = loaded.config, gguf.architecture_of(loaded.config)
    said = gguf.metadata(config)
    if loaded.tokenizer is not None:
        generation = getattr(loaded.model, "generation_config", None)
        said |= gguf_tokenizer.metadata(loaded.tokenizer, config.vocab_size, generation)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "head.gguf"
        gguf_file.write(path, said, {}, [])
        size = path.stat().st_size + _SLACK
    extra = dict(gguf.extra_tensors(config))
    names = [*(arch.tensor(name, config) for name, *_ in parameters(loaded)), *extra]
    return size + sum(_INFO + 8 + len(n) for n in names) + sum(-(-t.numel() * 4 // 32) * 32 for t in extra.values())


def _folder_bytes(container: Container) -> Callable[[str, Format | None, tuple[int, ...], torch.dtype], int]:
    """With the entries of its tensors in the file's header."""
    known: dict[tuple[Format, tuple[int, ...]], tuple[int, int]] = {}

    def size(name: str, f: Format | None, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        if f is None:
            return prod(shape) * dtype.itemsize + _ENTRY + len(name)
        if (f, shape) not in known:
            scale = torch.ones(f.groups(shape))
            p = None if isinstance(f.scale, Format) else QParams(scale, scale if f.zero else None)
            parts = container.encode("", quantize(torch.zeros(shape, dtype=dtype), f, p))
            known[f, shape] = sum(t.nbytes for t in parts.values()), len(parts)
        total, tensors = known[f, shape]
        return total + tensors * (_ENTRY + len(name))

    return size
