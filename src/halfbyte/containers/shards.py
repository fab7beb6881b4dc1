"""Safetensors files of a Hugging Face folder: read one tensor at a time, written as a stream of shards."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from halfbyte.errors import InputError

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U32": torch.uint32, "BOOL": torch.bool,
}  # fmt: skip
_LARGEST_HEADER = 100_000_000  # safetensors' own bound
MAX_SHARD = 4_000_000_000  # bytes: what hubs and older file systems take
_CHUNK = 1 << 24  # bytes that are copied at a time
INDEX = "model.safetensors.index.json"


class Shards:
    """The tensors of one or more safetensors files, by name; each is read by pread when asked for.

    Every offset is checked against the file before anything is read: the files may come from anyone.
    Raises InputError that names the file for one that is missing, truncated or not safetensors.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = sorted(files)
        self._where: dict[str, tuple[Path, str, tuple[int, ...], int, int]] = {}
        for file in self.files:
            for name, entry in header(file).items():
                if name in self._where:
                    raise InputError(f"{file}: the tensor {name!r} stands in {self._where[name][0].name} too.")
                self._where[name] = (file, *entry)

    @classmethod
    def of_folder(cls, folder: Path) -> Shards:
        """model.safetensors, or the shards that the index names."""
        index = folder / INDEX
        if index.exists():
            names = read_json(index).get("weight_map")
            if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
                raise InputError(f"{index}: it has no weight_map of file names.")
            if bad := [n for n in names.values() if Path(n).name != n]:
                raise InputError(f"{index}: {bad[0]!r} is not a file name of this folder.")
            return cls({folder / n for n in names.values()})
        if (folder / "model.safetensors").exists():
            return cls([folder / "model.safetensors"])
        if pickles := sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]):
            raise InputError(
                f"{pickles[0]} is a pickle file, which can run code when read; convert it to safetensors first."
            )
        raise InputError(f"{folder} holds no model.safetensors and no {INDEX}.")

    def __iter__(self):
        return iter(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def shape(self, name: str) -> tuple[int, ...]:
        return self._where[name][2]

    def dtype(self, name: str) -> torch.dtype:
        return _DTYPES[self._where[name][1]]

    def get(self, name: str, at: int | None = None) -> Tensor:
        """The tensor, or what it holds at one index of its first dimension, in memory of its own. Raises InputError if
        there is none of that name, or it holds no so many."""
        if name not in self._where:
            raise InputError(f"{self.files[0].parent if self.files else '?'}: the tensor {name!r} is missing.")
        file, dtype, shape, begin, end = self._where[name]
        if at is not None:
            if not shape or at >= shape[0]:
                raise InputError(f"{file}: the tensor {name!r} of the shape {shape} holds no {at + 1}.")
            size = (end - begin) // shape[0]
            begin, end, shape = begin + at * size, begin + (at + 1) * size, shape[1:]
        data = torch.empty(end - begin, dtype=torch.uint8)
        with open(file, "rb") as f:  # buffered: a raw read ends after 2 GiB
            f.seek(begin)
            if f.readinto(data.numpy().data) != end - begin:
                raise InputError(f"{file}: it ends inside the tensor {name!r}.")
        return data.view(_DTYPES[dtype]).reshape(shape)

    def sha256(self) -> str:
        """Of the files' contents, in the order of their names."""
        return sha256_of(self.files)


def sha256_of(files: Iterable[Path]) -> str:
    """One hash for the contents of several files, in order: of the hashes of each, which are found side by side."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return hashlib.sha256(b"".join(pool.map(_digest, files))).hexdigest()


def _digest(file: Path) -> bytes:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").digest()


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises InputError that names it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing.") from None
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e.strerror}.") from None
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path} is not valid JSON: {str(e)[:100]}.") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} should hold a JSON object, not a {type(value).__name__}.")
    return value


def header(file: Path) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """name -> dtype's name, shape, first and last byte in the file. Raises InputError."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as f:
            head = f.read(8)
            if len(head) < 8:
                raise InputError(f"{file} is not a safetensors file: it has {size} bytes.")
            (n,) = struct.unpack("<Q", head)
            if n > min(_LARGEST_HEADER, size - 8):
                raise InputError(f"{file} is not a safetensors file or is truncated: its header says {n} bytes.")
            table = json.loads(f.read(n))
    except OSError as e:
        raise InputError(f"{file} cannot be read: {e.strerror}.") from None
    except (ValueError, RecursionError) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(f"{file} is not a safetensors file: its header is not JSON.") from None
    if not isinstance(table, dict):
        raise InputError(f"{file} is not a safetensors file: its header is not an object.")
    table.pop("__metadata__", None)
    out = {name: _entry(file, name, e, 8 + n, size) for name, e in table.items()}
    # a small file must not stand for large weights by naming its bytes over and over
    inner = sorted((begin, end, name) for name, (*_, begin, end) in out.items() if begin < end)
    for (_, end, name), (begin, _, other) in pairwise(inner):
        if begin < end:
            raise InputError(f"{file}: the tensors {name[:80]!r} and {other[:80]!r} share bytes.")
    return out


def _entry(file: Path, name: str, e: object, start: int, size: int) -> tuple[str, tuple[int, ...], int, int]:
    try:
        assert isinstance(e, dict)
        dtype, shape, (begin, end) = e["dtype"], tuple(e["shape"]), e["data_offsets"]
        assert dtype in _DTYPES
        assert all(type(d) is int and d >= 0 for d in (*shape, begin, end))
        assert begin <= end <= size - start
        volume = 1
        for d in shape:  # step by step: the product of many large ones would take long
            volume *= max(d, 1)
            assert volume < 1 << 63  # also where one of them is 0
        assert prod(shape) * _DTYPES[dtype].itemsize == end - begin
    except (AssertionError, KeyError, TypeError, ValueError):
        raise InputError(f"{file}: the entry of tensor {name[:80]!r} is broken or the file is truncated.") from None
    return dtype, shape, start + begin, start + end


def write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard: int = MAX_SHARD) -> int:
    """Writes tensors as they come, none of which is kept; one file, or several with an index.

    Returns the bytes of all tensors.
    """
    shards = [_Shard(folder / "part-0")]
    for name, tensor in tensors:
        if shards[-1].tensors and shards[-1].nbytes + tensor.nbytes > max_shard:
            shards[-1].finish()
            shards.append(_Shard(folder / f"part-{len(shards)}"))
        shards[-1].add(name, tensor)
    shards[-1].finish()
    total = sum(s.nbytes for s in shards)
    if len(shards) == 1:
        shards[0].path.rename(folder / "model.safetensors")
        return total
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        shard.path.rename(folder / file)
        weight_map |= dict.fromkeys(shard.tensors, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1))
    return total


class _Shard:
    """A file as it is written. Its header, which comes first, has the place of every tensor, and readers that map it
    need the wider numbers before the narrower: so until it is finished there is a file of numbers for each width."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, tuple[torch.dtype, tuple[int, ...], int]] = {}
        self.nbytes = 0
        self._widths: set[int] = set()

    def _numbers(self, width: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{width}")

    def add(self, name: str, tensor: Tensor) -> None:
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        width = tensor.dtype.itemsize
        with open(self._numbers(width), "ab" if width in self._widths else "wb") as f:  # none of an earlier try's
            f.write(data.numpy().data)
        self._widths.add(width)
        self.tensors[name] = tensor.dtype, tuple(tensor.shape), tensor.nbytes
        self.nbytes += tensor.nbytes

    def finish(self) -> None:
        names = {dtype: name for name, dtype in _DTYPES.items()}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (dtype, shape, size) in sorted(self.tensors.items(), key=lambda item: -item[1][0].itemsize):
            header[name] = {"dtype": names[dtype], "shape": shape, "data_offsets": [end, end := end + size]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(self.path, "wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            for width in sorted(self._widths, reverse=True):
                with open(self._numbers(width), "rb") as part:
                    shutil.copyfileobj(part, f, _CHUNK)
                self._numbers(width).unlink()
