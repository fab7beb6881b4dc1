"""What rounding a weight costs the model, before anything is rounded: from one backward pass a row of text.

To second order the mean KL of a changed model to the float one is 1/2 E <G, dW>^2, summed over its weights, by tokens:
G is the gradient of the log-probability of tokens that the model itself draws (the Fisher information), over a row of
text. Errors of rounding are as good as independent, so that only squares are left,

    KL = 1/2 sum_ij F_ij dW_ij^2,      F_ij = E G_ij^2,   G_ij = sum over a row's tokens of g_i x_j

with x what an op is fed and g the gradient at what it gives. The sum is squared, not its terms: an input that is much
the same for all tokens makes the same error at each, and attention adds these up. (On SmolLM2 the sum of squares
predicts a third of what rounding v_proj costs; see docs/bits.md.) F is kept as a row and a column of means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte import kernels
from halfbyte.data import Batch
from halfbyte.errors import InputError
from halfbyte.feed import own_words
from halfbyte.formats import Format
from halfbyte.layers import Embedding, Linear, Op, ops

_ELEMENTS = 1 << 24  # of a gradient that are there at a time
ROWS = 256  # of a weight that are rounded to tell what all of them lose


@dataclass(frozen=True)
class Fisher:
    """Of one op: rows, float32 (out,), times columns, float32 (in,), is the expected information of its weight for a
    token of text. squares: mean squares of the op's inputs, (in,), which a solver weighs by; None of a look-up."""

    rows: Tensor
    columns: Tensor
    squares: Tensor | None = None


def fishers(
    model: nn.Module,
    batches: list[Batch],
    seed: int = 0,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Fisher]:
    """By op's name, tied ones under each of theirs: of every Linear and Embedding that the batches reach. The model's
    weights are floats, all there. What is kept beside them are the activations of one batch.

    The labels are drawn from the model's own distribution by a generator of `seed`, so that the result depends on
    model, batches and seed alone. Raises InputError for a gradient that is not finite.
    """
    by_name = {n: op for n, op in ops(model) if isinstance(op, Linear | Embedding)}
    sums, tokens = {n: _Sums(op) for n, op in by_name.items()}, 0
    generator = torch.Generator().manual_seed(seed)
    asked = {n: p.requires_grad for n, p in model.named_parameters()}
    handles = [op.register_forward_hook(partial(_look, sums[n])) for n, op in by_name.items()]
    model.eval().requires_grad_(False)
    try:
        with torch.enable_grad():
            for i, batch in enumerate(batches):
                logits = model(**batch.inputs).logits[:, :-1]
                logits = logits[batch.labels[:, 1:] != -100]
                own_words(logits, generator).sum().backward()
                tokens += len(logits)
                on_batch(i + 1, len(batches))
    finally:
        for handle in handles:
            handle.remove()
        for n, p in model.named_parameters():
            p.requires_grad_(asked[n])
    return {n: s.fisher(n, tokens) for n, s in sums.items() if s.count}


class Usual:
    """What is taken of a weight that the text never reached: the mean information of all others, evenly."""

    def __init__(self, seen: Iterable[Fisher]) -> None:
        means = [s.columns.mean() for s in seen]
        self.mean = float(torch.stack(means).mean()) if means else 0.0

    def of(self, w: Tensor) -> Fisher:
        return Fisher(torch.ones(w.shape[0]), torch.full((w.shape[1],), self.mean))


class _Sums:
    """Of an op over rows of text: means of G^2 by row and by column, and of the squares of its inputs."""

    def __init__(self, op: Op) -> None:
        out, inputs = op.weight.shape
        self.lookup = isinstance(op, Embedding)
        self.rows, self.columns, self.squares = torch.zeros(out), torch.zeros(inputs), torch.zeros(inputs)
        self.count = 0

    @torch.no_grad()
    def add(self, x: Tensor, g: Tensor) -> None:
        """x: what an op was given for one row of text, tokens' ids or (..., in); g (..., out): the gradient of what it
        made of it."""
        g = g.reshape(-1, g.shape[-1]).float()
        self.count += len(g)
        if self.lookup:
            ids, at = x.reshape(-1).unique(return_inverse=True)
            squared = g.new_zeros(len(ids), g.shape[1]).index_add_(0, at, g).square()
            self.rows[ids] += squared.mean(1)
            self.columns += squared.sum(0) / len(self.rows)
            return
        x = x.reshape(-1, x.shape[-1]).float()
        self.squares += x.square().sum(0)
        step = max(1, _ELEMENTS // x.shape[1])
        for i in range(0, g.shape[1], step):
            squared = (g[:, i : i + step].T @ x).square_()
            self.rows[i : i + step] += squared.mean(1)
            self.columns += squared.sum(0) / len(self.rows)

    def fisher(self, name: str, tokens: int) -> Fisher:
        """The means. The product's own mean is that of F: rows are scaled to have a mean of 1."""
        rows, columns = self.rows / self.rows.mean().clamp(min=1e-30), self.columns / max(1, tokens)
        if not (rows.isfinite().all() and columns.isfinite().all()):
            raise InputError(f"the gradient at {name} holds NaN or infinity on the calibration text.")
        return Fisher(rows, columns, None if self.lookup else self.squares / self.count)


def _look(sums: _Sums, _: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
    x = args[0].detach()
    if not y.requires_grad:  # the first op on the way: gradients are asked for from here on
        y = y.detach().requires_grad_(True)
    y.register_hook(partial(sums.add, x))
    return y


@torch.no_grad()
def losses(w: Tensor, seen: list[Fisher], formats: Mapping[str, Format]) -> dict[str, float]:
    """The predicted mean KL of rounding a weight w (out, in) to each format, nearest values and scales weighed by what
    is fed. seen: of every op that has the weight. Of many rows a share is rounded."""
    some = slice(0, None, max(1, len(w) // ROWS))
    part = w[some].float()
    squares = next((f.squares for f in seen if f.squares is not None), None)
    out = {}
    for name, f in formats.items():
        q = kernels.quantize(part, f, None if squares is None else kernels.qparams(part, f, "mse", squares))
        error = (q.dequantize() - part).square()
        out[name] = sum(_loss(error, s.rows, s.rows[some], s.columns) for s in seen)
    return out


def _loss(error: Tensor, rows: Tensor, some: Tensor, columns: Tensor) -> float:
    """Of squared errors of some rows: as much of all."""
    each = (error @ columns).double()
    weight = some.double() if some.sum() > 0 else torch.ones_like(each)
    return 0.5 * float(rows.double().sum() * (weight @ each) / weight.sum())
