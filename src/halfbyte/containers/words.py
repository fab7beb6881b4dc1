"""Codes in 32-bit words, the first lowest: what compressed-tensors, GPTQ and AWQ have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.errors import InputError
from halfbyte.qtensor import QTensor, pack, unpack

_WHOLE = (2, 4, 8)  # bits of which none of a word is left over: its bytes, the first lowest, are those of `pack`


def to_words(codes: Tensor, bits: int) -> Tensor:
    """uint8 (..., n) -> int32 (..., ceil(n / per)): `per` = 32 // bits codes a word."""
    if bits in _WHOLE:
        return _bytes_as_words(pack(codes, bits))
    per = 32 // bits
    runs = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per)).unflatten(-1, (-1, per)).long()
    word = (runs << (bits * torch.arange(per))).sum(-1)
    return torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32)


def words_of(q: QTensor) -> Tensor:
    """The same of all codes of a tensor."""
    packed = q.canonical().parts["codes"]
    assert isinstance(packed, Tensor)
    return _bytes_as_words(packed) if q.format.bits in _WHOLE else to_words(q.codes, q.format.bits)


def _bytes_as_words(packed: Tensor) -> Tensor:
    """Of `pack`, in rows that are filled up to whole words."""
    left = -packed.shape[-1] % 4
    rows = (torch.nn.functional.pad(packed, (0, left)) if left else packed).contiguous()  # no copy of what is whole
    return rows.reshape(-1).view(torch.int32).reshape(*packed.shape[:-1], rows.shape[-1] // 4)


def from_words(words: Tensor, bits: int, n: int) -> Tensor:
    """The inverse: uint8 (..., n)."""
    if bits in _WHOLE:
        packed = words.contiguous().reshape(-1).view(torch.uint8).reshape(*words.shape[:-1], 4 * words.shape[-1])
        return unpack(packed, bits, 8 * packed.shape[-1] // bits)[..., :n]
    per = 32 // bits
    runs = (words.long()[..., None] >> (bits * torch.arange(per))) & ((1 << bits) - 1)
    return runs.flatten(-2)[..., :n].to(torch.uint8)


def typed(name: str, t: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> Tensor:
    """The tensor. Raises InputError that names it if it is of another dtype or shape."""
    if t.dtype not in dtypes or tuple(t.shape) != shape:
        kinds = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise InputError(f"{name} should be {kinds} of the shape {shape}, not {t.dtype} {tuple(t.shape)}.")
    return t
