"""The tensors of a model on disk, brought in one at a time."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from halfbyte.containers import CONTAINERS, Container, compressed_tensors
from halfbyte.containers.shards import Shards
from halfbyte.errors import InputError
from halfbyte.experts import Fused
from halfbyte.formats import Format
from halfbyte.layers import Codes, Conv, Linear, Op, ops
from halfbyte.qtensor import QParams, QTensor
from halfbyte.scheme import static

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Source(Protocol):
    """Where weights lie, by the names of the model's parameters."""

    def __contains__(self, name: str) -> bool: ...

    def get(self, name: str, shape: tuple[int, ...], turned: bool = False) -> Tensor | QTensor:
        """Floats or codes of a parameter, (..., out, in). turned: the model's own checkpoints hold (in, out). Raises
        InputError for one that cannot be read, or codes that do not fit the shape."""
        ...

    def input(self, name: str) -> tuple[Format | None, QParams | None]:
        """The format that the inputs of a weight are rounded to, and by which scale where it is a static one. Raises
        InputError for one that cannot be read."""
        ...


@dataclass(frozen=True)
class Slice:
    """A matrix of one expert, or its bias, in the fused tensor `name`: the i-th of n that this holds of each."""

    name: str
    expert: int
    i: int
    n: int
    fused: Fused

    def of(self, shards: Shards, shape: tuple[int, ...]) -> Tensor:
        """Raises InputError for a tensor that does not hold matrices of that shape."""
        t = shards.get(self.name, self.expert)
        needed = (shape[0] * self.n, *shape[1:])
        needed = needed[::-1] if self.fused.turned else needed
        if tuple(t.shape) != needed:
            raise InputError(
                f"{self.name} has the shape {tuple(t.shape)} an expert on disk; the config makes it {needed}."
            )
        return self.fused.split(t, self.n)[self.i]


class Folder:
    """The safetensors of a Hugging Face folder: floats, or codes in a layout of CONTAINERS."""

    def __init__(self, shards: Shards, names: Mapping[str, str | Slice], quantization: Any = None) -> None:
        self.shards, self.names = shards, names
        self.container: Container | None = None
        self.formats: dict[str, tuple[Format, Format | None]] = {}
        self.config: dict[str, Any] = {}
        if quantization is not None:
            self.config = config = {**_explained(quantization), "dtype": _dtype(shards)}
            method = config.get("quant_method", "?")
            if not isinstance(method, str) or method not in CONTAINERS:
                raise InputError(
                    f"weights quantized by {reprlib.repr(method)} cannot be read; {', '.join(CONTAINERS)} can."
                )
            self.container = CONTAINERS[method]
            self.formats = self.container.formats(config, set(shards), shards.get)
            if not self.formats:
                raise InputError(
                    f"config.json says that the weights are quantized by {method}; none of its tensors is."
                )

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def get(self, name: str, shape: tuple[int, ...], turned: bool = False) -> Tensor | QTensor:
        stored = self._stored(name)
        if stored in self.formats:  # in which every container keeps the op's own orientation
            assert self.container is not None
            if len(shape) != 2:
                raise InputError(f"{name} is codes on disk, which only matrices can be; the config makes it {shape}.")
            return self.container.decode(stored, self.formats[stored][0], shape, self.shards.get, self.config)
        if isinstance(where := self.names[name], Slice):
            return where.of(self.shards, shape)
        t = self.shards.get(where)
        return t.T.contiguous() if turned and t.ndim == 2 else t

    def input(self, name: str) -> tuple[Format | None, QParams | None]:
        stored = self._stored(name)
        f = self.formats.get(stored, (None, None))[1]
        # of all containers compressed_tensors alone names formats of inputs
        return f, compressed_tensors.decode_input(stored, f, self.shards.get) if f and static(f) else None

    def _stored(self, name: str) -> str:
        where = self.names[name]
        return where.removesuffix(".weight") if name.endswith(".weight") and isinstance(where, str) else ""


def check_dtype(dtype: Any) -> None:
    """Raises InputError for a dtype that is none of floats, which a config may name."""
    if not isinstance(dtype, torch.dtype) or dtype not in _FLOATS:
        raise InputError(f"a model's weights are float32, bfloat16 or float16, not {reprlib.repr(dtype)}.")


def _dtype(shards: Shards) -> torch.dtype:
    """Of the floats beside the codes: for layouts that do not say what their codes were made from."""
    floats = [n for n in shards if shards.dtype(n) in _FLOATS]
    return shards.dtype(max(floats, key=lambda n: prod(shards.shape(n)))) if floats else torch.float32


def _explained(quantization: Any) -> dict[str, Any]:
    """A quantization_config, which transformers has made an object of or not."""
    said = quantization.to_dict() if hasattr(quantization, "to_dict") else quantization
    if not isinstance(said, dict):
        raise InputError(f"config.json: quantization_config should be an object, not {reprlib.repr(said)}.")
    return said


class Checkpoint:
    """The tensors of a model on disk, read one at a time; weights come and go by `materialize` and `release`."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def weight(self, name: str, op: Op) -> Tensor | QTensor:
        """What is stored for the weight of the op of that name."""
        if isinstance(op, Conv):
            return self.floats(f"{name}.weight", (op.weight.shape[0], *op.kernel)).flatten(1)
        return self._checked(f"{name}.weight", tuple(op.weight.shape), op.transposed)

    def floats(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """What is stored for a parameter that no op stands for: floats, whatever the file has."""
        value = self._checked(name, shape)
        return value.dequantize() if isinstance(value, QTensor) else value

    def _checked(self, name: str, shape: tuple[int, ...], turned: bool = False) -> Tensor | QTensor:
        t = self.source.get(name, shape, turned)
        if isinstance(t, Tensor) and t.dtype not in _FLOATS:
            raise InputError(f"{name} holds {t.dtype}, which no quantization_config explains.")
        if tuple(t.shape) != tuple(shape):
            there, here = (tuple(s)[::-1] if turned else tuple(s) for s in (t.shape, shape))
            raise InputError(f"{name} has the shape {there} on disk; the config makes it {here}.")
        return t

    def materialize(self, model: nn.Module, dtype: torch.dtype | None, prefix: str = "") -> None:
        """Reads every parameter under `prefix` that is on the meta device. dtype None reads the codes' formats
        but keeps the tensors on the meta device."""
        for name, op in ops(model):
            if not _under(name, prefix) or f"{name}.weight" not in self.source:
                continue
            if op.weight.device.type == "meta" and not isinstance(op.weight.stored, Codes):
                self._place(name, op, dtype)
            elif op.weight.device.type == "meta":  # codes that were let go
                op.weight.store(self.weight(name, op))
        if dtype is None:
            return
        for name, p in list(model.named_parameters()):
            if p.device.type != "meta" or not _under(name, prefix):
                continue
            owner, _, attribute = name.rpartition(".")
            if name in self.source:
                value = self.floats(name, tuple(p.shape)).to(dtype)
            else:  # a new classification head
                value = torch.zeros(p.shape, dtype=dtype)
                if p.ndim > 1:
                    nn.init.normal_(value, std=getattr(model.config, "initializer_range", 0.02))  # pyright: ignore
            if attribute == "stored":
                model.get_submodule(owner).store(value)  # pyright: ignore[reportCallIssue]
            else:
                setattr(model.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=False))

    def _place(self, name: str, op: Op, dtype: torch.dtype | None) -> None:
        value = self.weight(name, op)
        if isinstance(value, QTensor):
            op.weight.store(value)
            if isinstance(op, Linear):
                op.input, p = self.source.input(f"{name}.weight")
                if op.input is not None and p is not None:
                    op.round_inputs(op.input, p)
        elif dtype is not None:
            op.weight.store(value.to(dtype))

    def release(self, model: nn.Module, prefix: str) -> None:
        """Puts all weights under `prefix`, codes too, back on the meta device."""
        for name, m in model.named_modules():
            if _under(name, prefix):
                for key, p in m.named_parameters(recurse=False):
                    m.register_parameter(key, nn.Parameter(p.to("meta"), requires_grad=False))
        for name, op in ops(model):
            if _under(name, prefix) and isinstance(stored := op.weight.stored, Codes):
                op.weight.store(stored.q.to("meta"))


def _under(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(f"{prefix}.")
