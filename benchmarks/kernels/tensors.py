"""The kernels that make tensors of tensors: quantize, dequantize and fake, beside the machine's copy and the peers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from contest import Plan, attempt, clones, error, exact, quantized
from peers import CODECS, Codec
from race import Contender
from report import Board
from torch import Tensor

from halfbyte import kernels
from halfbyte.formats import parse
from halfbyte.kernels import reference
from halfbyte.qtensor import QTensor

# Which formats a peer's codec is compared with, by what it is like.
LIKE = {
    "int4-g128": "int4",
    "uint4-g128": "int4",
    "q4_0": "int4",
    "q4_k": "int4",
    "int8-channel": "int8",
    "nf4-g64": "nf4",
}
CODED = (*LIKE, "int3-g64", "fp8-e4m3-channel")
FAKED = ("int4-g128", "nf4-g64", "int8-channel")
# One rounding to bfloat16 makes 0.0017; in float32 only the order of two operations may differ.
TOLERANCE = {torch.bfloat16: 2**-8, torch.float32: 1e-6}
ROWS = 256  # of the quantized tensor, which are compared with the reference's bit for bit


def coded(w: Tensor, format: str) -> Tensor:
    """The first rows as the reference quantizes them: the definition, in float32."""
    part = w[:ROWS]
    return exact(reference.quantize(part, parse(format), kernels.qparams(part, format, "minmax")))


def codecs(board: Board, where: str) -> dict[str, Codec]:
    """The peers that are there."""
    found = {name: attempt(board, name, where, "peer", make) for name, make in CODECS.items()}
    return {name: codec for name, codec in found.items() if codec}


def same(board: Board, name: str, where: str, do: Callable[[], tuple[Tensor, Tensor]]) -> bool:
    """Whether do() gives two tensors that are equal, bit for bit; a note says why not."""
    pair = attempt(board, name, where, "halfbyte", do)
    if pair is None or torch.equal(*pair):
        return pair is not None
    differ = int((pair[0] != pair[1]).sum())
    board.note("wrong", name, f"{differ} of {pair[0].numel()} values are not the reference's", where)
    return False


def close(board: Board, q: QTensor, qs: list[QTensor], where: str) -> float | None:
    """The error of dequantizing, after each copy was warmed up; None, with a note, where it is too large."""

    def off() -> float:
        return error([kernels.dequantize(one) for one in qs for _ in range(2)][-1], exact(q).double())

    found, most = attempt(board, q.format.name, where, "halfbyte", off), TOLERANCE[q.dtype]
    if found is not None and not found <= most:
        board.note("wrong", q.format.name, f"error above {most:.1g}: {found:.2g}", where)
        return None
    return found


def codec_race(board: Board, plan: Plan, dtype: torch.dtype) -> None:
    """Both ways, bound by memory; finding scales by range is part of it, and so is the output's allocation."""
    n, kind = plan.square, str(dtype).removeprefix("torch.")
    size = n * n * dtype.itemsize
    ws = [(torch.randn(n, n) * 0.02).to(dtype) for _ in range(plan.space.copies(size))]
    space = plan.space.shared(2 * len(CODED))
    there: list[Contender] = []
    back: list[Contender] = []
    for f in CODED:

        def rows(f: str = f) -> tuple[Tensor, Tensor]:
            return exact(quantized(ws[0], f))[:ROWS], coded(ws[0], f)

        if not same(board, f, f"quantize {kind}", rows):
            continue
        q, like = quantized(ws[0], f), LIKE.get(f, f)
        nbytes = size + q.nbytes
        there.append(Contender(f, [partial(quantized, w, f) for w in ws], nbytes, "halfbyte", like))
        qs = clones(q, space.copies(q.nbytes))
        off = close(board, q, qs, f"dequantize {kind}")
        if off is not None:
            calls = [partial(kernels.dequantize, one) for one in qs]
            back.append(Contender(f, calls, nbytes, "halfbyte", like, error=off))
    for name, codec in codecs(board, "quantize").items():
        if codec.quantize is None or codec.dequantize is None:
            continue
        parts = codec.quantize(ws[0])
        nbytes = parts[0].nbytes + parts[1].nbytes
        there.append(Contender(name, [partial(codec.quantize, w) for w in ws], size + nbytes, "peer", codec.family))
        held = [copy.deepcopy(parts) for _ in range(space.copies(nbytes))]
        back_calls = [partial(codec.dequantize, *p) for p in held]
        back.append(Contender(name, back_calls, size + nbytes, "peer", codec.family))
    board.compare("quantize", f"quantize {kind}", f"{n}x{n}", 0, there, limit=board.limits.copy)
    board.compare("quantize", f"dequantize {kind}", f"{n}x{n}", 0, back, limit=board.limits.copy)


def quantize(board: Board, plan: Plan) -> None:
    for dtype in plan.dtypes:
        codec_race(board, plan, dtype)


def ours_fake(format: str) -> Callable[[Tensor], Tensor]:
    return lambda w: kernels.fake(w, format, kernels.qparams(w.detach(), format, "minmax"))


def trained(do: Callable[[Tensor], Tensor], w: Tensor, g: Tensor) -> Tensor:
    """Forward and backward."""
    return torch.autograd.grad(do(w), w, g)[0]


def seen(format: str, w: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient of the first rows, ours and the reference's."""
    part, f = w.detach()[:ROWS].clone().requires_grad_(), parse(format)
    want = reference.fake(part, f, kernels.qparams(part.detach(), f, "minmax"))
    grad = torch.autograd.grad(want, part, g[:ROWS])[0]
    do = ours_fake(format)
    return torch.cat((do(w)[:ROWS], trained(do, w, g)[:ROWS])).detach(), torch.cat((want, grad)).detach()


def fake_race(board: Board, plan: Plan, dtype: torch.dtype) -> None:
    """Quantization as training sees it: the value alone, and with the gradient of a weight that wants one."""
    n, kind = plan.square, str(dtype).removeprefix("torch.")
    size = n * n * dtype.itemsize
    ws = [(torch.randn(n, n) * 0.02).to(dtype).requires_grad_() for _ in range(plan.space.copies(size))]
    gs = [w.detach() for w in ws[1:] + ws[:1]]
    value: list[Contender] = []
    both: list[Contender] = []

    def enter(name: str, kind: str, like: str, do: Callable[[Tensor], Tensor], has_gradient: bool = True) -> None:
        value.append(Contender(name, [partial(do, g) for g in gs], 2 * size, kind, like))
        if has_gradient:
            calls = [partial(trained, do, w, g) for w, g in zip(ws, gs, strict=True)]
            both.append(Contender(name, calls, 4 * size, kind, like))

    for f in FAKED:
        if same(board, f, f"fake {kind}", partial(seen, f, ws[0], gs[0])):
            enter(f, "halfbyte", LIKE[f], ours_fake(f))
    for name, codec in codecs(board, "fake").items():
        if codec.fake:
            enter(name, "peer", codec.family, codec.fake, codec.has_gradient)
    board.compare("fake", f"fake {kind}", f"{n}x{n}", 0, value, limit=board.limits.copy)
    board.compare("fake", f"fake {kind} and gradient", f"{n}x{n}", 0, both, limit=board.limits.copy)


def fake(board: Board, plan: Plan) -> None:
    with torch.inference_mode(False), torch.enable_grad():
        for dtype in plan.dtypes:
            fake_race(board, plan, dtype)
