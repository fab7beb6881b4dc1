"""Sums of x x^T over tokens, by panels of columns: what lies below the diagonal's blocks is not multiplied."""

from __future__ import annotations

from torch import Tensor

PANEL = 384  # columns at a time: of 1536, five eighths of the products are left


def add(total: Tensor, x: Tensor) -> None:
    """Adds x^T x to `total`, float32 (in, in), of x, float32 (tokens, in): to its blocks on and above the diagonal."""
    for i in range(0, len(total), PANEL):
        total[i : i + PANEL, i:].addmm_(x[:, i : i + PANEL].T, x[:, i:])


def mirror(total: Tensor) -> Tensor:
    """`total` itself, with what `add` left out, from the other side of the diagonal."""
    for i in range(0, len(total), PANEL):
        total[i + PANEL :, i : i + PANEL] = total[i : i + PANEL, i + PANEL :].T
    return total


def damp(total: Tensor, share: float) -> float:
    """Adds to the diagonal of `total` that share of its mean, or 1 where all inputs were 0; says how much that is."""
    mean = total.diagonal().mean().item()
    added = share * mean if mean > 0 else 1.0
    total.diagonal().add_(added)
    return added
