"""halfbyte's own weights, and a contest: one weight as everybody holds it, checked, and then raced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, TypeVar

import psutil
import torch
from peers import PEERS, Entrant, Products, Weights
from race import Call, Contender
from report import Board
from torch import Tensor

from halfbyte import kernels
from halfbyte.errors import InputError
from halfbyte.formats import parse
from halfbyte.qtensor import QTensor

# A right product differs by the rounding to bfloat16 of the output, and of the dequantized weight where a kernel makes
# one: 0.001 to 0.002 each in norm. A wrong scale, zero, nibble or group makes 0.1 or more.
TOLERANCE = 1e-2
Shape = tuple[int, int]  # out, in
Found = TypeVar("Found")


class Job(NamedTuple):
    """A product to be timed: `op` (linear or linear_grad) with m rows of input."""

    op: str
    m: int


@dataclass(frozen=True)
class Space:
    """total: bytes that all copies of a weight take. most: how many copies at most; small weights meet it first."""

    total: int
    most: int = 300

    def copies(self, nbytes: float) -> int:
        return min(self.most, max(2, int(self.total / nbytes)))

    def shared(self, holders: int) -> Space:
        """The space of each where so many hold their copies at once, in two thirds of the memory that is free."""
        return replace(self, total=min(self.total, int(psutil.virtual_memory().available / 1.5 / holders)))


@dataclass
class Plan:
    """What is measured. few, many, int8: rows of inputs. square: the side of what is quantized."""

    shapes: tuple[Shape, ...] = ((4096, 4096), (11008, 4096), (2048, 2048), (576, 576), (1536, 576), (576, 1536))
    formats: tuple[str, ...] = (
        "int4-g128", "int4-g64", "int4-g32", "uint4-g128", "uint4-g32", "nf4-g64", "nf4-g64-dq", "q4_0", "q4_k",
        "int8-channel", "int8-g128",
    )  # fmt: skip
    few: tuple[int, ...] = (1, 2, 4, 8)
    many: tuple[int, ...] = (128, 512, 2048)
    int8: tuple[int, ...] = (1, 4, 512)
    square: int = 4096
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    space: Space = Space(600 << 20)


QUICK = Plan(
    shapes=((2048, 2048), (576, 576)),
    formats=("int4-g128", "int4-g64", "nf4-g64", "q4_k", "int8-channel"),
    few=(1, 4),
    many=(512,),
    square=1024,
    dtypes=(torch.bfloat16,),
    space=Space(64 << 20, 60),
)


def quantized(w: Tensor, format: str) -> QTensor:
    """By the range: how scales were found makes no difference to speed."""
    return kernels.quantize(w, format, kernels.qparams(w, format, "minmax"))


def clones(q: QTensor, copies: int) -> list[QTensor]:
    """The same in memory of its own. q must not have been multiplied with: a kernel lays it out in place."""
    assert q.layout == "canonical"
    return [q.with_tensors({k: t.clone() for k, t in q.tensors().items()}) for _ in range(copies)]


def exact(q: QTensor) -> Tensor:
    """What q's bits mean by QTensor.dequantize, the definition, without its last rounding to the source's dtype."""
    return replace(q, dtype=torch.float32).dequantize()


def family(format: str) -> str:
    return f"{parse(format).bits}-bit"


def ours(format: str, w: Tensor, copies: int) -> Weights:
    q = quantized(w, format)
    qs = clones(q, copies)

    def products(op: Callable[[Tensor, QTensor], Tensor], x: Tensor) -> Sequence[Call]:
        return [partial(op, x, one) for one in qs]

    linear, grad = partial(products, kernels.linear), partial(products, kernels.linear_grad)
    return Weights(family(format), q.nbytes, copies, exact(q), TOLERANCE, linear, grad, kind="halfbyte")


def ours_int8(format: str, ready: bool, w: Tensor, copies: int) -> Weights:
    """Inputs rounded to int8 by token: before (ready), or in every call, as FBGEMM does it."""
    q = quantized(w, format)
    qs = clones(q, copies)

    def rounded(x: Tensor) -> QTensor:
        return kernels.quantize(x, "int8-channel")

    def whole(x: Tensor, one: QTensor) -> Tensor:
        return kernels.linear(rounded(x), one)  # pyright: ignore[reportArgumentType]

    def products(x: Tensor) -> Sequence[Call]:
        before = rounded(x)
        return [partial(kernels.linear, before, one) if ready else partial(whole, x, one) for one in qs]  # pyright: ignore[reportArgumentType]

    def sees(x: Tensor) -> Tensor:
        return exact(rounded(x))

    return Weights(family(format), q.nbytes, copies, exact(q), TOLERANCE, products, kind="halfbyte", sees=sees)


def error(got: Tensor, want: Tensor) -> float:
    """Relative, in norm; not a number where got holds any."""
    return float((got.double() - want).norm() / want.norm())


def attempt(
    board: Board,
    name: str,
    where: str,
    kind: str,
    do: Callable[[], Found],
    untaken: tuple[type[Exception], ...] = (),
) -> Found | None:
    """do(), or None and a note that says why not. untaken: what ours may raise for inputs that it does not take yet."""
    try:
        return do()
    except Exception as e:  # peers raise what they like
        if kind == "peer":
            status = "missing" if isinstance(e, ImportError | OSError) else "does not apply"
        elif isinstance(e, InputError):
            status = "does not apply"
        else:
            status = "not there yet" if isinstance(e, untaken) else "wrong"
        said = str(e) if isinstance(e, ImportError | ValueError) else f"{type(e).__name__}: {e}"
        board.note(status, name, said, where)
    return None


def checked(weights: Weights, w: Tensor, job: Job, x: Tensor, warm: bool) -> float:
    """The error of a product against the float64 weight w, by some of its rows.

    warm: every copy is used twice before: the first time lays it out.
    """
    calls = getattr(weights, job.op)(x)
    for call in calls if warm else ():
        call()
        call()
    got, some = calls[-1](), slice(None, None, max(1, job.m // 16))
    want = weights.sees(x)[some].double() @ (w.T if job.op == "linear" else w)
    if got.shape != (job.m, want.shape[1]):
        return float("inf")
    return error(got[some], want)


def contest(
    board: Board,
    section: str,
    shape: Shape,
    jobs: list[Job],
    entrants: dict[str, Entrant],
    space: Space,
    against: str | None = None,
    left_out: Callable[[str, Job], bool] = lambda name, job: False,
    untaken: tuple[type[Exception], ...] = (),
) -> None:
    """A weight of this shape as all entrants hold it, checked, and raced at each job."""
    (n, k), where = shape, "x".join(map(str, shape))
    w = (torch.randn(n, k) * 0.02).bfloat16()
    xs = {job: torch.randn(job.m, k if job.op == "linear" else n).bfloat16() for job in jobs}
    raced: dict[Job, list[Contender]] = {job: [] for job in jobs}
    space = space.shared(len(entrants))
    for name, (bits, build) in entrants.items():
        kind = "peer" if name in PEERS else "halfbyte"
        weights = attempt(board, name, where, kind, partial(build, w, space.copies(n * k * bits / 8)))
        if weights is None:
            continue
        reference = weights.reference.double()
        weights.reference = w  # ours had one of its own
        warm = {job.op for job in jobs} if kind == "halfbyte" else set()
        for job in jobs:
            products: Products | None = getattr(weights, job.op)
            at = f"{where} {job.op} M={job.m}"
            if products is None or left_out(name, job):
                continue
            check = partial(checked, weights, reference, job, xs[job], job.op in warm)
            warm.discard(job.op)
            off = attempt(board, name, at, kind, check, untaken)
            if off is None:
                continue
            if not off <= weights.tolerance:
                status = "wrong" if kind == "halfbyte" else "disagrees"
                board.note(status, name, f"error above {weights.tolerance}: {off:.2g}", at)
                continue
            nbytes = weights.nbytes + 2 * job.m * (n + k)
            at_once = weights.copies if weights.at_once else 1
            raced[job].append(Contender(name, products(xs[job]), nbytes, kind, weights.family, at_once, off))
    for job, contenders in raced.items():
        board.compare(section, job.op, where, job.m, contenders, flops=2 * job.m * n * k, against=against)
