"""Quantize, dequantize, fake-quantize, multiply: what is done with a format's bytes.

One function a job; the fastest kernel that can serve a call does: C++ on the CPU, else the reference in torch. Which
one it is and why, `served_by` tells; a call that the fast ones refuse is logged, once a reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from halfbyte.formats import Format, parse
from halfbyte.kernels import compiled, cpu, elementwise, products, reference
from halfbyte.kernels.search import SEARCHES
from halfbyte.kernels.search import qparams as _qparams
from halfbyte.qtensor import QParams, QTensor, grouped

__all__ = [
    "SEARCHES",
    "dequantize",
    "fake",
    "linear",
    "linear_grad",
    "machine",
    "qparams",
    "quantize",
    "served_by",
    "using",
]


def qparams(w: Tensor, format: str | Format, how: str | None = None, weight: Tensor | None = None) -> QParams:
    """Scale and zero point of w in a format; see halfbyte.kernels.search.qparams for `how` and `weight`."""
    f = parse(format)
    if elementwise.finds(f, how or f.search) and _fast("qparams", w):
        return elementwise.qparams(w, f, how, weight)
    return _qparams(w, f, how, weight)


def quantize(w: Tensor, format: str | Format, qparams: QParams | None = None) -> QTensor:
    """w (..., out, in), any float dtype, rounded to the nearest values of a format.

    qparams: scale and zero point; left out, the format's default search finds them (no data needed).
    Raises InputError for an unknown format, a group that does not divide the inputs, NaN or infinity.
    """
    return (elementwise if _fast("quantize", w) else reference).quantize(w, parse(format), qparams)


def dequantize(q: QTensor) -> Tensor:
    """The tensor q stands for, in the dtype of its source; differentiable in scales, and zeros that are added, which
    require a gradient."""
    scale, zero = q.parts["scale"], q.parts.get("zero")
    learned = [t for t in (scale, zero) if isinstance(t, Tensor) and t.requires_grad]
    if learned and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Dequantize.apply(scale, zero, q)  # pyright: ignore[reportReturnType]
    if isinstance(q.laid_out, cpu.Tiled) and cpu.on and q.dtype in cpu.DTYPES:
        return q.laid_out.dequantize(q.dtype)
    return elementwise.dequantize(q) if _fast("dequantize", q) else q.dequantize()


def fake(w: Tensor, format: str | Format, qparams: QParams | None = None) -> Tensor:
    """dequantize(quantize(w, format, qparams)), bit for bit, with a gradient: straight through for w, LSQ's for
    the scale and zero of `qparams` where those require one."""
    return (elementwise if _fast("fake", w) else reference).fake(w, parse(format), qparams)


def _fast(job: str, x: Tensor | QTensor) -> bool:
    """Whether C++ does an element-wise job on x. A graph that torch.compile makes keeps torch's ops, to fuse them."""
    if torch.compiler.is_compiling():
        return False
    why = elementwise.refuses(job, x)
    if why is not None and (cpu.on or cpu.absent()):
        products.fall_back(f"torch does {job}: {why}")
    return why is None


def linear(x: Tensor | QTensor, q: QTensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times the transposed q (out, in), plus bias, in x's dtype; differentiable in x and bias.

    x may be a QTensor of 8-bit integers with scales by rows (tokens) or groups of them: its codes are then
    multiplied with q's, in integers, and nothing but the sums is rounded. The first call may lay out q's bytes
    anew (`q.layout`); later ones find them so.
    """
    if isinstance(x, Tensor):
        if torch.compiler.is_compiling():
            return compiled.linear(x, q, bias)
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            return _Linear.apply(x, q, bias)  # pyright: ignore[reportReturnType]
        if (kernel := products.ready(x, q)) is not None:  # the shortest way: small products take as long as their call
            return kernel.linear(x, bias)
    return products.linear(x, q, bias)


def linear_grad(dy: Tensor, q: QTensor) -> Tensor:
    """dy (..., out) times q (out, in): the gradient that `linear` passes to x."""
    return products.linear_grad(dy, q)


class _Dequantize(torch.autograd.Function):
    """w = s v + z, of which nothing is kept but the codes: ds = sum of v dw over a group, dz = sum of dw."""

    @staticmethod
    def forward(ctx, scale: Tensor, zero: Tensor | None, q: QTensor) -> Tensor:
        ctx.q = q
        with torch.no_grad():
            return dequantize(q)

    @staticmethod
    def backward(ctx, grad: Tensor):
        q = ctx.q
        scale, zero = q.parts["scale"], q.parts.get("zero")
        added = q.format.zero not in (None, "integer")
        ones = {"scale": torch.ones_like(scale), **({"zero": torch.zeros_like(zero)} if added else {})}
        values = dequantize(replace(q.with_tensors({**q.tensors(), **ones}), dtype=torch.float32))
        rows = grouped(grad.float(), q.format)
        dscale = (rows * grouped(values, q.format)).sum(1).reshape(scale.shape).to(scale.dtype)
        dzero = rows.sum(1).reshape(zero.shape).to(zero.dtype) if added else None
        return dscale, dzero, None


class _Linear(torch.autograd.Function):
    """Keeps no copy of the weight: backward multiplies with the codes again."""

    @staticmethod
    def forward(ctx, x: Tensor, q: QTensor, bias: Tensor | None) -> Tensor:
        ctx.q = q
        return products.linear(x, q, bias)

    @staticmethod
    def backward(ctx, dy: Tensor):
        dx = products.linear_grad(dy, ctx.q) if ctx.needs_input_grad[0] else None
        db = dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return dx, None, db


@contextmanager
def using(isa: str) -> Iterator[None]:
    """Calls inside are served by one instruction set's kernels, or by torch's with "reference", whose products are
    those of a model with dequantized weights bit for bit. Raises InputError for one that does not run here."""
    before = cpu.use(isa)
    try:
        yield
    finally:
        cpu.use(before)


def served_by(q: QTensor | None = None) -> dict[str, str]:
    """Which kernel serves each job, and why a faster one does not: in general, or for products with q."""
    why = cpu.missing() if q is None else cpu.refuses(q)
    fast = f"C++ ({cpu.isa()})"
    products = "torch, with the weight dequantized" + (f": {why}" if why else "")
    if why is None:
        products = fast if q is not None else f"{fast}: {cpu.SERVES}; others: {products}"
    absent = cpu.missing()
    others = fast if absent is None else f"torch: {absent}"
    jobs = dict.fromkeys(("quantize", "dequantize", "fake"), others)
    return jobs | {"linear": products, "linear_grad": products}


def machine() -> dict[str, str]:
    """What the kernels run on: the instruction set in use, those that could be, and whose threads."""
    threads = cpu.thread_source()
    return {"instruction_set": cpu.isa(), "choices (HALFBYTE_ISA)": ", ".join(cpu.isas()), "threads": threads}
