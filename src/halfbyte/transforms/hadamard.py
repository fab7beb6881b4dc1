"""Hadamard rotations, folded into the weights: every channel becomes a mixture of all, so that none stands out
(QuaRot, arXiv:2404.00456; SpinQuant, arXiv:2405.16406)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from halfbyte.errors import InputError
from halfbyte.transforms import folding

if TYPE_CHECKING:
    from halfbyte.models import Edge, Edges
    from halfbyte.transforms import Fed, Target

SAYS = "Hadamard rotations of the residual stream and of attention's values, folded into the weights"


def apply(
    model: nn.Module, edges: Edges, fed: Mapping[str, Fed], targets: Mapping[str, Target], seed: int
) -> dict[str, Any]:
    """See halfbyte.transforms.Apply. Raises InputError where `refuses` says so, and for a norm that leaves a channel
    nothing but its bias."""
    norms = [e for block in edges.blocks for e in block if e.norm] + [edges.final]
    _check(model, edges, norms)
    generator = torch.Generator().manual_seed(seed)
    width = folding.matrix(model, edges.embeddings[0]).shape[1]
    means = any(isinstance(model.get_submodule(e.source), nn.LayerNorm) for e in norms)
    turn = rotation(width, generator, means)
    for name in edges.embeddings:
        folding.inputs(model, name, lambda w: w @ turn.T)
    for name in edges.writers:
        folding.outputs(model, name, lambda w: turn @ w)
    for edge in norms:
        _through(model, edge, turn, edges.centered)
    for edge in (e for block in edges.blocks for e in block if e.head):
        _heads(model, edge, rotation(edge.head, generator))
    return {"width": width}


def refuses(edges: Edges) -> str | None:
    """Why the stream cannot be turned, in words; None if it can."""
    if edges.unturned is not None:
        return edges.unturned
    if edges.tied:
        return (
            "its last norm is folded into the head, which shares its weight with the embedding; --untie gives each its "
            "own, which takes the room of both"
        )
    return None


def _check(model: nn.Module, edges: Edges, norms: list[Edge]) -> None:
    if (why := refuses(edges)) is not None:
        raise InputError(f"hadamard cannot turn this model's residual stream: {why}.")
    for edge in norms:
        norm: Any = model.get_submodule(edge.source)
        if getattr(norm, "bias", None) is not None and (folding.gain(norm, edges.centered) == 0).any():
            raise InputError(
                f"hadamard cannot fold {edge.source}: one of its weights is 0, so that its bias stands alone."
            )


def _through(model: nn.Module, edge: Edge, turn: Tensor, centered: bool) -> None:
    """Readers of a norm read the turned stream, and its weight with it; the norm keeps ones, and its bias turned.

    Of W (g x + b) with the stream turned to R x they make W g R^T (R x + R (b / g))."""
    norm: Any = model.get_submodule(edge.source)
    g = folding.gain(norm, centered)
    for name in edge.readers:
        folding.inputs(model, name, lambda w: (w * g) @ turn.T)
    folding.set_gain(edge.source, norm, torch.ones_like(g), centered)
    if getattr(norm, "bias", None) is not None:
        folding.put(f"{edge.source}.bias", norm.bias, turn @ (norm.bias.double() / g))


def _heads(model: nn.Module, edge: Edge, turn: Tensor) -> None:
    folding.outputs(model, edge.source, lambda w: folding.among(w, edge.rows, lambda r: folding.by_head(r, turn)))
    for name in edge.readers:
        folding.inputs(model, name, lambda w: folding.by_head(w.T, turn).T)


def rotation(n: int, generator: torch.Generator, means: bool = False) -> Tensor:
    """A random orthogonal matrix (n, n), float64: a Hadamard matrix of signs, or, of a width that has none, the largest
    times a random small one. means: one that leaves (1, ..., 1) where it is, so that the mean of channels that a
    LayerNorm takes off stays what it was."""
    order = _order(n)
    out = _hadamard(order) / math.sqrt(order)
    if order < n:
        small = torch.randn(n // order, n // order, generator=generator, dtype=torch.float64)
        out = torch.kron(out, torch.linalg.qr(small).Q.contiguous())
    out = out * (2.0 * torch.randint(2, (n,), generator=generator) - 1)
    if not means:
        return out
    ones = torch.full((n,), n**-0.5, dtype=torch.float64)
    across = out @ ones - ones  # the mirror that has the turned ones and the ones as each other's image
    return out - torch.outer(across, across @ out) * (2 / (across @ across)) if across.norm() > 1e-9 else out


def _order(n: int) -> int:
    """The largest order of a Hadamard matrix that is made here and divides n."""
    return next(d for d in range(n, 0, -1) if n % d == 0 and _kind(d))


@cache
def _kind(n: int) -> str:
    """How a Hadamard matrix of an order is made; "" where it is not."""
    if n <= 2:
        return "" if n < 1 else "doubled"
    if n % 4:
        return ""
    if _prime(n - 1):
        return "paley"
    if _prime(n // 2 - 1) and (n // 2 - 1) % 4 == 1:
        return "paley, doubled"
    return "doubled" if _kind(n // 2) else ""


def _hadamard(n: int) -> Tensor:
    """Signs (n, n), float64, whose rows are orthogonal: by Sylvester's doubling, or Paley's squares modulo a prime."""
    kind = _kind(n)
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if kind == "doubled":
        return torch.kron(torch.tensor([[1.0, 1], [1, -1]], dtype=torch.float64), _hadamard(n // 2))
    size = n if kind == "paley" else n // 2
    core = _conference(size)
    eye = torch.eye(size, dtype=torch.float64)
    if kind == "paley":
        return core + eye
    plus, minus = torch.tensor([[[1.0, 1], [1, -1]], [[1, -1], [-1, -1]]], dtype=torch.float64)
    return torch.kron(core, plus) + torch.kron(eye, minus)


def _conference(n: int) -> Tensor:
    """(n, n) with zeros on the diagonal and signs elsewhere, C C^T = (n - 1) I, n - 1 a prime: whether i - j is a
    square."""
    q = n - 1
    sign = -torch.ones(q, dtype=torch.float64)
    sign[torch.arange(1, q) ** 2 % q] = 1
    sign[0] = 0
    out = torch.zeros(n, n, dtype=torch.float64)
    i = torch.arange(q)
    out[1:, 1:] = sign[(i[:, None] - i) % q]
    out[0, 1:] = 1
    out[1:, 0] = 1 if q % 4 == 1 else -1
    return out


def _prime(n: int) -> bool:
    return n > 2 and all(n % d for d in range(2, math.isqrt(n) + 1))
