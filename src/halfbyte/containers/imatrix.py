"""Importance matrices as llama.cpp writes them: the mean square of each input of a weight, on calibration text.

Both layouts are read: a GGUF file with two tensors a weight, and the older one, a list of entries.
"""

from __future__ import annotations

import struct
from pathlib import Path

import torch
from torch import Tensor

from halfbyte.containers.gguf import File
from halfbyte.errors import InputError

_SUMS, _COUNTS = ".in_sum2", ".counts"
_MOST_ENTRIES, _MOST_NAME, _MOST_INPUTS = 1 << 20, 1 << 10, 1 << 24


def read(path: str | Path) -> dict[str, Tensor]:
    """Of each weight, by its name in GGUF ("blk.0.attn_q.weight"), the mean squares of its inputs, float32 (in,).

    Those of experts, one row an expert, are left out. Raises InputError that names the file for one that cannot be
    read, and for numbers that are no mean squares.
    """
    path = Path(path)
    try:
        with open(path, "rb") as f:
            found = _from_gguf(path) if f.read(4) == b"GGUF" else _from_entries(path)
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e.strerror}.") from None
    if not found:
        raise InputError(f"{path} is no importance matrix: no weight is named in it.")
    for name, squares in found.items():
        if not (squares.isfinite().all() and (squares >= 0).all()):
            raise InputError(f"{path}: what it says of {name[:80]} are no mean squares.")
    return found


def _from_gguf(path: Path) -> dict[str, Tensor]:
    file, found = File(path), {}
    for tensor in file:
        name = tensor.removesuffix(_SUMS)
        if name == tensor:
            continue
        counts, shape = name + _COUNTS, file.infos[tensor].shape
        if counts not in file.infos:
            raise InputError(f"{path}: {tensor[:80]} has no counts beside it.")
        if len(shape) > 1 and shape[0] > 1:
            continue
        sums, count = file.get(tensor, torch.float32), file.get(counts, torch.float32)
        if not isinstance(sums, Tensor) or not isinstance(count, Tensor) or count.numel() != 1:
            raise InputError(f"{path}: {tensor[:80]} is not stored as floats, or its count is no number.")
        if count.item() > 0:
            found[name] = sums.float().reshape(-1) / count.float().item()
    return found


def _from_entries(path: Path) -> dict[str, Tensor]:
    data, at, found = path.read_bytes(), 0, {}

    def take(n: int) -> bytes:
        nonlocal at
        if n < 0 or at + n > len(data):
            raise InputError(f"{path} is no importance matrix: it ends inside an entry, or is something else.")
        at += n
        return data[at - n : at]

    def number(most: int) -> int:
        (n,) = struct.unpack("<i", take(4))
        if not 0 <= n <= most:
            raise InputError(f"{path} is no importance matrix: it has a length of {n}.")
        return n

    for _ in range(number(_MOST_ENTRIES)):
        name = take(number(_MOST_NAME)).decode(errors="replace")
        calls, n = number((1 << 31) - 1), number(_MOST_INPUTS)
        values = torch.frombuffer(bytearray(take(4 * n)), dtype=torch.float32) if n else torch.empty(0)
        if calls > 0 and n:
            found[name] = values / calls
    return found
