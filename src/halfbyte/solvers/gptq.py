"""GPTQ: the columns of a weight are rounded in order, each one's error made good by those that follow
(arXiv:2210.17323); then codes and scales in turn go on down the same loss."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.formats import Format
from halfbyte.kernels import proxy
from halfbyte.qtensor import QParams, QTensor, grid_values
from halfbyte.solvers import rtn

SAYS = "GPTQ, then descent on its loss in codes and scales"
DAMPING = 0.01  # of the mean of H's diagonal, added to it
ROUNDS = 2
_ELEMENTS = 1 << 24  # of the largest temporary while scales are fitted
_log = logging.getLogger("halfbyte")


def solve(
    block: nn.Module, inputs: list[Any] | None, targets: list[Tensor] | None, sites: Mapping[str, Any]
) -> dict[str, QTensor]:
    """See halfbyte.solvers.Solve. What saw no input, or has a format that is not solved for, is rounded to nearest, and
    the log says so."""
    out = {}
    for name, site in sites.items():
        w, f, gram = site.op.weight.value(), site.format, site.moments and site.moments.gram
        why = proxy.refuses(f, tuple(w.shape)) or ("it saw no input" if gram is None else None)
        if gram is None or why is not None:
            _log.warning("%s is rounded to nearest: %s", name, why)
            out[name] = rtn.quantize(w, f)
        else:
            out[name] = quantize(w, f, gram)
    return out


def quantize(w: Tensor, f: Format, gram: Tensor, damping: float = DAMPING, rounds: int = ROUNDS) -> QTensor:
    """w (out, in) in a format, the loss (w - q) H (w - q)^T made small, H being `gram` (in, in) with damping."""
    h = damped(gram, damping)
    p = rtn.weighed(w, f, h.diagonal())
    order = h.diagonal().argsort(descending=True)
    q = proxy.in_order(w, f, p, factor(h[order][:, order]), order)
    q = proxy.descend(w, q, h)
    for _ in range(rounds if fits(f) else 0):
        q = proxy.descend(w, refitted(w, q, h), h)
    return q


def damped(gram: Tensor, damping: float) -> Tensor:
    """H: with damping on its diagonal, and 1 there for an input that was always 0."""
    h = gram.float().clone()
    d = h.diagonal()
    mean = d.mean()
    d += damping * mean + (0 if mean > 0 else 1)
    return h


def factor(h: Tensor) -> Tensor:
    """Upper U with U^T U = H^-1, float32."""
    h = h.double()
    flipped = torch.linalg.cholesky(h.flip(0, 1))  # H = L' L'^T from the other end gives U without an inverse
    upper = flipped.flip(0, 1)
    eye = torch.eye(len(h), dtype=h.dtype)
    return torch.linalg.solve_triangular(upper, eye, upper=True).float()


def fits(f: Format) -> bool:
    """Whether scales can be fitted to codes: they are floats, a row's own."""
    return not isinstance(f.scale, Format) and f.scale != "float8_e8m0fnu" and f.group != "tensor" and not f.flat


def refitted(w: Tensor, q: QTensor, h: Tensor) -> QTensor:
    """q with the scales (and zeros that are added) that have the least loss for its codes: of every row the solution
    of as many linear equations as it has groups."""
    f, (out, inputs) = q.format, q.shape
    p = q.qparams
    groups = p.scale.shape[-1]
    integer = None if p.zero is None or f.zero != "integer" else p.zero.reshape(-1, 1)
    v = grid_values(q.codes.reshape(out * groups, -1), f, integer).reshape(out, groups, -1)
    added = p.zero is not None and integer is None
    step = max(1, _ELEMENTS // ((1 + added) * groups * inputs))
    found = torch.cat([_least_squares(w[i : i + step].float(), v[i : i + step], added, h) for i in range(0, out, step)])
    scale = torch.where(found[:, 0].isfinite() & (found[:, 0] != 0), found[:, 0], p.scale)
    return proxy.with_qparams(q, QParams(scale, found[:, 1] if added else p.zero))


def _least_squares(w: Tensor, v: Tensor, added: bool, h: Tensor) -> Tensor:
    """Scales, and zeros that are added, of rows w (rows, in), whose grid values are v (rows, groups, n):
    (rows, 1 or 2, groups).

    A row is a sum of k vectors, each group's grid values (and its ones) with 0 elsewhere, times what is sought; their
    products through H are the equations.
    """
    rows, groups, n = v.shape
    basis = [v, torch.ones_like(v)] if added else [v]
    k = groups * len(basis)
    hv = torch.stack([torch.einsum("rgn,gni->rgi", b, h.reshape(groups, n, -1)) for b in basis], 1)
    hv = hv.reshape(rows, k, groups, n)
    a = torch.stack([(hv * b[:, None]).sum(-1) for b in basis], 2).reshape(rows, k, k).double()
    b = (hv.reshape(rows, k, -1) @ w[:, :, None])[..., 0].double()
    diagonal = a.diagonal(dim1=1, dim2=2)
    diagonal += 1e-6 * diagonal.mean(1, keepdim=True) + 1e-30  # groups of zeros alone
    return torch.linalg.solve(a, b).float().reshape(rows, len(basis), groups)
