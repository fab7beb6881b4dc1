"""The op of a convolution in one, two or three dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfbyte import kernels
from halfbyte.formats import Integers
from halfbyte.inputs import RoundsInputs
from halfbyte.qtensor import QTensor, grid_values
from halfbyte.weight import Weight

_BY_DIMENSIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Conv(RoundsInputs):
    """A convolution with the filters of a Weight, each a row: (out, in / groups * kernel), as containers hold them.

    kernel: what a row is, (in / groups, *sizes); the other settings are torch's. Filters are dequantized where they are
    codes: there are few of them, and each is used at every place. A row of inputs is a sample: all that a filter sums
    is of one, at whatever place, so that one scale multiplies the sum.
    """

    transposed = False

    def __init__(
        self,
        weight: Weight,
        bias: nn.Parameter | None,
        kernel: tuple[int, ...],
        stride: tuple[int, ...] = (1,),
        padding: str | tuple[int, ...] = (0,),
        dilation: tuple[int, ...] = (1,),
        groups: int = 1,
        around: tuple[str, list[int]] | None = None,
    ) -> None:
        """around: F.pad's mode and numbers, where what surrounds the input is not zeros, or not as many on both sides;
        padding is then not used."""
        super().__init__(weight, bias)
        self.kernel = kernel
        self.stride, self.dilation, self.groups, self.around = stride, dilation, groups, around
        self.padding = padding if around is None else 0

    @classmethod
    def of(cls, m: nn.Module, weight: Weight) -> Conv:
        """The op for torch's own Conv1d, Conv2d or Conv3d."""
        assert isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        around = None if m.padding_mode == "zeros" else (m.padding_mode, m._reversed_padding_repeated_twice)
        kernel = (m.in_channels // m.groups, *m.kernel_size)
        bias: Any = m.bias
        return cls(weight, bias, kernel, m.stride, m.padding, m.dilation, m.groups, around)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, in, *sizes), or one sample without N."""
        w = self.weight
        if self.input is not None:
            rows = self.rounded(x.flatten(-len(self.kernel)))
            if isinstance(rows, QTensor):
                codes = self.codes()
                assert codes is not None
                if _whole(rows) and _whole(codes):
                    return self._integers(rows, codes, x)
                rows = kernels.dequantize(rows)
            x = rows.view(x.shape)
        filters = w.value() if w.grid is None or self.training else w.frozen().dequantize()
        return self._convolve(x, filters.to(x.dtype), self.bias)

    def _integers(self, rows: QTensor, filters: QTensor, x: Tensor) -> Tensor:
        """Integers times integers: no sum is rounded, so that the order they are added in is of no matter. Then scales
        and bias in float32, and x's dtype. float32 holds every integer up to 2^24; where a filter could pass that, or
        where torch may convolve by way of a transform (Winograd's, which has fractions), float64 does it."""
        a, w, grid = _values(rows).view(x.shape), _values(filters), rows.format.grid
        assert isinstance(grid, Integers)
        most = w.abs().sum(1).amax() * (grid.middle or grid.top)  # no sum, and no part of one, is larger
        direct = x.is_cpu and torch.backends.mkldnn.is_available()
        exact = torch.float32 if direct and most <= 1 << 24 else torch.float64
        ends = (1,) * (len(self.kernel) - 1)
        scale, by = (t.reshape(*t.shape, *ends) for t in (filters.qparams.scale.reshape(-1), rows.qparams.scale))
        y = self._convolve(a.to(exact), w.to(exact), None).float() * scale * by
        return (y if self.bias is None else y + self.bias.float().reshape(-1, *ends)).to(x.dtype)

    def _convolve(self, x: Tensor, filters: Tensor, bias: Tensor | None) -> Tensor:
        if self.around is not None:
            x = F.pad(x, self.around[1], mode=self.around[0])
        convolve = _BY_DIMENSIONS[len(self.kernel) - 1]
        return convolve(
            x, filters.unflatten(1, self.kernel), bias, self.stride, self.padding, self.dilation, self.groups
        )


def _whole(q: QTensor) -> bool:
    """Whether rows are integers, as they stand, that one scale multiplies."""
    f = q.format
    by_row = f.group in ("channel", "tensor") and not f.flat and isinstance(q.parts["scale"], Tensor)
    return isinstance(f.grid, Integers) and f.zero in (None, "integer") and by_row and "order" not in q.parts


def _values(q: QTensor) -> Tensor:
    """The integers of `_whole` codes, float32 of their shape."""
    return grid_values(q.codes, q.format, q.qparams.zero)
