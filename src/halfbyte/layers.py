"""A layer is an op and a weight (weight.py). No tensor subclasses, no class per method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfbyte import kernels
from halfbyte.convolution import Conv
from halfbyte.experts import Experts, fused
from halfbyte.inputs import RoundsInputs
from halfbyte.qtensor import QTensor
from halfbyte.weight import Codes, Grid, Weight, sees_op

__all__ = [
    "OPS", "Codes", "Conv", "Embedding", "Experts", "Grid", "Linear", "Op", "RoundsInputs", "Weight", "ops",
    "round_inputs_of_codes", "swap", "weights",
]  # fmt: skip


class Linear(RoundsInputs):
    """y = x W^T + b with the W of a Weight (out, in). A row of inputs is a token.

    Without a grid the factored path is taken: the base's product, to which each adapter adds its own. With one
    the value is needed; in eval it is quantized once and its codes are multiplied, as they will be after
    saving. transposed: the checkpoint holds (in, out), as GPT-2's Conv1D does; only reading and writing care.
    """

    def __init__(self, weight: Weight, bias: nn.Parameter | None = None, transposed: bool = False) -> None:
        super().__init__(weight, bias)
        self.transposed = transposed

    @property
    def in_features(self) -> int:
        return self.weight.shape[-1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[-2]

    def forward(self, x: Tensor) -> Tensor:
        w, rows = self.weight, self.rounded(x)
        if isinstance(rows, QTensor):
            codes = self.codes()
            assert codes is not None
            return kernels.linear(rows, codes, self.bias)
        y = self.product(rows, self.bias)
        if w.grid is None:
            for adapter in w.adapters.values():
                y = adapter(rows, y, self) if sees_op(adapter) else adapter(rows, y)
        return y

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., in) times what is stored, or what the grid makes of the weight, plus bias: (..., out)."""
        w = self.weight
        if (codes := self.codes()) is not None:
            return kernels.linear(_autocast(x), codes, None if bias is None else _autocast(bias))
        if w.grid is None:
            return F.linear(x, w.base().to(x.dtype), bias)
        if w.factored:
            with torch.no_grad():
                value = w.value()
            y = F.linear(x, value.to(x.dtype), bias)
            for adapter in w.adapters.values():
                y = _Trained.apply(y, adapter(x.detach(), y.new_zeros(())))
            return y  # pyright: ignore[reportReturnType]
        return F.linear(x, w.value().to(x.dtype), bias)


class _Trained(torch.autograd.Function):
    """y, whose gradient goes to `added` too: what is seen of that is in y already, rounded."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, added: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad


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
        if len(added) < len(w.adapters) or (w.grid is not None and self.training):
            y, added = F.embedding(ids, w.value(), self.padding_idx), []
        elif (q := self._codes()) is not None and q.has_rows:
            y = kernels.dequantize(q.rows(ids))
        else:
            y = F.embedding(ids, w.base() if w.grid is None else w.value(), self.padding_idx)
        for adapter in added:
            y = adapter.rows(ids, y)
        return y if self.embed_scale is None else y * self.embed_scale.to(y.dtype)

    def _codes(self) -> QTensor | None:
        """The codes that rows are looked up in, beside which the adapters are."""
        w = self.weight
        if w.grid is not None:
            return w.frozen()
        return w.stored.q if isinstance(w.stored, Codes) else None


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


def round_inputs_of_codes(model: nn.Module) -> None:
    """Has inputs rounded no more where weights are neither codes nor seen through a grid: no file says so of floats."""
    for _, op in ops(model):
        if isinstance(op, RoundsInputs) and op.weight.grid is None and not isinstance(op.weight.stored, Codes):
            op.input = None
