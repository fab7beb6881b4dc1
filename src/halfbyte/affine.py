"""Affine quantization as the literature has it: r = S (q - Z). The worked numbers of textbooks, on anything."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from halfbyte.errors import InputError


@dataclass(frozen=True)
class Affine:
    """scale S > 0, zero point Z (an integer that stands for exactly 0), and the range of the integers q.

    arXiv:1712.05877, section 2.1. Rounds half to even, as IEEE and torch do.
    """

    scale: float
    zero_point: int
    low: int
    high: int

    @classmethod
    def from_range(
        cls, low: float, high: float, bits: int = 8, signed: bool = False, symmetric: bool = False
    ) -> Affine:
        """S and Z for real numbers in [low, high], widened to hold 0.

        Asymmetric: S = (high - low) / (2^bits - 1), Z = round(qmin - low / S). Symmetric: the range is
        [-m, m] with m the larger side; signed integers then have Z = 0 and S = m / (2^(bits-1) - 1);
        unsigned ones Z = 2^(bits-1) and the same S, or Z = 0 and S = high / (2^bits - 1) where nothing is
        negative. A range of [0, 0] has S = 1. Raises InputError for NaN, infinity, low > high, other bits.
        """
        if not (math.isfinite(low) and math.isfinite(high)) or low > high:
            raise InputError(f"[{low}, {high}] is no range of finite numbers.")
        if not 2 <= bits <= 8:
            raise InputError(f"bits must be 2 to 8, not {bits}.")
        qmin = -(1 << (bits - 1)) if signed else 0
        qmax = qmin + (1 << bits) - 1
        low, high = min(low, 0.0), max(high, 0.0)
        if symmetric and (signed or low < 0):
            middle = qmin + (1 << (bits - 1))
            return cls(max(-low, high) / (qmax - middle) or 1.0, middle, qmin, qmax)
        scale = (high - low) / (qmax - qmin) or 1.0
        zero = round(qmin - low / scale)
        return cls(scale, min(max(zero, qmin), qmax), qmin, qmax)

    @overload
    def quantize(self, x: float) -> int: ...
    @overload
    def quantize(self, x: Tensor) -> Tensor: ...
    def quantize(self, x: float | Tensor) -> int | Tensor:
        """q = clamp(round(x / S) + Z): an int for a number, an int32 tensor for a tensor. Raises InputError for
        NaN; infinities take the ends."""
        if isinstance(x, Tensor):
            if torch.isnan(x).any():
                raise InputError("NaN has no integer.")
            q = (x.double() / self.scale).round() + self.zero_point
            return q.clamp(self.low, self.high).to(torch.int32)
        return int(self.quantize(torch.tensor(float(x), dtype=torch.float64)))

    @overload
    def dequantize(self, q: int) -> float: ...
    @overload
    def dequantize(self, q: Tensor) -> Tensor: ...
    def dequantize(self, q: float | Tensor) -> float | Tensor:
        """r = S (q - Z): a float for a number, a float32 tensor for a tensor."""
        if isinstance(q, Tensor):
            return (self.scale * (q.double() - self.zero_point)).float()
        return self.scale * (q - self.zero_point)
