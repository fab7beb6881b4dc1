"""The blocks of ggml, as GGUF files hold them: bytes <-> the parts of a QTensor. Codes stay as they are.

    q4_0  fp16 d, 16 bytes of nibbles                                       d * (code - 8)
    q4_1  fp16 d, fp16 m, 16 bytes of nibbles                               d * code + m
    q5_0  as q4_0, with 4 bytes of fifth bits before the nibbles            d * (code - 16)
    q5_1  as q4_1, with 4 bytes of fifth bits before the nibbles            d * code + m
    q8_0  fp16 d, 32 int8                                                   d * code
    iq4_nl  as q4_0, codes stand for a table's values                       d * table[code]
    mxfp4 an exponent, 16 bytes of nibbles                                  2^(e - 127) * E2M1[code]
    q2_k  16 bytes of 4-bit scales and minima, 64 bytes of pairs, fp16 d, fp16 dmin
    q3_k  32 bytes of third bits, 64 bytes of pairs, 12 bytes of 6-bit scales, fp16 d
                                                                            d * (scale - 32) * (code - 4)
    q4_k  fp16 d, fp16 dmin, 12 bytes of 6-bit scales and minima, 128 bytes of nibbles
    q5_k  as q4_k, with 32 bytes of fifth bits before the nibbles
    q6_k  128 bytes of nibbles, 64 bytes of pairs above them, 16 int8 scales, fp16 d
                                                                            d * scale * (code - 32)

q2_k, q4_k and q5_k stand for d * scale * code - dmin * minimum; our zeros are added, so what we hold is -dmin.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from halfbyte.errors import InputError
from halfbyte.formats import FORMATS, SOURCE, Format, Integers
from halfbyte.qtensor import QTensor, check_parts, pack, unpack


@dataclass(frozen=True)
class Block:
    """One kind of block. fields: what its bytes are, in order, each with how many.

    d, dmin: fp16 factors; e: an exponent of 2; whole: a code a byte; pairs: 2 bits of each code, of a K-quant's 4 to
    a byte; nibbles: 4 bits; fifth, third: the highest bit; scales: as the type packs them.
    """

    numbers: int
    fields: tuple[tuple[str, int], ...]
    run: int = 32  # the low nibbles are `run` codes, the high ones the next `run`

    @property
    def size(self) -> int:
        return sum(n for _, n in self.fields)

    def split(self, blocks: Tensor) -> dict[str, Tensor]:
        """uint8 (n, size) -> each field (n, its bytes)."""
        names = [name for name, _ in self.fields]
        return dict(zip(names, blocks.split([n for _, n in self.fields], 1), strict=True))


_D, _DMIN, _NIBBLES = ("d", 2), ("dmin", 2), ("nibbles", 128)
BLOCKS = {
    "q4_0": Block(32, (_D, ("nibbles", 16)), 16),
    "q4_1": Block(32, (_D, ("m", 2), ("nibbles", 16)), 16),
    "q5_0": Block(32, (_D, ("fifth", 4), ("nibbles", 16)), 16),
    "q5_1": Block(32, (_D, ("m", 2), ("fifth", 4), ("nibbles", 16)), 16),
    "q8_0": Block(32, (_D, ("whole", 32))),
    "iq4_nl": Block(32, (_D, ("nibbles", 16)), 16),
    "mxfp4": Block(32, (("e", 1), ("nibbles", 16)), 16),
    "q2_k": Block(256, (("scales", 16), ("pairs", 64), _D, _DMIN)),
    "q3_k": Block(256, (("third", 32), ("pairs", 64), ("scales", 12), _D)),
    "q4_k": Block(256, (_D, _DMIN, ("scales", 12), _NIBBLES)),
    "q5_k": Block(256, (_D, _DMIN, ("scales", 12), ("fifth", 32), _NIBBLES)),
    "q6_k": Block(256, (_NIBBLES, ("pairs", 64), ("scales", 16), _D), 64),
}


def row_bytes(f: Format, n: int) -> int:
    """Bytes of a row of n numbers. Raises InputError for a format that ggml lacks, or a part of a block."""
    if f.name not in BLOCKS or f != FORMATS[f.name]:
        raise InputError(f"ggml has no block for {f.name}; halfbyte knows {', '.join(BLOCKS)}.")
    block = BLOCKS[f.name]
    if n % block.numbers:
        raise InputError(f"{f.name}: ggml's blocks of {block.numbers} do not divide rows of {n}.")
    return n // block.numbers * block.size


# integers, symmetric or with a float that is added: ggml's name in groups of 32
_SAME = {"int4": "q4_0", "int5": "q5_0", "int8": "q8_0", "uint4": "q4_1", "uint5": "q5_1"}


def fitting(q: QTensor) -> QTensor | None:
    """The same values in one of ggml's blocks, codes and scales unchanged; None if none has them. Integers in longer
    groups fit where fp16 holds their scales, and what is added, exactly: each is then stored once for every 32."""
    if "order" in q.parts:
        return None
    if q.format.name in BLOCKS and q.format == FORMATS[q.format.name]:
        return q if q.shape[-1] % BLOCKS[q.format.name].numbers == 0 else None
    f, scale = q.format, q.parts["scale"]
    name = _SAME.get(f.name.split("-")[0]) if isinstance(f.grid, Integers) and f.zero in (None, SOURCE) else None
    if name is None or f.flat or f.group == "tensor" or not isinstance(scale, Tensor) or not q.shape[-1]:
        return None
    if (FORMATS[name].zero is None) != (f.zero is None):
        return None
    group, floats = q.shape[-1] // scale.shape[-1], {k: t for k, t in q.tensors().items() if k != "codes"}
    if group % 32 or not all(torch.equal(t.half().float(), t.float()) for t in floats.values()):
        return None
    parts = {k: t.half().repeat_interleave(group // 32, -1) for k, t in floats.items()}
    return QTensor(FORMATS[name], q.shape, q.dtype, {"codes": q.canonical().parts["codes"], **parts})


def to_blocks(q: QTensor) -> Tensor:
    """q of shape (..., in) -> uint8 (rows, bytes of a row). Raises InputError as `row_bytes` does."""
    size, f = row_bytes(q.format, q.shape[-1]), q.format
    rows, parts, block = prod(q.shape[:-1]), q.tensors(), BLOCKS[f.name]
    fields = _fields_of_codes(q.codes.reshape(-1, block.numbers), f, block)
    if isinstance(f.scale, Format):
        fields |= {"d": _bytes(parts["scale.scale"]), "scales": _pack_scales(q)}
        if f.zero is not None:
            fields["dmin"] = _bytes(-parts["zero.scale"])
    elif f.scale == "float16":
        fields |= {field: _bytes(parts[k]) for k, field in (("scale", "d"), ("zero", "m")) if k in parts}
    else:
        fields["e"] = parts["scale"].reshape(-1, 1).view(torch.uint8)
    return torch.cat([fields[name] for name, _ in block.fields], 1).reshape(rows, size)


def from_blocks(data: Tensor, f: Format, shape: tuple[int, ...], dtype: torch.dtype) -> QTensor:
    """The inverse: uint8 of any shape, rows in order -> a QTensor of `shape` whose source has `dtype`.

    Raises InputError if the bytes are not as many as the shape needs, or ggml has no such blocks.
    """
    size = prod(shape[:-1]) * row_bytes(f, shape[-1] if shape else 1)
    if data.dtype != torch.uint8 or data.numel() != size:
        raise InputError(f"{f.name} of shape {shape} needs {size} bytes, not {data.numel()} of {data.dtype}.")
    block = BLOCKS[f.name]
    fields, groups = block.split(data.reshape(-1, block.size)), f.groups(shape)
    parts: dict[str, Tensor | QTensor] = {"codes": pack(_codes_of_fields(fields, f, block).reshape(shape), f.bits)}
    if isinstance(f.scale, Format):
        scales, minima = _unpack_scales(fields["scales"], f)
        parts["scale"] = _nested(f.scale, groups, scales, fields["d"])
        if minima is not None:
            parts["zero"] = _nested(f.zero, groups, minima, fields["dmin"], sign=-1)
    elif f.scale == "float16":
        parts |= {k: _halves(fields[field], groups) for k, field in (("scale", "d"), ("zero", "m")) if field in fields}
    else:
        parts["scale"] = fields["e"].contiguous().view(torch.float8_e8m0fnu).reshape(groups)
    return check_parts(QTensor(f, shape, dtype, parts))


def _bytes(halves: Tensor) -> Tensor:
    """fp16 (..., n) -> uint8 (all of them, 2)."""
    return halves.contiguous().reshape(-1, 1).view(torch.uint8)


def _halves(data: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `_bytes`."""
    return data.contiguous().view(torch.float16).reshape(shape)


# Codes: a block's bits lie apart, low ones and high ones in fields of their own.


def _fields_of_codes(codes: Tensor, f: Format, block: Block) -> dict[str, Tensor]:
    """uint8 (n, numbers) -> the fields that hold codes."""
    names = dict(block.fields)
    if "whole" in names:
        return {"whole": codes ^ 128}  # two's complement is the offset code with its highest bit turned
    out = {}
    if "nibbles" in names:
        low, high = (codes & 15).unflatten(1, (-1, 2, block.run)).unbind(2)
        out["nibbles"] = (low | (high << 4)).flatten(1)
    if "pairs" in names:
        out["pairs"] = _pack_runs((codes >> 4) if "nibbles" in names else (codes & 3), 2)
    if "fifth" in names:
        fifth = codes >> 4
        out["fifth"] = pack(fifth, 1) if block.numbers == 32 else _pack_runs(fifth, 1)
    if "third" in names:
        out["third"] = _pack_runs(codes >> 2, 1)
    return out


def _codes_of_fields(fields: dict[str, Tensor], f: Format, block: Block) -> Tensor:
    """The inverse: uint8 (n, numbers)."""
    if "whole" in fields:
        return fields["whole"] ^ 128
    codes = torch.zeros((), dtype=torch.uint8)
    if "nibbles" in fields:
        runs = fields["nibbles"].unflatten(1, (-1, block.run))
        codes = torch.stack((runs & 15, runs >> 4), 2).flatten(1)
    if "pairs" in fields:
        pairs = _unpack_runs(fields["pairs"], 2)
        codes = codes | (pairs << 4) if "nibbles" in fields else pairs
    if "fifth" in fields:
        fifth = fields["fifth"]
        codes = codes | ((unpack(fifth, 1, 32) if block.numbers == 32 else _unpack_runs(fifth, 1)) << 4)
    if "third" in fields:
        codes = codes | (_unpack_runs(fields["third"], 1) << 2)
    return codes


def _pack_runs(codes: Tensor, bits: int) -> Tensor:
    """Small codes of a super-block, uint8 (n, 256) -> (n, 32 * bits): a byte holds one code each of 8/bits runs of 32,
    the first in its lowest bits."""
    runs = codes.unflatten(1, (bits, 8 // bits, 32)) << (bits * torch.arange(8 // bits, dtype=torch.uint8))[:, None]
    return runs.sum(2, dtype=torch.uint8).flatten(1)


def _unpack_runs(data: Tensor, bits: int) -> Tensor:
    """The inverse of `_pack_runs`."""
    shifts = (bits * torch.arange(8 // bits, dtype=torch.uint8))[:, None]
    return ((data.unflatten(1, (bits, 1, 32)) >> shifts) & ((1 << bits) - 1)).flatten(1)


# Scales and minima of super-blocks.


def _pack_scales(q: QTensor) -> Tensor:
    """The scales, and minima, of a K-quant -> uint8 (blocks, bytes of "scales")."""
    f, tensors = q.format, q.tensors()
    assert isinstance(f.scale, Format)
    n, bits = int(f.scale.group), f.scale.bits
    found = [
        unpack(tensors[k].reshape(-1, n * bits // 8), bits, n) for k in ("scale.codes", "zero.codes") if k in tensors
    ]
    match f.name:
        case "q6_k":
            return found[0] ^ 128
        case "q3_k":
            return _pack_sixteen(found[0])
        case "q2_k":
            return found[0] | (found[1] << 4)
        case _:
            return _pack_eights(*found)


def _unpack_scales(data: Tensor, f: Format) -> tuple[Tensor, Tensor | None]:
    """The inverse: codes (blocks, scales of a block) of scales and minima."""
    match f.name:
        case "q6_k":
            return data ^ 128, None
        case "q3_k":
            return _unpack_sixteen(data), None
        case "q2_k":
            return data & 15, data >> 4
        case _:
            return _unpack_eights(data)


def _pack_eights(scales: Tensor, minima: Tensor) -> Tensor:
    """6-bit scales and minima, uint8 (n, 8) each -> (n, 12).

    The first four of each are whole, in the low bits of bytes 0-3 and 4-7; of the last four, the low nibbles
    are in bytes 8-11 and the high two bits on top of bytes 0-7.
    """
    whole = torch.cat([scales[:, :4], minima[:, :4]], 1)
    top = torch.cat([scales[:, 4:], minima[:, 4:]], 1) >> 4
    return torch.cat([whole | (top << 6), (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4)], 1)


def _unpack_eights(data: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `_pack_eights`."""
    whole, top, low = data[:, :8] & 63, (data[:, :8] >> 6) << 4, data[:, 8:]
    scales = torch.cat([whole[:, :4], (low & 15) | top[:, :4]], 1)
    minima = torch.cat([whole[:, 4:], (low >> 4) | top[:, 4:]], 1)
    return scales, minima


def _pack_sixteen(scales: Tensor) -> Tensor:
    """6-bit scales, uint8 (n, 16) -> (n, 12): the low nibbles of 0-7 and 8-15 side by side in bytes 0-7, the high two
    bits of scale i in byte 8 + i % 4."""
    low, high = scales & 15, (scales >> 4).unflatten(1, (4, 4)) << (2 * torch.arange(4, dtype=torch.uint8))[:, None]
    return torch.cat([low[:, :8] | (low[:, 8:] << 4), high.sum(1, dtype=torch.uint8)], 1)


def _unpack_sixteen(data: Tensor) -> Tensor:
    """The inverse of `_pack_sixteen`."""
    high = (data[:, None, 8:] >> (2 * torch.arange(4, dtype=torch.uint8))[:, None]) & 3
    return torch.cat([data[:, :8] & 15, data[:, :8] >> 4], 1) | (high.flatten(1) << 4)


def _nested(f: object, shape: tuple[int, ...], codes: Tensor, d: Tensor, sign: int = 1) -> QTensor:
    """A super-block's scales or minima, uint8 (n, scales), with their fp16 factor as bytes (n, 2)."""
    assert isinstance(f, Format)
    packed = pack(codes, f.bits).reshape(*shape[:-1], -1) if codes.numel() else pack(codes.reshape(shape), f.bits)
    return QTensor(f, shape, torch.float32, {"codes": packed, "scale": sign * _halves(d, f.groups(shape))})
