"""Differences of blocks: taken back to the byte, near the bound, and broken in every way."""

from __future__ import annotations

import lzma
import struct
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.containers import lanes
from halfbyte.containers.lanes import BLOCK, WIDTHS, difference, pack, restore, unpack
from halfbyte.errors import InputError


def coded(raw: bytes) -> bytes:
    """As `difference` packs what it has found."""
    return lzma.compress(raw, lzma.FORMAT_RAW, filters=lanes._RANGE_CODER)


def nibbles(codes: np.ndarray) -> bytes:
    return (codes[::2] | codes[1::2] << 4).astype(np.uint8).tobytes()


@given(st.binary(min_size=1, max_size=300), st.data())
def test_the_difference_is_taken_back(target, data):
    base = data.draw(st.binary(min_size=len(target), max_size=len(target)) | st.just(target))
    width, packed = difference(base, target)
    assert restore(base, width, packed) == target


@given(st.sampled_from(WIDTHS), st.integers(0, 2**32), st.sampled_from([0.001, 0.1, 1]))
def test_every_width_is_taken_back(width, seed, share):
    rng = np.random.default_rng(seed)
    base, target = rng.integers(0, 256, (2, 4096), np.uint8)
    target = np.where(rng.random(4096) < share, target, base)
    planes = lanes._planes(base.tobytes(), target.tobytes(), width)
    packed = coded(b"".join(map(lanes._sparse, planes)))
    assert restore(base.tobytes(), width, packed) == target.tobytes()


@given(st.sampled_from([16, 32]), st.integers(-128, 127))
def test_a_small_step_either_way_leaves_the_upper_planes_empty(width, step):
    base = np.random.default_rng(0).integers(0, 2**width, 50, f"u{width // 8}")
    low, *upper = lanes._planes(base.tobytes(), (base + np.array(step).astype(base.dtype)).tobytes(), width)
    assert len(set(low.tolist())) == 1
    assert not np.any(upper)


@pytest.mark.parametrize("share", [0.01, 0.05, 0.2])
def test_few_codes_that_moved_by_a_step_take_little_more_than_they_must(share):
    """n (H(p) + p) bits, by Shannon."""
    rng, n = np.random.default_rng(0), 2 * BLOCK
    codes = rng.integers(1, 15, n)
    moved = codes + np.where(rng.random(n) < share, rng.choice([-1, 1], n), 0)
    width, packed = difference(nibbles(codes), nibbles(moved))
    p = (moved != codes).mean()
    bound = n * (-p * np.log2(p) - (1 - p) * np.log2(1 - p) + p) / 8
    assert width == 4
    assert bound < len(packed) < 1.07 * bound


def test_bytes_and_numbers_are_told_apart():
    rng, n = np.random.default_rng(0), 1 << 16
    step = np.where(rng.random(n) < 0.05, rng.choice([-1, 1], n), 0)
    codes = rng.integers(-100, 100, n)
    assert difference(codes.astype(np.int8).tobytes(), (codes + step).astype(np.int8).tobytes())[0] == 8
    scales = np.exp(rng.standard_normal(n))
    assert difference(scales.astype("<f2").tobytes(), (1.001 * scales).astype("<f2").tobytes())[0] == 16
    assert difference(scales.astype("<f4").tobytes(), (1.00001 * scales).astype("<f4").tobytes())[0] == 32


@given(st.binary(max_size=300))
def test_what_is_packed_by_itself(data):
    assert unpack(pack(data), len(data)) == data
    for other in {len(data) + 1, max(0, len(data) - 1)} - {len(data)}:
        with pytest.raises(InputError):
            unpack(pack(data), other)


# ---- what comes from anyone


def test_no_more_is_unpacked_than_was_said():
    bomb = pack(bytes(1 << 24))
    assert len(bomb) < 1 << 16
    with pytest.raises(InputError, match="holds 1001 bytes where 1000"):
        unpack(bomb, 1000)
    with pytest.raises(InputError):
        restore(bytes(100), 8, coded(bytes(1 << 24)))


BROKEN = {
    "nothing": b"",
    "no room for a count": b"\1\0\0",
    "more gaps than there are": struct.pack("<I", 4) + b"\0",
    "gaps without end": struct.pack("<I", 2**32 - 1),
    "no values": struct.pack("<I", 2) + b"\0\0\1",
    "out of the block": struct.pack("<I", 1) + b"\x0a" + b"\1",
    "far out of it": struct.pack("<I", 9) + b"\xff" * 8 + b"\0" + b"\1",
    "more than a plane": struct.pack("<I", 1) + b"\0" + b"\1" + b"\1",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_difference_is_refused(kind):
    with pytest.raises(InputError):
        restore(bytes(10), 8, coded(BROKEN[kind]))


def test_the_last_byte_can_change():
    assert restore(bytes(10), 8, coded(struct.pack("<I", 1) + b"\x09" + b"\1")) == bytes(9) + b"\1"


@pytest.mark.parametrize("width", [0, 1, 2, 12, 64, -8, 16])
def test_a_width_that_is_none(width):
    with pytest.raises(InputError, match="are no numbers of"):
        restore(bytes(9), width, b"")


@given(st.binary(max_size=200), st.sampled_from(WIDTHS))
def test_any_bytes(data, width):
    for packed in (data, coded(data)):
        with suppress(InputError):
            assert len(restore(bytes(64), width, packed)) == 64
