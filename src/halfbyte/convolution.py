"""The op of a convolution in one, two or three dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from halfbyte.weight import Weight

_BY_DIMENSIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Conv(nn.Module):
    """A convolution with the filters of a Weight, each a row: (out, in / groups * kernel), as containers hold them.

    kernel: what a row is, (in / groups, *sizes); the other settings are torch's. Filters are dequantized where they are
    codes: there are few of them, and each is used at every place.
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
        """around: F.pad's mode and numbers, where what surrounds the input is not zeros; padding is then not used."""
        super().__init__()
        self.weight, self.bias, self.kernel = weight, bias, kernel
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
        w = self.weight
        filters = w.value() if w.grid is None or self.training else w.frozen().dequantize()
        if self.around is not None:
            x = F.pad(x, self.around[1], mode=self.around[0])
        convolve = _BY_DIMENSIONS[len(self.kernel) - 1]
        return convolve(
            x, filters.to(x.dtype).unflatten(1, self.kernel), self.bias, self.stride, self.padding, self.dilation,
            self.groups,
        )  # fmt: skip
