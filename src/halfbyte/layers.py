"""A layer is an op and a weight (weight.py). No tensor subclasses, no class per method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfbyte import kernels
from halfbyte.convolution import Conv
from halfbyte.errors import InputError
from halfbyte.experts import Experts, fused
from halfbyte.formats import Format, parse
from halfbyte.qtensor import QParams, QTensor
from halfbyte.scheme import static
from halfbyte.weight import Codes, Grid, Weight, moved, needs_base

__all__ = ["OPS", "Codes", "Conv", "Embedding", "Experts", "Grid", "Linear", "Op", "Weight", "ops", "swap", "weights"]


class Linear(nn.Module):
    """y = x W^T + b with the W of a Weight (out, in).

    Without a grid the factored path is taken: the base's product, to which each adapter adds its own. With one
    the value is needed; in eval it is quantized once and its codes are multiplied, as they will be after
    saving. transposed: the checkpoint holds (in, out), as GPT-2's Conv1D does; only reading and writing care.

    input: the format that x is rounded to at run time, or None. By rows (tokens), unless `scheme.static` says
    otherwise: then by a scale, and an integer zero point, that `round_inputs` was given and that are saved. Their
    buffers have the names and dtypes that compressed-tensors gives them, and keep those through a cast.
    """

    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def __init__(self, weight: Weight, bias: nn.Parameter | None = None, transposed: bool = False) -> None:
        super().__init__()
        self.weight, self.bias, self.transposed = weight, bias, transposed
        self._input: Format | None = None
        self.register_buffer("input_scale", None)  # (1,), a float
        self.register_buffer("input_zero_point", None)  # (1,) int8, less than the code by half of the codes' number

    @property
    def in_features(self) -> int:
        return self.weight.shape[-1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[-2]

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

    @property
    def input_qparams(self) -> QParams | None:
        """What inputs of a static format are rounded by, each (1,) float32; None where it is not known."""
        if self._input is None or self.input_scale is None:
            return None
        zero = self.input_zero_point
        half = 1 << (self._input.bits - 1)
        return QParams(self.input_scale.float(), None if zero is None else zero.float() + half)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear:
        """A cast leaves the scale of inputs as it is, as Codes leaves its parts."""
        scale = self.input_scale
        super()._apply(fn, recurse)
        self.input_scale = None if scale is None else moved(scale, fn)
        return self

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if self._input is not None:
            f, p = self._rounding(x, self._input)
            codes = None if w.adapters or torch.is_grad_enabled() else self._codes()
            if codes is not None:
                return kernels.linear(kernels.quantize(x, f, p), codes, self.bias)
            x = kernels.fake(x, f, p)
        y = self.product(x, self.bias)
        if w.grid is None:
            for adapter in w.adapters.values():
                y = adapter(x, y, self) if needs_base(adapter) else adapter(x, y)
        return y

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., in) times what is stored, or what the grid makes of the weight, plus bias: (..., out)."""
        w = self.weight
        if (codes := self._codes()) is not None:
            return kernels.linear(_autocast(x), codes, None if bias is None else _autocast(bias))
        return F.linear(x, (w.base() if w.grid is None else w.value()).to(x.dtype), bias)

    def _codes(self) -> QTensor | None:
        """What can be multiplied as codes: frozen ones, and in eval what a grid makes of the value."""
        w = self.weight
        if w.grid is not None:
            return None if self.training else w.frozen()
        return w.stored.q if isinstance(w.stored, Codes) and not w.stored.learned else None

    def _rounding(self, x: Tensor, f: Format) -> tuple[Format, QParams]:
        """What x is rounded to, and by which scales. Those of a static format are given to every token, which gives the
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


def _autocast(x: Tensor) -> Tensor:
    """x as torch.autocast, which knows nothing of codes, gives it to a product."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class Embedding(nn.Module):
    """Rows of a Weight (tokens, width), looked up; `scale` multiplies them where a model does so (Gemma)."""

    transposed = False
    embed_scale: Tensor | None

    def __init__(self, weight: Weight, padding_idx: int | None = None, scale: Tensor | None = None) -> None:
        super().__init__()
        self.weight, self.padding_idx = weight, padding_idx
        self.register_buffer("embed_scale", scale, persistent=False)

    @property
    def num_embeddings(self) -> int:
        return self.weight.shape[0]

    @property
    def embedding_dim(self) -> int:
        return self.weight.shape[1]

    def forward(self, ids: Tensor) -> Tensor:
        w = self.weight
        added: list[Any] = [a for a in w.adapters.values() if hasattr(a, "rows")] if w.grid is None else []
        if len(added) < len(w.adapters) or (w.grid is not None and self.training) or not self._rows_alone():
            y = F.embedding(ids, w.value(), self.padding_idx)
            added = []
        elif w.format is None:
            y = F.embedding(ids, w.base(), self.padding_idx)
        else:
            y = kernels.dequantize(w.frozen().rows(ids))
        for adapter in added:
            y = adapter.rows(ids, y)
        return y if self.embed_scale is None else y * self.embed_scale.to(y.dtype)

    def _rows_alone(self) -> bool:
        return self.weight.format is None or self.weight.frozen().has_rows


Op = Linear | Embedding | Conv


def _linear(m: nn.Module, weight: Weight) -> Op:
    return Linear(weight, m.bias)  # pyright: ignore[reportArgumentType]


def _conv1d(m: nn.Module, weight: Weight) -> Op:
    return Linear(weight, m.bias, transposed=True)  # pyright: ignore[reportArgumentType]


def _embedding(m: nn.Module, weight: Weight) -> Op:
    scale = getattr(m, "embed_scale", None)
    scale = None if scale is None else torch.as_tensor(scale)
    return Embedding(weight, m.padding_idx, scale)  # pyright: ignore[reportArgumentType]


# Which modules become which op. By name, so that transformers' own classes need no import here; a subclass
# that computes something else is not in the table and stays as it is, which `plan` reports.
OPS: dict[str, Callable[[nn.Module, Weight], Op]] = {
    "Linear": _linear,
    "NonDynamicallyQuantizableLinear": _linear,
    "FalconLinear": _linear,
    "Conv1D": _conv1d,
    "Conv1d": Conv.of,
    "Conv2d": Conv.of,
    "Conv3d": Conv.of,
    "Embedding": _embedding,
    "Gemma3TextScaledWordEmbedding": _embedding,
}


def swap(model: nn.Module) -> nn.Module:
    """Replaces, in place, the modules that OPS names by ops around Weights, and fused experts by Experts, which have an
    op for each matrix; shared parameters share a Weight.

    Call it once tying is done. Works on the meta device. Returns the model (or the op, for a bare module).
    """
    weights: dict[int, Weight] = {}

    def op_of(m: nn.Module) -> Op | None:
        make = OPS.get(type(m).__name__)
        p = getattr(m, "weight", None)
        if make is None or not isinstance(p, nn.Parameter):
            return None
        if id(p) not in weights:
            weights[id(p)] = Weight(_matrix(p, make))
        return make(m, weights[id(p)])

    if (root := op_of(model)) is not None:
        return root
    for name, m in list(model.named_modules()):
        how = fused(m)
        new = op_of(m) if how is None else Experts.of(m, how, lambda w, b: Linear(Weight(w), b))
        if name and new is not None:
            new.train(m.training)
            model.set_submodule(name, new)
    return model


def _matrix(p: nn.Parameter, make: Callable[[nn.Module, Weight], Op]) -> nn.Parameter:
    """A module's parameter as an op holds it: (out, in)."""
    if make is _conv1d:
        return nn.Parameter(p.detach().T.contiguous(), p.requires_grad)
    return p if p.ndim == 2 else nn.Parameter(p.detach().flatten(1), p.requires_grad)


def ops(model: nn.Module) -> Iterator[tuple[str, Op]]:
    """Every op with its name, tied ones under each of theirs."""
    for name, m in model.named_modules(remove_duplicate=False):
        if isinstance(m, Op):
            yield name, m


def weights(model: nn.Module) -> dict[str, Weight]:
    """Every Weight once, by the name of the first op that holds it and ".weight"."""
    seen: dict[int, str] = {}
    for name, op in ops(model):
        seen.setdefault(id(op.weight), f"{name}.weight")
    by_id = {id(op.weight): op.weight for _, op in ops(model)}
    return {name: by_id[i] for i, name in seen.items()}
