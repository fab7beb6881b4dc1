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
from halfbyte.solvers.closing import Part, missing, parts, regression, seen_as
from halfbyte.solvers.form import Form

SAYS = "GPTQ, then descent on its loss in codes and scales"
_ELEMENTS = 1 << 24  # of the rows that are solved at a time
_NEAR = 1 << 20  # of a temporary that stays in a cache
_log = logging.getLogger("halfbyte")


def solve(
    block: nn.Module, inputs: list[Any] | None, targets: list[Tensor] | None, sites: Mapping[str, Any]
) -> dict[str, QTensor]:
    """See halfbyte.solvers.Solve. What saw no input, or has a format that is not solved for, is rounded to nearest, and
    the log says so."""
    codes, last = _opened(sites)
    if inputs and targets and last is not None:
        site = sites[last]
        if not site.left:
            with seen_as({name: s.op for name, s in sites.items()}, codes):
                site.left.extend(parts(block, inputs, site.op))
        codes[last], better, _ = closed(site.left, targets, site, last)
        site.meant[:] = [better]
    return codes


def _opened(sites: Mapping[str, Any]) -> tuple[dict[str, QTensor], str | None]:
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
        form = Form.of(sites[names[0]].moments.gram, names[0])
        for name in names:
            out[name] = quantize(sites[name].op.weight.value(), sites[name].format, form)
    return out, closing


@torch.no_grad()
def closed(left: list[Part], targets: list[Tensor], site: Any, name: str) -> tuple[QTensor, Tensor, float]:
    """Codes of the weight that closes a block, given what is left of its outputs without it, the weight that they were
    found for, and how much of what is missing that weight is trusted to make good, from 0 to 1. With e what is missing
    when it is w, they are found for w' = w + a E[e x^T] H^-1: the correction of Qronos (arXiv:2505.11695, equation 7)
    for what a whole block is fed and loses, as far as it is found on other text too."""
    form, short = missing(left, targets, site.op, name)
    w = site.op.weight.value()
    change, share = regression(form, short, left[0].half)
    better = (w + change).to(w.dtype)
    del change, short  # before codes are found
    return quantize(better, site.format, form), better, share


def quantize(w: Tensor, f: Format, form: Form) -> QTensor:
    """w (out, in) in a format, the loss (w - q) H (w - q)^T made small; some rows at a time, where they are many."""
    step = len(w) if f.flat or f.group == "tensor" else max(1, _ELEMENTS // w.shape[1])
    return QTensor.stacked([_quantize(part, f, form) for part in w.split(max(1, step))])


def _quantize(w: Tensor, f: Format, form: Form) -> QTensor:
    p = rtn.weighed(w, f, form.h.diagonal())
    q = proxy.in_order(w, f, p, form.factor, form.order)
    q, gradient = proxy.descend(w, q, form.h)
    return proxy.descend(w, refitted(q, gradient, form.h), form.h)[0] if fits(f) else q


def fits(f: Format) -> bool:
    """Whether scales can be fitted to codes: they are floats, a row's own."""
    return not isinstance(f.scale, Format) and f.scale != "float8_e8m0fnu" and f.group != "tensor" and not f.flat


def refitted(q: QTensor, gradient: Tensor, h: Tensor) -> QTensor:
    """q with the scales (and zeros that are added) that have the least loss for its codes. gradient: (q - w) H."""
    f, (out, inputs) = q.format, q.shape
    p = q.qparams
    groups = p.scale.shape[-1]
    integer = None if p.zero is None or f.zero != "integer" else p.zero.reshape(-1, 1)
    v = grid_values(q.codes.reshape(out * groups, -1), f, integer).reshape(out, groups, -1)
    added = p.zero is not None and integer is None
    step = max(1, _NEAR // max(inputs, ((1 + added) * groups) ** 2))
    less = torch.cat([_least_squares(gradient[i : i + step], v[i : i + step], added, h) for i in range(0, out, step)])
    less.nan_to_num_(0, 0, 0)
    scale = p.scale - less[:, 0]
    zero = p.zero - less[:, 1] if added and p.zero is not None else p.zero
    return proxy.with_qparams(q, QParams(torch.where(scale == 0, p.scale, scale), zero))


def _least_squares(gradient: Tensor, v: Tensor, added: bool, h: Tensor) -> Tensor:
    """How much less scales, and zeros that are added, are of rows with a gradient (rows, in), whose grid values are v
    (rows, groups, n): (rows, 1 or 2, groups).

    A row is a sum of k vectors, each group's grid values (and its ones) with 0 elsewhere, times what is sought. With
    their products through H, A, and those of the gradient with each, b, a step x changes the loss by x A x - 2 x b.
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
    b = torch.cat([(gradient.reshape(rows, groups, n) * part).sum(-1) for part in basis], 1).double()
    a = a.reshape(rows, k, k)
    diagonal = a.diagonal(dim1=1, dim2=2)
    diagonal += 1e-6 * diagonal.mean(1, keepdim=True) + 1e-30  # groups of zeros alone
    return torch.linalg.solve(a, b).float().reshape(rows, len(basis), groups)
