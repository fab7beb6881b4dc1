"""The quadratic form of a loss, as it is put to use: a factor of its inverse."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.errors import InputError
from halfbyte.kernels import second_moments

DAMPING = 0.01  # of the mean of the diagonal, added to it
_MOST = 1e4  # times that, beyond which it is no form of inputs
_SMALL = 128  # matrices up to which LAPACK inverts as fast
_log = logging.getLogger("halfbyte")


@dataclass(frozen=True)
class Form:
    """h: float32 (in, in), the mean of x x^T with `damping` on its diagonal. order: (in,), of columns, the largest of
    the diagonal first. factor: float32 (in, in), lower, L with L L^T = h^-1, both in that order."""

    h: Tensor
    damping: float
    order: Tensor
    factor: Tensor

    @classmethod
    def of(cls, gram: Tensor, name: str = "a weight") -> Form:
        """Of the mean of x x^T, (in, in). name: of what is fed them."""
        return cls.taking(gram.float().clone(), name)

    @classmethod
    def taking(cls, h: Tensor, name: str = "a weight") -> Form:
        """Of the mean of x x^T, float32 (in, in), which becomes the form's own: one matrix less to hold. Where it is
        not positive definite, as float32 has it, it is damped ten times as much until it is, and the log says so.
        Raises InputError for NaN and infinity."""
        if not h.diagonal().isfinite().all():
            raise InputError(f"the inputs of {name} hold NaN or infinity on the calibration text, or their squares do.")
        least = damping = second_moments.damp(h, DAMPING)
        order = h.diagonal().argsort(descending=True)
        while (factor := _factor(h, order)) is None:
            if damping > _MOST * least:
                raise InputError(f"the inputs of {name} have no second moments that can be factored.")
            h.diagonal().add_(9 * damping)
            damping *= 10
        if damping > least:
            more = DAMPING * damping / least
            _log.warning("%s: its Hessian is positive definite with %g of the diagonal's mean added to it", name, more)
        return cls(h, damping, order, factor)

    def solved(self, m: Tensor) -> Tensor:
        """m h^-1, of m (..., in)."""
        return (m[..., self.order] @ self.factor @ self.factor.T)[..., self.order.argsort()]


def _factor(h: Tensor, order: Tensor) -> Tensor | None:
    """See Form; None where there is none. With R the other way round R h R = C C^T, so that L = R C^-T R: h is not
    inverted. Damping leaves float32 enough: what codes lose is what they lose by float64, to 1e-3 of it."""
    backward = order.flip(0)
    c = h[backward[:, None], backward]
    failed = torch.empty((), dtype=torch.int32)
    torch.linalg.cholesky_ex(c, out=(c, failed))
    if failed:
        return None
    _invert(c)
    return c.T.flip(0, 1).contiguous()


def _invert(lower: Tensor) -> None:
    """In place. By halves, so that most of it are products of matrices: half the time of solving for the identity."""
    n = len(lower)
    if n <= _SMALL:
        lower.copy_(torch.linalg.solve_triangular(lower, torch.eye(n, dtype=lower.dtype), upper=False))
        return
    left, right = slice(n // 2), slice(n // 2, n)
    _invert(lower[left, left])
    _invert(lower[right, right])
    lower[right, left] = -lower[right, right] @ (lower[right, left] @ lower[left, left])
