"""Affine quantization r = S (q - Z): the worked numbers, and the laws that hold for any range."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfbyte import Affine, InputError

numbers = st.floats(-1e6, 1e6, allow_subnormal=False)
ranges = st.tuples(numbers, numbers).map(sorted)
kinds = st.fixed_dictionaries(
    {"bits": st.integers(2, 8), "signed": st.booleans(), "symmetric": st.booleans()},
)


def test_the_worked_numbers_of_a_range_from_zero():
    a = Affine.from_range(0, 1000)
    assert (round(a.scale, 2), a.zero_point) == (3.92, 0)
    assert a.quantize(250) == 64
    assert a.dequantize(64) == pytest.approx(250.98, abs=0.01)


def test_the_worked_numbers_of_a_range_that_holds_zero():
    a = Affine.from_range(-20, 1000)
    assert (a.scale, a.zero_point) == (4.0, 5)
    assert (a.quantize(-20), a.quantize(0), a.quantize(1000)) == (0, 5, 255)
    assert (a.dequantize(0), a.dequantize(5), a.dequantize(255)) == (-20.0, 0.0, 1000.0)


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_integers_of_a_width(bits):
    unsigned, signed = Affine.from_range(-1, 1, bits), Affine.from_range(-1, 1, bits, signed=True)
    assert (unsigned.low, unsigned.high) == (0, 2**bits - 1)
    assert (signed.low, signed.high) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    even = Affine.from_range(-1, 0.5, bits, signed=True, symmetric=True)
    assert (even.zero_point, even.scale) == (0, 1 / (2 ** (bits - 1) - 1))
    assert even.quantize(-1) == -even.quantize(1)


def test_unsigned_symmetric_ranges():
    both = Affine.from_range(-1, 1, symmetric=True)
    assert (both.zero_point, both.scale) == (128, 1 / 127)
    above = Affine.from_range(0, 1, symmetric=True)  # nothing is negative: no code is spent on it
    assert (above.zero_point, above.scale) == (0, 1 / 255)


@given(ranges, kinds)
def test_zero_is_exactly_representable(ends, kind):
    a = Affine.from_range(*ends, **kind)
    assert a.dequantize(a.quantize(0.0)) == 0.0
    assert a.low <= a.zero_point <= a.high


@given(ranges, kinds, st.floats(0, 1))
def test_what_lies_in_the_range_comes_back_within_half_a_step(ends, kind, where):
    low, high = ends
    a = Affine.from_range(low, high, **kind)
    x = low + where * (high - low)
    # the zero point is rounded too, so that an end of the range may lie half a step outside of the integers
    slack = 1.0 if a.quantize(x) in (a.low, a.high) else 0.5
    assert abs(a.dequantize(a.quantize(x)) - x) <= a.scale * slack * (1 + 1e-9)


@given(ranges, kinds)
def test_the_range_is_covered(ends, kind):
    low, high = min(ends[0], 0.0), max(ends[1], 0.0)
    a = Affine.from_range(*ends, **kind)
    ends = (a.dequantize(a.low), a.dequantize(a.high))
    assert ends[0] <= low + a.scale * 0.5000001
    assert ends[1] >= high - a.scale * 0.5000001


@given(ranges, kinds, st.integers(0, 255))
def test_every_code_comes_back_as_itself(ends, kind, n):
    a = Affine.from_range(*ends, **kind)
    q = min(a.low + n, a.high)
    assert a.quantize(a.dequantize(q)) == q


@given(ranges, kinds, st.lists(st.floats(-2e6, 2e6, width=32), min_size=1))
def test_tensors_and_numbers_alike(ends, kind, xs):
    a = Affine.from_range(*ends, **kind)
    q = a.quantize(torch.tensor(xs, dtype=torch.float32))
    assert q.dtype == torch.int32
    assert q.tolist() == [a.quantize(x) for x in xs]
    back = a.dequantize(q)
    assert back.dtype == torch.float32
    torch.testing.assert_close(back, torch.tensor([a.dequantize(n) for n in q.tolist()], dtype=torch.float32))


def test_a_number_is_quantized_in_double_precision():
    a = Affine(scale=1e-9, zero_point=0, low=-(2**31), high=2**31 - 1)
    assert a.quantize(0.123456789) == 123456789


@pytest.mark.parametrize("x", [5.0, -5.0, 0.0])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_constant_range(x, symmetric):
    a = Affine.from_range(x, x, symmetric=symmetric)
    assert a.dequantize(a.quantize(x)) == pytest.approx(x, abs=a.scale / 2)
    if x == 0:
        assert a.scale == 1.0


def test_values_outside_take_the_ends():
    a = Affine.from_range(-1, 1, bits=4)
    assert [a.quantize(x) for x in (-9, 9, -math.inf, math.inf)] == [0, 15, 0, 15]
    assert a.quantize(torch.tensor([-math.inf, math.inf])).tolist() == [0, 15]


def test_empty_tensors():
    a = Affine.from_range(-1, 1)
    assert a.quantize(torch.empty(0, 3)).shape == a.dequantize(torch.empty(0, 3)).shape == (0, 3)


@pytest.mark.parametrize(("low", "high"), [(math.nan, 1), (0, math.nan), (-math.inf, 0), (0, math.inf), (1, 0)])
def test_what_is_no_range_is_refused(low, high):
    with pytest.raises(InputError, match="no range"):
        Affine.from_range(low, high)


@pytest.mark.parametrize("bits", [0, 1, 9, 16])
def test_other_widths_are_refused(bits):
    with pytest.raises(InputError, match="2 to 8"):
        Affine.from_range(0, 1, bits=bits)


@pytest.mark.parametrize("x", [math.nan, torch.tensor([0.0, math.nan])])
def test_nan_is_refused(x):
    with pytest.raises(InputError, match="NaN"):
        Affine.from_range(0, 1).quantize(x)
