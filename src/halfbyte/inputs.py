"""What ops that multiply share: a Weight, a bias, and inputs that may be rounded before they are multiplied."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor, nn

from halfbyte import kernels
from halfbyte.errors import InputError
from halfbyte.formats import Format, parse
from halfbyte.qtensor import QParams, QTensor
from halfbyte.scheme import static
from halfbyte.weight import Codes, Weight, moved


class RoundsInputs(nn.Module):
    """An op that multiplies what it is fed with a Weight.

    input: the format that x is rounded to at run time, or None. By rows, which are what the op calls so (a token, a
    sample), unless `scheme.static` says otherwise: then by a scale, and an integer zero point, that `round_inputs` was
    given and that are saved. Their buffers have the names and dtypes that compressed-tensors gives them, and keep
    those through a cast.
    """

    bias: nn.Parameter | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def __init__(self, weight: Weight, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self._input: Format | None = None
        self.register_buffer("input_scale", None)  # (1,), a float
        self.register_buffer("input_zero_point", None)  # (1,) int8, less than the code by half of the codes' number

    @property
    def input(self) -> Format | None:
        return self._input

    @input.setter
    def input(self, f: Format | None) -> None:
        if f != self._input:  # scales are those of one format
            self._input, self.input_scale, self.input_zero_point = f, None, None

    def round_inputs(self, f: Format, p: QParams) -> None:
        """Inputs are rounded to a static format from now on, by p's scale, kept in its dtype, and zero point."""
        self.input = f
        self.input_scale = p.scale.detach().reshape(1).clone()
        if p.zero is not None:
            self.input_zero_point = (p.zero.detach().reshape(1) - (1 << (f.bits - 1))).to(torch.int8)

    @contextmanager
    def unrounded(self) -> Iterator[None]:
        """Inside, inputs are multiplied as they are."""
        f, self._input = self._input, None
        try:
            yield
        finally:
            self._input = f

    @property
    def input_qparams(self) -> QParams | None:
        """What inputs of a static format are rounded by, each (1,) float32; None where it is not known."""
        if self._input is None or self.input_scale is None:
            return None
        zero = self.input_zero_point
        half = 1 << (self._input.bits - 1)
        return QParams(self.input_scale.float(), None if zero is None else zero.float() + half)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """A cast leaves the scale of inputs as it is, as Codes leaves its parts."""
        scale = self.input_scale
        super()._apply(fn, recurse)
        self.input_scale = None if scale is None else moved(scale, fn)
        return self

    def rounded(self, rows: Tensor) -> Tensor | QTensor:
        """rows (..., n) as they are multiplied: themselves where no input format is set; else codes, where the weight
        has codes too and nothing asks for a gradient; else the values of the same codes, gradient straight through.
        Raises InputError where a static format has no scale yet."""
        w = self.weight
        if self._input is None or w.asleep:
            return rows
        f, p = self._rounding(rows, self._input)
        beside = w.adapters and w.grid is None  # adapters that take rows as floats
        if beside or torch.is_grad_enabled() or self.codes() is None:
            return kernels.fake(rows, f, p)
        return kernels.quantize(rows, f, p)

    def codes(self) -> QTensor | None:
        """What can be multiplied as codes: frozen ones, and in eval what a grid makes of the value."""
        w = self.weight
        if w.grid is not None:
            return None if self.training else w.frozen()
        return w.stored.q if isinstance(w.stored, Codes) and not w.stored.learned else None

    def _rounding(self, x: Tensor, f: Format) -> tuple[Format, QParams]:
        """What x is rounded to, and by which scales. Those of a static format are given to every row, which gives the
        same codes: integer products take scales by rows. Raises InputError where they are not known."""
        if not static(f):
            return f, kernels.qparams(x.detach(), f, "absmax")
        if (p := self.input_qparams) is None:
            raise InputError(
                f"inputs are rounded to {f} by a scale that is not known yet: calibrate first (quantize --calibration)."
            )
        rows = (*x.shape[:-1], 1)
        zero = None if p.zero is None else p.zero.expand(rows)
        return parse(f.name.replace("-tensor", "-channel")), QParams(p.scale.expand(rows), zero)
