"""GPTQ: the columns of a weight are rounded in order, each one's error made good by those that follow
(arXiv:2210.17323); then codes and scales in turn go on down the same loss."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.formats import Format
from halfbyte.kernels import proxy, second_moments
from halfbyte.kernels.half import half_products
from halfbyte.qtensor import QParams, QTensor, grid_values
from halfbyte.solvers import rtn

SAYS = "GPTQ, then descent on its loss in codes and scales"
DAMPING = 0.01  # of the mean of H's diagonal, added to it
RIDGE = 0.03  # likewise, where it is told from inputs what a block is short of
_ELEMENTS = 1 << 24  # of the rows that are solved at a time
_NEAR = 1 << 20  # of a temporary that stays in a cache
_SMALL = 128  # matrices up to which LAPACK inverts as fast
EXACT = 4096  # inputs up to which H is factored in float64; above it, that would take the most memory of all
_log = logging.getLogger("halfbyte")


def solve(
    block: nn.Module, inputs: list[Any] | None, targets: list[Tensor] | None, sites: Mapping[str, Any]
) -> dict[str, QTensor]:
    """See halfbyte.solvers.Solve. What saw no input, or has a format that is not solved for, is rounded to nearest, and
    the log says so."""
    codes, closing = opened(sites)
    if inputs and targets and closing is not None:
        codes[closing] = closed(block, inputs, targets, sites, closing, codes)[0]
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


def closed(
    block: nn.Module, inputs: list[Any], targets: list[Tensor], sites: Mapping[str, Any], closing: str,
    codes: Mapping[str, QTensor],
) -> tuple[QTensor, Tensor, float]:  # fmt: skip
    """Codes of the weight that closes, given all others', the weight that they were found for, and how much of what was
    missing that weight is trusted to make good, from 0 to 1."""
    with seen_as(sites, codes):
        w, share, form = _closed(block, inputs, targets, sites[closing])
    return quantize(w, sites[closing].format, form), w, share


@torch.no_grad()
def _closed(block: nn.Module, inputs: list[Any], targets: list[Tensor], site: Any) -> tuple[Tensor, float, Form]:
    """The weight w' of a block's closing op whose outputs bring the block's nearest to the targets, how much of what is
    missing it is trusted to make good, and the form of its inputs. With e what is missing when it is w,
    w' = w + a E[e x^T] H^-1: the correction of Qronos (arXiv:2505.11695, equation 7) for what a whole block is fed and
    loses, as far as it is found on other text too. What tells it is let go before codes are found."""
    gram, missing = _missing(block, inputs, targets, site)
    w = site.op.weight.value()
    change, share = regression(gram, missing)
    better = w + change
    del change, missing
    tokens = sum(t.shape[:-1].numel() for t in targets)
    return better.to(w.dtype), share, Form.of(gram / tokens)


def trusted(block: nn.Module, inputs: list[Any], targets: list[Tensor], site: Any) -> float:
    """How much of what a block's floats miss of the targets its closing weight would be trusted to make good."""
    return regression(*_missing(block, inputs, targets, site))[1]


@contextmanager
def seen_as(sites: Mapping[str, Any], values: Mapping[str, QTensor | Tensor]) -> Iterator[None]:
    """The named sites' weights are inside these floats, or what these codes stand for."""
    weights = {name: sites[name].op.weight for name in values}
    floats = {name: w.stored for name, w in weights.items()}
    try:
        for name, w in weights.items():
            v = values[name]
            w.store((proxy.values(v) if isinstance(v, QTensor) else v).to(w.dtype))
        yield
    finally:
        for name, w in weights.items():
            w.store(floats[name])


@torch.no_grad()
def _missing(block: nn.Module, inputs: list[Any], targets: list[Tensor], site: Any) -> tuple[Tensor, Tensor]:
    """What regression is told: sums of x x^T (in, in) of what the site is fed, and of e x^T (2, out, in) over either
    half of the text, e what the block's outputs are short of the targets."""
    fed: list[Tensor] = []
    outs, ins = site.op.weight.shape
    gram, missing = torch.zeros(ins, ins), torch.zeros(2, outs, ins)
    handle = site.op.register_forward_pre_hook(lambda m, args: fed.append(args[0]))
    try:
        for call, target in zip(inputs, targets, strict=True):
            e = (target - call(block)).flatten(0, -2).float()
            x = fed.pop().flatten(0, -2).float()
            with half_products(call.half):
                second_moments.add(gram, x)
                for part, e_part, x_part in zip(missing, e.tensor_split(2), x.tensor_split(2), strict=True):
                    part.addmm_(e_part.T, x_part)
    finally:
        handle.remove()
    second_moments.mirror(gram)
    return gram, missing


def regression(gram: Tensor, missing: Tensor) -> tuple[Tensor, float]:
    """Of what is missing on inputs (2, out, in), its sums with them over either half of the text: (out, in), as much of
    it as is to be trusted, and how much that is. With a ridge, which leaves float32 enough.

    That is by how much what one half says best serves the other, and so what both say, with half the noise, would
    serve. Either half's inputs are taken to have half the form of all, so that one factor does: with h = gram + d and
    c h = m, what the change c that one half asks for costs on the other's inputs, c gram c^T, is c m^T - d c c^T.
    """
    h = gram.clone()
    d = _damp(h, RIDGE)
    torch.linalg.cholesky(h, out=h)
    change = torch.cholesky_solve(missing.flatten(0, 1).T, h).T.unflatten(0, missing.shape[:2])
    gained = (change * missing.flip(0)).sum().item()
    spent = ((change * missing).sum() - d * change.square().sum()).item()
    half = min(1.0, max(0.0, gained / spent)) if spent > 0 else 0.0
    share = 2 * half / (1 + half)
    return change.sum(0).mul_(share), share


@dataclass(frozen=True)
class Form:
    """A loss's quadratic form. h: float32 (in, in), with damping on its diagonal, and 1 there for an input that was
    always 0. order: (in,), of columns, the largest of the diagonal first. factor: float32 (in, in), lower, L with
    L L^T = H^-1, both in that order."""

    h: Tensor
    order: Tensor
    factor: Tensor

    @classmethod
    def of(cls, gram: Tensor, damping: float = DAMPING) -> Form:
        """Of the mean of x x^T, (in, in)."""
        h = gram.float().clone()
        _damp(h, damping)
        order = h.diagonal().argsort(descending=True)
        return cls(h, order, _factor(h, order))


def _damp(h: Tensor, share: float) -> float:
    """Adds to h's diagonal that share of its mean, or 1 where all inputs were 0; says how much that is."""
    mean = h.diagonal().mean().item()
    added = share * mean if mean > 0 else 1.0
    h.diagonal().add_(added)
    return added


def _factor(h: Tensor, order: Tensor) -> Tensor:
    """See Form. With R the other way round R H R = C C^T, so that L = R C^-T R: H is not inverted."""
    backward = order.flip(0)
    c = h[backward[:, None], backward]
    c = c.double() if len(h) <= EXACT else c
    torch.linalg.cholesky(c, out=c)
    _invert(c)
    return c.T.flip(0, 1).float().contiguous()


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
