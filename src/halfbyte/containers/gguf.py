"""GGUF files: metadata by key, tensors by name. Read one tensor at a time and checked before; written as a stream."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from halfbyte.containers import ggml
from halfbyte.errors import InputError
from halfbyte.formats import FORMATS
from halfbyte.qtensor import QTensor

Value = str | int | float | bool | Sequence[Any]
FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
TYPES = (*FLOATS, *ggml.BLOCKS)  # as ggml names them, in lower case: what is read and written here
_MAGIC, _ALIGNMENT = b"GGUF", "general.alignment"
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_STRINGS = 1 << 20  # of all arrays together: a vocabulary of 2^18 with twice as many merges
_MOST_METADATA = 1 << 27  # bytes
_MOST_DIMS = 4  # ggml's own


@dataclass(frozen=True)
class Info:
    """A tensor as it lies in a file: ggml's name of its type, its shape (..., out, in), its first byte, its bytes."""

    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class File:
    """The metadata and the tensors of a GGUF file, which may come from anyone: every length is checked against the
    file before it is used.

    metadata: str, int, float, bool, and lists of them by key (numbers as numpy arrays). Raises InputError that names
    the file for one that is missing, truncated, broken or of an unknown version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as f:
                self.metadata, self.infos = _Reader(f, path).read()
        except OSError as e:
            raise InputError(f"{path} cannot be read: {e.strerror}.") from None

    def __iter__(self):
        return iter(self.infos)

    def text(self, key: str, default: str | None = None) -> str:
        """A string of the metadata. Raises InputError for one that is missing and has no default, or is none."""
        value = self.metadata.get(key, default)
        if not isinstance(value, str):
            raise InputError(f"{self.path}: its metadata lacks the text {key}.")
        return value

    def get(self, name: str, dtype: torch.dtype) -> Tensor | QTensor:
        """The tensor as it is stored: floats, or codes whose source counts as `dtype`. Of types that are not in TYPES
        the values in float32."""
        info = self.infos[name]
        data = self.bytes(name)
        if info.type in FLOATS:
            return data.view(FLOATS[info.type]).reshape(info.shape)
        if info.type in ggml.BLOCKS:
            return ggml.from_blocks(data, FORMATS[info.type], info.shape, dtype)
        from gguf import GGMLQuantizationType, quants

        rows = data.reshape(prod(info.shape[:-1]), -1).numpy()
        with np.errstate(all="ignore"):  # a file may hold infinite scales; numpy would warn of them
            values = quants.dequantize(rows, GGMLQuantizationType[info.type.upper()])
        return torch.from_numpy(values).reshape(info.shape)

    def bytes(self, name: str) -> Tensor:
        """The tensor's bytes, uint8, in memory of their own."""
        info = self.infos[name]
        data = bytearray(info.nbytes)
        with open(self.path, "rb") as f:  # buffered, as it reads on: one read of Linux gives 2 GiB at most
            f.seek(info.offset)
            if f.readinto(data) != len(data):
                raise InputError(f"{self.path}: it ends inside the tensor {name!r}.")
        return torch.frombuffer(data, dtype=torch.uint8)


class _Reader:
    """Reads the head of a file. Every method leaves the file behind what it read."""

    def __init__(self, f: BinaryIO, path: Path) -> None:
        self.f, self.path, self.size = f, path, path.stat().st_size
        self.strings = 0

    def fail(self, what: str) -> InputError:
        return InputError(f"{self.path} is not a GGUF file that can be read: {what}.")

    def read(self) -> tuple[dict[str, Any], dict[str, Info]]:
        if self.size < 24 or self.f.read(4) != _MAGIC:
            raise self.fail("it does not begin with GGUF" if self.size >= 24 else f"it has {self.size} bytes")
        version, tensors, keys = struct.unpack("<IQQ", self.f.read(20))
        if version not in (2, 3):
            swapped = version in (2 << 24, 3 << 24)
            raise self.fail("it is big-endian" if swapped else f"its version is {version}; 2 and 3 are known")
        self.check(keys, 13, "metadata keys")  # the least that a key takes: two lengths, a type, a byte
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self.string("a metadata key", 1 << 16)
            if key in metadata:
                raise self.fail(f"the key {key[:80]!r} stands in it twice")
            metadata[key] = self.value(self.number("I"), key)
        self.check(tensors, 32, "tensors")
        alignment = metadata.get(_ALIGNMENT, 32)
        if type(alignment) is not int or alignment not in [1 << i for i in range(3, 21)]:
            raise self.fail(f"{_ALIGNMENT} is {str(alignment)[:40]}, not a power of 2")
        heads: dict[str, tuple[str, tuple[int, ...], int]] = {}
        for _ in range(tensors):
            name = self.string("a tensor's name", 1 << 10)
            if name in heads:
                raise self.fail(f"the tensor {name[:80]!r} stands in it twice")
            heads[name] = self.tensor(name, alignment)
        start = -(-self.f.tell() // alignment) * alignment
        return metadata, self.placed(heads, start)

    def tensor(self, name: str, alignment: int) -> tuple[str, tuple[int, ...], int]:
        n = self.number("I")
        if not 1 <= n <= _MOST_DIMS:
            raise self.fail(f"the tensor {name[:80]!r} has {n} dimensions")
        shape = tuple(self.number("Q") for _ in range(n))[::-1]
        kind, offset = self.number("I"), self.number("Q")
        if 0 in shape or prod(shape) >= 1 << 60:
            raise self.fail(f"the tensor {name[:80]!r} has the shape {shape}")
        if offset % alignment:
            raise self.fail(f"the tensor {name[:80]!r} is not aligned to {alignment}")
        return _type_name(kind) or self._unknown(name, kind), shape, offset

    def _unknown(self, name: str, kind: int) -> str:
        raise self.fail(
            f"the tensor {name[:80]!r} is of type {kind}, which neither halfbyte nor the gguf package knows"
        )

    def placed(self, heads: Mapping[str, tuple[str, tuple[int, ...], int]], start: int) -> dict[str, Info]:
        """Tensors with their sizes; within the file and apart from each other."""
        infos = {}
        for name, (kind, shape, offset) in heads.items():
            size = _row_bytes(kind, shape[-1])
            if size is None:
                raise self.fail(f"the tensor {name[:80]!r}: rows of {shape[-1]} are no whole blocks of {kind}")
            infos[name] = Info(kind, shape, start + offset, prod(shape[:-1]) * size)
        end = start
        for name, info in sorted(infos.items(), key=lambda item: item[1].offset):
            if info.offset < end:
                raise self.fail(f"the tensor {name[:80]!r} overlaps another")
            end = info.offset + info.nbytes
            if end > self.size:
                raise self.fail(f"it is truncated: the tensor {name[:80]!r} ends at {end}, the file at {self.size}")
        return infos

    def value(self, kind: int, key: str) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.string(key)
        if kind != _ARRAY:
            raise self.fail(f"{key[:80]!r} is of type {kind}")
        of, n = self.number("I"), self.number("Q")
        if of in _NUMBERS:
            width = struct.calcsize(_NUMBERS[of])
            self.check(n, width, key)
            return np.frombuffer(self.f.read(n * width), dtype=np.dtype(_NUMBERS[of]).newbyteorder("<"))
        if of != _STRING:
            raise self.fail(f"{key[:80]!r} is an array of type {of}")
        self.check(n, 8, key)
        self.strings += n
        if self.strings > _MOST_STRINGS:
            raise self.fail(f"its metadata holds more than {_MOST_STRINGS} texts")
        return [self.string(key) for _ in range(n)]

    def number(self, code: str) -> Any:
        width = struct.calcsize(code)
        data = self.f.read(width)
        if len(data) < width:
            raise self.fail("it ends inside its head")
        return struct.unpack(f"<{code}", data)[0]

    def string(self, what: str, most: int = 1 << 24) -> str:
        n = self.number("Q")
        self.check(n, 1, what)
        if n > most:
            raise self.fail(f"{what[:80]!r} has {n} bytes")
        try:
            return self.f.read(n).decode()
        except UnicodeDecodeError:
            raise self.fail(f"{what[:80]!r} is no text in UTF-8") from None

    def check(self, n: int, width: int, what: str) -> None:
        """Whether n things of at least so many bytes can still follow."""
        at = self.f.tell()
        if n * width > self.size - at:
            raise self.fail(f"it is truncated: {n} x {width} bytes of {what[:80]!r} at {at} of {self.size}")
        if at > _MOST_METADATA or n * width > _MOST_METADATA:
            raise self.fail(f"its metadata is larger than {_MOST_METADATA} bytes")


def _type_name(kind: int) -> str | None:
    """ggml's name of a type, in lower case; None if it cannot be read."""
    from gguf import GGMLQuantizationType, quants

    try:
        known = GGMLQuantizationType(kind)
    except ValueError:
        return None
    readable = known.name.lower() in TYPES or known in quants._type_traits
    return known.name.lower() if readable else None


def _row_bytes(kind: str, n: int) -> int | None:
    """Bytes of a row of n numbers; None where blocks do not divide it."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    numbers, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind.upper()]]
    return None if n % numbers else n // numbers * size


def kind_of(t: Tensor | QTensor) -> str:
    """ggml's name of the type that holds a tensor as it is. Raises InputError if none does."""
    if isinstance(t, QTensor):
        ggml.row_bytes(t.format, t.shape[-1])
        return t.format.name
    found = next((k for k, d in FLOATS.items() if d == t.dtype), None)
    if found is None:
        raise InputError(f"GGUF has no type for {t.dtype}.")
    return found


def write(
    path: Path, metadata: Mapping[str, Value], heads: Mapping[str, tuple[str, tuple[int, ...]]],
    tensors: Iterable[tuple[str, Tensor | QTensor]],
) -> None:  # fmt: skip
    """Writes a file. heads: name -> (a type of TYPES, shape (..., out, in)), which the tensors then follow, in order
    and one at a time. "general.architecture" must be in the metadata."""
    import gguf

    writer = gguf.GGUFWriter(None, str(metadata["general.architecture"]))
    if isinstance(alignment := metadata.get(_ALIGNMENT), int):
        writer.data_alignment = alignment
    for key, value in metadata.items():
        if key != "general.architecture":
            writer.add_key_value(key, value, *_value_type(value))
    for name, (kind, shape) in heads.items():
        row = _row_bytes(kind, shape[-1])
        if row is None:
            raise InputError(f"{name}: rows of {shape[-1]} are no whole blocks of {kind}.")
        size = prod(shape[:-1]) * row
        writer.add_tensor_info(
            name, (*shape[:-1], row), np.dtype(np.uint8), size, gguf.GGMLQuantizationType[kind.upper()]
        )
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        expected = iter(heads.items())
        for name, t in tensors:
            assert next(expected) == (name, (kind_of(t), tuple(t.shape))), name
            data = ggml.to_blocks(t) if isinstance(t, QTensor) else t.detach().contiguous().view(torch.uint8)
            writer.write_tensor_data(data.numpy())
        assert next(expected, None) is None
    finally:
        writer.close()


def _value_type(value: Value) -> tuple[Any, Any]:
    """GGUF's type of a value, and of its elements."""
    from gguf import GGUFValueType as T

    match value:
        case bool():
            return T.BOOL, None
        case int():
            return (T.UINT32 if value >= 0 else T.INT32), None
        case float():
            return T.FLOAT32, None
        case str():
            return T.STRING, None
        case _:
            sub = _value_type(value[0])[0]
            return T.ARRAY, T.INT32 if sub is T.UINT32 else sub
