"""AutoRound: rounding and scales learned by descent, a block's outputs against those it has in the float model
(arXiv:2309.05516), from where GPTQ ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.kernels import proxy, reference
from halfbyte.kernels.rounding import round_to_grid
from halfbyte.qtensor import QParams, QTensor, grid_values
from halfbyte.solvers import gptq
from halfbyte.solvers.closing import parts, seen_as, trusted

SAYS = "AutoRound from GPTQ's codes: rounding and scales learned against each block's outputs"
ITERATIONS = 75, 30  # for what the block's own floats give, and, once the weight that closes has its codes, for all
UNTOLD = 0.0, 0.5  # shares of what a block is short of that each goes for, where no weight closes it to tell
BATCH = 4  # rows of text an iteration
RATE, SCALE_RATE = 0.001, 0.0003  # of a step between codes, and of a scale, at first; they fall to 0
BETAS = (0.9, 0.95)  # of Adam


def refine(
    block: nn.Module, inputs: list[Any], targets: list[Tensor], sites: Mapping[str, Any], codes: dict[str, QTensor]
) -> dict[str, QTensor]:
    """See halfbyte.solvers.Refine."""
    ops = {name: site.op for name, site in sites.items()}
    floats = {name: site.meant[0] if site.meant else site.op.weight.value() for name, site in sites.items()}
    last = next((name for name, site in sites.items() if site.left and site.meant), None)
    if last is None:
        given = _given(block, inputs)
        for share, iterations in zip(UNTOLD, ITERATIONS, strict=True):
            codes = _learned(block, inputs, _between(given, targets, share), sites, codes, floats, iterations)
        return codes
    op, rest = ops[last], {name: q for name, q in codes.items() if name != last}
    sites[last].left.clear()  # it goes with the codes of before
    left = parts(block, inputs, op)
    wanted = _between([part.closed(op) for part in left], targets, trusted(left, targets, op))
    codes = _learned(block, inputs, wanted, sites, rest, floats, ITERATIONS[0])
    with seen_as(ops, codes):
        left = parts(block, inputs, op)
    codes[last], floats[last], share = gptq.closed(left, targets, sites[last], last)
    with seen_as(ops, {last: floats[last]}):
        wanted = _between([part.closed(op) for part in left], targets, share)
    return _learned(block, inputs, wanted, sites, codes, floats, ITERATIONS[1])


@torch.no_grad()
def _given(block: nn.Module, inputs: list[Any]) -> list[Tensor]:
    """What a block gives as it is."""
    return [call(block) for call in inputs]


def _between(given: list[Tensor], targets: list[Tensor], share: float) -> list[Tensor]:
    """What a block gives, and that share of what it is short of the targets."""
    return [torch.lerp(y, target, share) for y, target in zip(given, targets, strict=True)]


def _learned(
    block: nn.Module, inputs: list[Any], targets: list[Tensor], sites: Mapping[str, Any], codes: dict[str, QTensor],
    floats: Mapping[str, Tensor], iterations: int,
) -> dict[str, QTensor]:  # fmt: skip
    """The codes, or others by which the block's outputs are nearer to the targets; what has none yet stays a float."""
    learned = {
        name: Rounding(floats[name], q) for name, q in codes.items() if proxy.refuses(q.format, tuple(q.shape)) is None
    }
    if not learned:
        return codes
    others = {n: q for n, q in codes.items() if n not in learned}
    with seen_as({n: s.op for n, s in sites.items()}, others), _seen_through(sites, learned):
        before = _loss(block, inputs, targets)
        _descend(block, inputs, targets, list(learned.values()), iterations)
        after = _loss(block, inputs, targets)
    return codes | {n: r.quantized(codes[n]) for n, r in learned.items()} if after < before else codes


class Rounding(nn.Module):
    """A weight as it is learned: numbers x that are rounded to the grid, times scales. It stands where a grid does."""

    spans = asleep = False  # see Grid

    def __init__(self, w: Tensor, q: QTensor) -> None:
        super().__init__()
        self.format, p = q.format, q.qparams
        groups = p.scale.numel()
        self.shape, self.dtype = w.shape, q.dtype
        self.scale = p.scale.float().reshape(groups, 1).clone()
        zero = None if p.zero is None else p.zero.float().reshape(groups, 1).clone()
        self.whole, self.added = (zero, None) if self.format.zero == "integer" else (None, zero)
        self.x, self.step_size = proxy.inside(w, q)
        self.fits = gptq.fits(self.format)
        self.moments: dict[str, tuple[Tensor, Tensor, int]] = {}
        self.stored = reference.store_qparams(p, self.format, q.dtype)
        self.round()

    def round(self) -> None:
        """The weight that the numbers stand for now, as a leaf whose gradient is looked for."""
        with torch.no_grad():
            codes, _ = round_to_grid(self.x, self.format, self.whole)
            self.codes = codes.to(torch.uint8)
            self.v = grid_values(self.codes, self.format, self.whole)
            scale = self.scale.to(self._held("scale")).float() if self.fits else self.scale
            w = self.v * scale
            if self.added is not None:
                w += self.added.to(self._held("zero")).float() if self.fits else self.added
        self.current = w.reshape(self.shape).requires_grad_(True)

    def _held(self, name: str) -> torch.dtype:
        part = self.stored[name]
        assert isinstance(part, Tensor)
        return part.dtype

    @torch.no_grad()
    def step(self, rate: float, scale_rate: float) -> None:
        """Moves numbers by `rate` of a step between codes at most or so, and scales by that share of themselves.
        What has no gradient stays where it is."""
        if self.current.grad is None:  # an expert that no token of this step came to
            return
        g = self.current.grad.reshape(self.x.shape)
        if self.fits:
            size = self.scale.abs()
            self.scale -= scale_rate * size * self._adam("scale", (g * self.v).sum(1, keepdim=True) * size)
            if self.added is not None:
                self.added -= scale_rate * size * self._adam("added", g.sum(1, keepdim=True) * size)
        self.x -= rate * self.step_size * self._adam("x", g * self.scale)
        self.round()

    def _adam(self, name: str, g: Tensor) -> Tensor:
        """The direction of Adam (arXiv:1412.6980, algorithm 1)."""
        mean, square, t = self.moments.get(name) or (torch.zeros_like(g), torch.zeros_like(g), 0)
        mean.lerp_(g, 1 - BETAS[0])
        square.lerp_(g.square(), 1 - BETAS[1])
        self.moments[name] = mean, square, t + 1
        down = (square / (1 - BETAS[1] ** (t + 1))).sqrt_().clamp_(min=1e-30)
        return (mean / (1 - BETAS[0] ** (t + 1))).div_(down)

    def forward(self, w: Tensor) -> Tensor:
        return self.current

    def quantized(self, like: QTensor) -> QTensor:
        q = proxy.with_codes(like, self.codes.reshape(like.shape))
        if not self.fits:
            return q
        return proxy.with_qparams(q, QParams(self.scale.reshape(like.qparams.scale.shape), self._zero(like)))

    def _zero(self, like: QTensor) -> Tensor | None:
        zero = self.whole if self.added is None else self.added
        return None if zero is None or like.qparams.zero is None else zero.reshape(like.qparams.zero.shape)


@contextmanager
def _seen_through(sites: Mapping[str, Any], learned: Mapping[str, Rounding]) -> Iterator[None]:
    ops = [(sites[name].op, r) for name, r in learned.items()]
    try:
        for op, r in ops:
            op.weight.grid, op.training = r, True
        yield
    finally:
        for op, _ in ops:
            op.weight.grid, op.training = None, False


def _error(block: nn.Module, call: Any, target: Tensor) -> Tensor:
    """Of the block's outputs: the sum of all tokens' squared errors in the directions that matter, each by the token's
    size, as the next norm will take it."""
    target = target.float()
    e = call(block).float() - target
    weighed = e if call.matter is None else e @ call.matter
    return ((weighed * e).sum(-1) / target.square().sum(-1)).sum()


@torch.no_grad()
def _loss(block: nn.Module, inputs: list[Any], targets: list[Tensor]) -> float:
    return sum(float(_error(block, c, t)) for c, t in zip(inputs, targets, strict=True))


def _descend(
    block: nn.Module, inputs: list[Any], targets: list[Tensor], learned: list[Rounding], iterations: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    batch = max(1, BATCH // len(inputs[0].x))
    for i in range(iterations):
        for j in torch.randperm(len(inputs), generator=generator)[:batch].tolist():
            with torch.enable_grad():
                _error(block, inputs[j], targets[j]).backward()
        left = 1 - i / iterations
        for r in learned:
            r.step(RATE * left, SCALE_RATE * left)
