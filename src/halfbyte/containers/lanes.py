"""The difference of two blocks of bytes in few bytes, where few of their numbers changed, or all by a little.

A block is seen as numbers of 4, 8, 16 or 32 bits. Their differences, modulo 2^width, are mostly 0: of each plane of
bytes the gaps between those that are not are kept, and what stands there, through LZMA's range coder. Of n numbers of
which a share p moved by one step up or down that is little more than what it must be at least (Shannon's bound),

    n (H(p) + p) bits,      H(p) = -p log2 p - (1 - p) log2 (1 - p)
"""

from __future__ import annotations

import lzma
import struct

import numpy as np

from halfbyte.errors import InputError

BLOCK = 1 << 20  # bytes that are coded at a time: what one piece of a file may ask of memory is a few times this
WIDTHS = (4, 8, 16, 32)  # bits of a number
Bytes = np.ndarray  # of uint8

_AS_GOOD = 1.01  # of two widths that need about the same the narrower is coded in fewer bytes
_SKIP = 255  # a gap so long, at whose end nothing changed
# Gaps and values are all but random: how often each comes predicts them, not what comes before, nor where.
_RANGE_CODER = [{"id": lzma.FILTER_LZMA2, "lc": 0, "lp": 0, "pb": 0, "dict_size": 1 << 12}]
_TEXT = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": BLOCK}]


def pack(data: bytes) -> bytes:
    """Bytes that are like no others, compressed by themselves."""
    return lzma.compress(data, lzma.FORMAT_RAW, filters=_TEXT)


def unpack(packed: bytes, size: int) -> bytes:
    """What `pack` was given: `size` bytes, and no more are ever made. Raises InputError for any other number."""
    out = _decompress(packed, _TEXT, size)
    if len(out) != size:
        raise InputError(f"it holds {len(out)} bytes where {size} should be.")
    return out


def difference(base: bytes, target: bytes) -> tuple[int, bytes]:
    """Two blocks of as many bytes, at most BLOCK -> the width that serves best, and the packed difference."""
    cost = {w: sum(map(_bits, _planes(base, target, w))) for w in WIDTHS if 8 * len(target) % w == 0}
    width = min(cost, key=lambda w: (cost[w] > _AS_GOOD * min(cost.values()), w))
    raw = b"".join(map(_sparse, _planes(base, target, width)))
    return width, lzma.compress(raw, lzma.FORMAT_RAW, filters=_RANGE_CODER)


def restore(base: bytes, width: int, packed: bytes) -> bytes:
    """The target of `difference`. Raises InputError for what it cannot have written; memory is bounded by the base's
    size whatever is packed."""
    if width not in WIDTHS or 8 * len(base) % width:
        raise InputError(f"{len(base)} bytes are no numbers of {width} bits.")
    count, planes = 8 * len(base) // width, max(1, width // 8)
    raw = _decompress(packed, _RANGE_CODER, planes * (4 + 2 * count + count // _SKIP + 1))
    at, found = 0, []
    for _ in range(planes):
        plane, at = _dense(raw, at, count)
        found.append(plane)
    if at != len(raw):
        raise InputError(f"{len(raw) - at} bytes follow a block's last plane.")
    return _moved(base, found, width)


def _decompress(packed: bytes, filters: list[dict], most: int) -> bytes:
    decoder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters)
    try:
        return decoder.decompress(packed, most + 1)
    except (lzma.LZMAError, EOFError) as e:
        raise InputError(f"what is packed cannot be unpacked: {e}.") from None


def _numbers(data: bytes, width: int) -> np.ndarray:
    """Unsigned, little-endian; the low half of a byte before the high one."""
    if width > 4:
        return np.frombuffer(data, f"<u{width // 8}")
    whole = np.frombuffer(data, np.uint8)
    return np.stack([whole & 15, whole >> 4], 1).reshape(-1)


def _planes(base: bytes, target: bytes, width: int) -> list[Bytes]:
    """Differences modulo 2^width. Of more than a byte the sign goes to the lowest bit (zigzag), so that small ones of
    either sign have zeros in the upper bytes; those are planes of their own."""
    moved = _numbers(target, width) - _numbers(base, width)
    if width <= 8:
        return [moved & 15 if width == 4 else moved]
    signed = moved.view(f"<i{width // 8}")
    zigzag = (signed << 1) ^ (signed >> (width - 1))
    return list(zigzag.view(np.uint8).reshape(-1, width // 8).T)


def _moved(base: bytes, planes: list[Bytes], width: int) -> bytes:
    """The base with the differences added, as bytes."""
    if width <= 8:
        out = _numbers(base, width) + planes[0]
        if width == 8:
            return out.tobytes()
        pairs = (out & 15).reshape(-1, 2)
        return (pairs[:, 0] | pairs[:, 1] << 4).tobytes()
    zigzag = np.stack(planes, 1).reshape(-1).view(f"<u{width // 8}")
    moved = (zigzag >> 1) ^ -(zigzag & 1)
    return (_numbers(base, width) + moved).tobytes()


def _bits(plane: Bytes) -> float:
    """What an order-0 coder takes for it."""
    count = np.bincount(plane, minlength=256)
    count = count[count > 0]
    return float((count * (np.log2(len(plane)) - np.log2(count))).sum())


def _sparse(plane: Bytes) -> bytes:
    """How many gaps there are, the gaps, and what is not zero."""
    at = np.flatnonzero(plane)
    skips, rest = np.divmod(np.diff(at, prepend=-1) - 1, _SKIP)
    gaps = np.full(len(at) + int(skips.sum()), _SKIP, np.uint8)
    gaps[np.cumsum(skips + 1) - 1] = rest
    return struct.pack("<I", len(gaps)) + gaps.tobytes() + plane[at].tobytes()


def _dense(raw: bytes, at: int, count: int) -> tuple[Bytes, int]:
    """A plane of `count` bytes that begins at a byte of `raw`, and where it ends."""
    if at + 4 > len(raw):
        raise InputError("a block ends before its last plane.")
    (n,) = struct.unpack_from("<I", raw, at)
    if n > len(raw) - at - 4:
        raise InputError("a block ends inside its gaps.")
    gaps = np.frombuffer(raw, np.uint8, n, at + 4)
    here = gaps < _SKIP
    end, changed = at + 4 + n, int(here.sum())
    places = np.cumsum(gaps + here.astype(np.int64))[here] - 1
    if changed > len(raw) - end or (changed and places[-1] >= count):
        raise InputError("a block's gaps lead out of it.")
    plane = np.zeros(count, np.uint8)
    plane[places] = np.frombuffer(raw, np.uint8, changed, end)
    return plane, end + changed
