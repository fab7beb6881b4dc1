"""The blocks of ggml, as GGUF files hold them: bytes <-> the parts of a QTensor. Codes stay as they are.

    q4_0  fp16 d, 16 bytes of nibbles                                       d * (code - 8)
    q4_1  fp16 d, fp16 m, 16 bytes of nibbles                               d * code + m
    q8_0  fp16 d, 32 int8                                                   d * code
    q4_k  fp16 d, fp16 dmin, 12 bytes of 6-bit scales and minima, 128 bytes of nibbles
                                                                            d * scale * code - dmin * minimum

q4_k's minima are taken off and our zeros are added: what we hold is -dmin.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from halfbyte.errors import InputError
from halfbyte.formats import FORMATS, Format
from halfbyte.qtensor import QTensor, check_parts, pack, unpack

_SUPER = 256  # numbers in a super-block of q4_k
_SIZES = {
    "q4_0": (32, 18),
    "q4_1": (32, 20),
    "q8_0": (32, 34),
    "q4_k": (_SUPER, 144),
}  # numbers, bytes of a block


def row_bytes(f: Format, n: int) -> int:
    """Bytes of a row of n numbers. Raises InputError for a format that ggml lacks, or a part of a block."""
    if f.name not in _SIZES or f != FORMATS[f.name]:
        raise InputError(f"ggml has no block for {f.name}; halfbyte knows {', '.join(_SIZES)}.")
    numbers, size = _SIZES[f.name]
    if n % numbers:
        raise InputError(f"{f.name}: ggml's blocks of {numbers} do not divide rows of {n}.")
    return n // numbers * size


def to_blocks(q: QTensor) -> Tensor:
    """q of shape (..., in) -> uint8 (rows, bytes of a row). Raises InputError as `row_bytes` does."""
    size = row_bytes(q.format, q.shape[-1])
    rows, parts = prod(q.shape[:-1]), q.tensors()
    match q.format.name:
        case "q4_0" | "q4_1":
            halves = [_bytes(parts[k]) for k in ("scale", "zero") if k in parts]
            blocks = torch.cat([*halves, _nibbles(q.codes.reshape(-1, 32))], 1)
        case "q8_0":
            # two's complement is the offset code with its highest bit turned
            blocks = torch.cat([_bytes(parts["scale"]), q.codes.reshape(-1, 32) ^ 128], 1)
        case _:
            scales = unpack(parts["scale.codes"].reshape(-1, 6), 6, 8)
            minima = unpack(parts["zero.codes"].reshape(-1, 6), 6, 8)
            d, dmin = _bytes(parts["scale.scale"]), _bytes(-parts["zero.scale"])
            codes = _nibbles(q.codes.reshape(-1, 64)).reshape(-1, 128)
            blocks = torch.cat([d, dmin, _six_bits(scales, minima), codes], 1)
    return blocks.reshape(rows, size)


def from_blocks(data: Tensor, f: Format, shape: tuple[int, ...], dtype: torch.dtype) -> QTensor:
    """The inverse: uint8 of any shape, rows in order -> a QTensor of `shape` whose source has `dtype`.

    Raises InputError if the bytes are not as many as the shape needs, or ggml has no such blocks.
    """
    size = prod(shape[:-1]) * row_bytes(f, shape[-1] if shape else 1)
    if data.dtype != torch.uint8 or data.numel() != size:
        raise InputError(f"{f.name} of shape {shape} needs {size} bytes, not {data.numel()} of {data.dtype}.")
    blocks = data.reshape(-1, _SIZES[f.name][1])
    groups = f.groups(shape)
    parts: dict[str, Tensor | QTensor]
    match f.name:
        case "q4_0":
            parts = {"codes": _codes(blocks[:, 2:]), "scale": _halves(blocks[:, :2], groups)}
        case "q4_1":
            parts = {"codes": _codes(blocks[:, 4:]), "scale": _halves(blocks[:, :2], groups)}
            parts["zero"] = _halves(blocks[:, 2:4], groups)
        case "q8_0":
            parts = {"codes": blocks[:, 2:] ^ 128, "scale": _halves(blocks[:, :2], groups)}
        case _:
            scales, minima = _from_six_bits(blocks[:, 4:16])
            parts = {"codes": _codes(blocks[:, 16:].reshape(-1, 32))}
            parts["scale"] = _nested(f.scale, groups, scales, blocks[:, :2])
            parts["zero"] = _nested(f.zero, groups, minima, blocks[:, 2:4], sign=-1)
    codes = parts["codes"]
    assert isinstance(codes, Tensor)
    parts["codes"] = pack(codes.reshape(shape), f.bits)
    return check_parts(QTensor(f, shape, dtype, parts))


def _bytes(halves: Tensor) -> Tensor:
    """fp16 (..., n) -> uint8 (all of them, 2)."""
    return halves.contiguous().reshape(-1, 1).view(torch.uint8)


def _halves(data: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `_bytes`."""
    return data.contiguous().view(torch.float16).reshape(shape)


def _nibbles(codes: Tensor) -> Tensor:
    """uint8 (n, 2m) -> (n, m): the first half in the low nibbles, the second in the high ones."""
    low, high = codes.chunk(2, 1)
    return low | (high << 4)


def _codes(nibbles: Tensor) -> Tensor:
    """The inverse of `_nibbles`."""
    return torch.cat([nibbles & 15, nibbles >> 4], 1)


def _six_bits(scales: Tensor, minima: Tensor) -> Tensor:
    """6-bit scales and minima, uint8 (n, 8) each -> (n, 12).

    The first four of each are whole, in the low bits of bytes 0-3 and 4-7; of the last four, the low nibbles
    are in bytes 8-11 and the high two bits on top of bytes 0-7.
    """
    whole = torch.cat([scales[:, :4], minima[:, :4]], 1)
    top = torch.cat([scales[:, 4:], minima[:, 4:]], 1) >> 4
    return torch.cat([whole | (top << 6), (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4)], 1)


def _from_six_bits(data: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `_six_bits`."""
    whole, top, low = data[:, :8] & 63, (data[:, :8] >> 6) << 4, data[:, 8:]
    scales = torch.cat([whole[:, :4], (low & 15) | top[:, :4]], 1)
    minima = torch.cat([whole[:, 4:], (low >> 4) | top[:, 4:]], 1)
    return scales, minima


def _nested(f: object, shape: tuple[int, ...], codes: Tensor, d: Tensor, sign: int = 1) -> QTensor:
    """A super-block's scales or minima, uint8 (n, 8), with their fp16 factor as bytes (n, 2)."""
    assert isinstance(f, Format)
    packed = pack(codes, 6).reshape(*shape[:-1], -1) if codes.numel() else pack(codes.reshape(shape), 6)
    return QTensor(f, shape, torch.float32, {"codes": packed, "scale": sign * _halves(d, f.groups(shape))})
