"""GPTQ: the columns of a weight are rounded in order, each one's error made good by those that follow
(arXiv:2210.17323); then codes and scales in turn go on down the same loss."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.formats import Format
from halfbyte.kernels import proxy, second_moments
from halfbyte.qtensor import QParams, QTensor, grid_values
from halfbyte.solvers import rtn
from halfbyte.solvers.closing import Part, missing, parts, regression, seen_as

SAYS = "GPTQ, then descent on its loss in codes and scales"
DAMPING = 0.01  # of the mean of H's diagonal, added to it
_ELEMENTS = 1 << 24  # of the rows that are solved at a time
_NEAR = 1 << 20  # of a temporary that stays in a cache
_SMALL = 128  # matrices up to which LAPACK inverts as fast
_log = logging.getLogger("halfbyte")


def solve(
    block: nn.Module, inputs: list[Any] | None, targets: list[Tensor] | None, sites: Mapping[str, Any]
) -> dict[str, QTensor]:
    """See halfbyte.solvers.Solve. What saw no input, or has a format that is not solved for, is rounded to nearest, and
    the log says so."""
    codes, last = opened(sites)
    if inputs and targets and last is not None:
        site = sites[last]
        with seen_as({name: s.op for name, s in sites.items()}, codes):
            site.left.extend(parts(block, inputs, site.op))
        codes[last], _, _ = closed(site.left, targets, site)
    return codes


def opened(sites: Mapping[str, Any]) -> tuple[dict[str, QTensor], str | None]:
    """Codes of all weights but the one that closes, and the name of that one."""
    out: dict[str, QTensor] = {}
    alike: dict[int, list[str]] = {}  # by their moments: what is fed the same
    closing = None
    for name, site in sites.items():
        f, gram = site.format, site.moments and site.moments.gram
        blind = gram is None and not site.closes
        why = proxy.refuses(f, tuple(site.op.weight.shape)) or ("it saw no input" if blind else None)
        if why is not None:
            _log.warning("%s is rounded to nearest: %s", name, why)
            out[name] = rtn.quantize(site.op.weight.value(), f)
        elif site.closes:
            closing = name
        else:
            alike.setdefault(id(gram), []).append(name)
    for names in alike.values():
        form = Form.of(sites[names[0]].moments.gram)
        for name in names:
            out[name] = quantize(sites[name].op.weight.value(), sites[name].format, form)
    return out, closing


def closed(left: list[Part], targets: list[Tensor], site: Any) -> tuple[QTensor, Tensor, float]:
    """Codes of the weight that closes a block, given what is left of its outputs without it, the weight that they were
    found for, and how much of what is missing that weight is trusted to make good, from 0 to 1."""
    w, share, form = _better(left, targets, site.op)
    return quantize(w, site.format, form), w, share


@torch.no_grad()
def _better(left: list[Part], targets: list[Tensor], op: Any) -> tuple[Tensor, float, Form]:
    """The weight w' of a block's closing op whose outputs bring the block's nearest to the targets, how much of what is
    missing it is trusted to make good, and the form of its inputs. With e what is missing when it is w,
    w' = w + a E[e x^T] H^-1: the correction of Qronos (arXiv:2505.11695, equation 7) for what a whole block is fed and
    loses, as far as it is found on other text too. What tells it is let go before codes are found."""
    gram, short = missing(left, targets, op)
    w = op.weight.value()
    change, share = regression(gram, short)
    better = (w + change).to(w.dtype)
    del change, short
    return better, share, Form.taking(gram.div_(sum(t.shape[:-1].numel() for t in targets)))


@dataclass(frozen=True)
class Form:
    """A loss's quadratic form. h: float32 (in, in), with damping on its diagonal, and 1 there for an input that was
    always 0. order: (in,), of columns, the largest of the diagonal first. factor: float32 (in, in), lower, L with
    L L^T = H^-1, both in that order."""

    h: Tensor
    order: Tensor
    factor: Tensor

    @classmethod
    def of(cls, gram: Tensor) -> Form:
        """Of the mean of x x^T, (in, in)."""
        return cls.taking(gram.float().clone())

    @classmethod
    def taking(cls, h: Tensor) -> Form:
        """Of the mean of x x^T, float32 (in, in), which becomes the form's own: one matrix less to hold."""
        second_moments.damp(h, DAMPING)
        order = h.diagonal().argsort(descending=True)
        return cls(h, order, _factor(h, order))


def _factor(h: Tensor, order: Tensor) -> Tensor:
    """See Form. With R the other way round R H R = C C^T, so that L = R C^-T R: H is not inverted. Damping leaves
    float32 enough: what codes lose is what they lose by float64, to 1e-3 of it."""
    backward = order.flip(0)
    c = h[backward[:, None], backward]
    torch.linalg.cholesky(c, out=c)
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


def quantize(w: Tensor, f: Format, form: Form) -> QTensor:
    """w (out, in) in a format, the loss (w - q) H (w - q)^T made small; some rows at a time, where they are many."""
    step = len(w) if f.flat or f.group == "tensor" else max(1, _ELEMENTS // w.shape[1])
    return QTensor.stacked([_quantize(part, f, form) for part in w.split(max(1, step))])


def _quantize(w: Tensor, f: Format, form: Form) -> QTensor:
    p = rtn.weighed(w, f, form.h.diagonal())
    q = proxy.in_order(w, f, p, form.factor, form.order)
    q = proxy.descend(w, q, form.h)
    return proxy.descend(w, refitted(w, q, form.h), form.h) if fits(f) else q


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
    step = max(1, _NEAR // max(inputs, ((1 + added) * groups) ** 2))
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
    k = len(basis) * groups
    a = torch.empty(rows, len(basis), groups, len(basis), groups, dtype=torch.float64)
    for g in range(groups):
        there = h[g * n : (g + 1) * n, g * n :]
        for i, part in enumerate(basis):
            seen = (part[:, g] @ there).reshape(rows, groups - g, n)
            for j, other in enumerate(basis):
                products = (seen * other[:, g:]).sum(-1)
                a[:, i, g, j, g:] = products
                a[:, j, g:, i, g] = products
    wanted = (w @ h).reshape(rows, groups, n)
    b = torch.cat([(wanted * part).sum(-1) for part in basis], 1).double()
    a = a.reshape(rows, k, k)
    diagonal = a.diagonal(dim1=1, dim2=2)
    diagonal += 1e-6 * diagonal.mean(1, keepdim=True) + 1e-30  # groups of zeros alone
    return torch.linalg.solve(a, b).float().reshape(rows, len(basis), groups)
