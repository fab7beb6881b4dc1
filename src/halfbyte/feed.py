"""What a model's blocks are given on calibration text, one block after the other, without running the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.data import Batch
from halfbyte.kernels import second_moments
from halfbyte.kernels.half import half_products
from halfbyte.layers import Linear, RoundsInputs, ops
from halfbyte.solvers import Call, Moments


class _Reached(Exception):
    """What was wanted of a pass is known: the rest of the model need not run."""


class Feed:
    """The hidden states between blocks, and all else that each block is called with, a list over batches. floats:
    those of the float model; states: what the blocks before, as they are now, give. One list while none is quantized.
    half, matter (a list over blocks): see Call.

    Making one runs the model once with empty blocks, so that what leads to the first is all that is computed. Blocks
    are called as the model calls them: masks and positions may differ from one to the next.
    """

    def __init__(self, model: nn.Module, blocks: list[nn.Module], batches: list[Batch]) -> None:
        self._model, self._blocks, self._batches = model, blocks, batches
        self.half = False
        self.matter: list[Tensor] = []
        self._ends: dict[tuple[Any, ...], list[str]] = {}
        self._calls: list[list[Call]] = [[] for _ in blocks]
        self._width = self._outputs()
        with self._empty(self._note):
            self._pass()
        self.states = self.floats = [call.x for call in self._calls[0]]

    def calls(self, i: int) -> list[Call]:
        """What block i is given on the present states."""
        matter = self.matter[i] if self.matter else None
        return [replace(call, matter=matter) for call in self._on(i, self.states)]

    @torch.no_grad()
    def run(self, i: int) -> list[Tensor]:
        """Block i's outputs on the present states."""
        return [call(self._blocks[i]) for call in self.calls(i)]

    def targets(self, i: int) -> list[Tensor]:
        """What the float block i gives in the float model, where no inputs are rounded."""
        return self.through(i, self.floats)

    @torch.no_grad()
    def through(self, i: int, states: list[Tensor]) -> list[Tensor]:
        """What block i gives of the first calls' states, with no inputs rounded."""
        with self._unrounded(i):
            return [call(self._blocks[i]) for call in self._on(i, states)]

    def back(self, i: int, states: list[Tensor], gradients: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """What block i gives of the first calls' states, as `through` has it, and the gradients at these, of what has
        the `gradients` at what it gives."""
        outputs, found = [], []
        with self._unrounded(i), torch.enable_grad():
            for call, g in zip(self._on(i, states), gradients, strict=True):
                x = call.x.detach().requires_grad_(True)
                y = replace(call, x=x)(self._blocks[i])
                found.extend(torch.autograd.grad(y, x, g.to(y.dtype)))
                outputs.append(y.detach())
        return outputs, found

    @contextmanager
    def _unrounded(self, i: int) -> Iterator[None]:
        with ExitStack() as stack:
            for _, op in ops(self._blocks[i]):
                if isinstance(op, RoundsInputs):
                    stack.enter_context(op.unrounded())
            yield

    def _on(self, i: int, states: list[Tensor]) -> list[Call]:
        calls = self._calls[i][: len(states)]
        return [replace(call, x=x, half=self.half) for call, x in zip(calls, states, strict=True)]

    def ends(self, i: int) -> list[str]:
        """Of block i's ops, by their names inside it, the one that is used last, if adding to what it gives adds as
        much to what the block gives; before it the one that, with it, gives all that the block adds to what it is fed,
        if there is one. Empty where a norm follows. Of blocks built alike, one is tried."""
        built = tuple((name, type(m)) for name, m in self._blocks[i].named_modules())
        if built not in self._ends:
            self._ends[built] = self._tried(self._blocks[i], self.calls(i)[0])
        return self._ends[built]

    @torch.no_grad()
    def _tried(self, block: nn.Module, call: Call) -> list[str]:
        inside, gave = dict(ops(block)), {}

        def keep(name: str, module: nn.Module, args: Any, out: Any) -> None:
            gave.pop(name, None)  # as it was used last
            gave[name] = out.clone()  # some models add to it in place

        with ExitStack() as stack:
            for name, op in inside.items():
                stack.callback(op.register_forward_hook(partial(keep, name)).remove)
            y = call(block)
        if not gave:
            return []
        *_, last = gave

        def more(module: nn.Module, args: Any, out: Any) -> Tensor:
            return out + y.reshape(out.shape) if out.numel() == y.numel() else out

        handle = inside[last].register_forward_hook(more)
        try:
            doubled = call(block)
        finally:
            handle.remove()
        if not _near(doubled - y, y):
            return []
        left = y - call.x - gave[last].reshape(y.shape)
        alike = (n for n, out in gave.items() if n != last and out.numel() == y.numel())
        return [*[n for n in alike if _near(gave[n].reshape(y.shape), left)][:1], last]

    def rest(self) -> None:
        """Runs what comes after the last block, on the present states, which are its outputs."""
        states = iter(self.states)
        with self._empty(lambda i, call: next(states) if i == 0 else call.x):
            self._pass()

    def asked(self, states: list[Tensor], generator: torch.Generator) -> list[Tensor]:
        """The gradients, at these outputs of the last block, of the log-probabilities of tokens that the model draws
        from what it makes of them. Empty if it has no logits, or not finite ones. A row at a time: logits are wide."""
        found = []
        for batch, x in zip(self._batches, states, strict=False):
            rows = []
            for k in range(len(x)):
                row = x[k : k + 1].detach().requires_grad_(True)
                inputs = {n: v[k : k + 1] if isinstance(v, Tensor) else v for n, v in batch.inputs.items()}
                with self._empty(lambda i, call, row=row: row if i == 0 else call.x), torch.enable_grad():
                    logits = getattr(self._model(**inputs), "logits", None)
                    if logits is None or logits.ndim != 3 or not logits.isfinite().all():
                        return []
                    rows.extend(torch.autograd.grad(own_words(logits[0], generator).sum(), row))
            found.append(torch.cat(rows))
        return found

    def _note(self, i: int, call: Call) -> Tensor:
        self._calls[i].append(call)
        if i + 1 == len(self._blocks):
            raise _Reached
        return call.x

    def _outputs(self) -> int:
        """How many values a block returns: 0 for a bare tensor."""
        found: list[int] = []

        def look(module: nn.Module, args: Any, output: Any) -> None:
            found.append(len(output) if isinstance(output, tuple) else 0)
            raise _Reached

        handle = self._blocks[0].register_forward_hook(look)
        try:
            self._pass(1)
        finally:
            handle.remove()
        return found[0]

    @torch.no_grad()
    def _pass(self, most: int | None = None) -> None:
        for batch in self._batches[:most]:
            try:
                self._model(**batch.inputs)
            except _Reached:
                continue

    @contextmanager
    def _empty(self, given: Callable[[int, Call], Tensor]) -> Iterator[None]:
        """Blocks that compute nothing inside: block i returns what `given` makes of its number and call."""

        def forward(i: int, *args: Any, **kwargs: Any) -> Any:
            x, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            out = given(i, Call(x, rest, kwargs))
            return (out, *[None] * (self._width - 1)) if self._width else out

        for i, block in enumerate(self._blocks):
            block.forward = partial(forward, i)
        try:
            yield
        finally:
            for block in self._blocks:
                del block.forward


def own_words(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Of logits (tokens, vocabulary), the log-probabilities of tokens that are drawn by them: (tokens, 1). The mean of
    the squares of their gradients is the Fisher information, to second order what the KL to the model costs."""
    likely = logits.float().log_softmax(-1)
    return likely.gather(1, torch.multinomial(likely.detach().exp(), 1, generator=generator))


def _near(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() < 0.05 * b.norm())


class _Seen:
    """Sums of squares, or of x x^T, over what ops are fed. Ops that are fed the same tensor share one sum."""

    def __init__(self, gram: bool) -> None:
        self.gram, self.count = gram, {}
        self.sums: dict[str, Tensor] = {}
        self._last: tuple[Tensor | None, str] = None, ""
        self._same: dict[str, str] = {}

    def add(self, name: str, x: Tensor) -> None:
        """What an op is fed, once more: x (..., in)."""
        last, owner = self._last
        if last is x and name not in self.sums:
            self._same[name] = owner
            return
        self._last = x, name
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        if name not in self.sums:
            self.sums[name] = rows.new_zeros((rows.shape[1],) * (1 + self.gram))
        if self.gram:
            second_moments.add(self.sums[name], rows)
        else:
            self.sums[name] += rows.square().sum(0)
        self.count[name] = self.count.get(name, 0) + len(rows)

    def moments(self) -> dict[str, Moments]:
        """By op's name; what was fed nothing is left out. Ends the sums."""
        own = {}
        for name, total in self.sums.items():
            total = second_moments.mirror(total) if self.gram else total
            total /= max(1, self.count[name])
            own[name] = Moments(total.diagonal().clone(), total) if self.gram else Moments(total)
        return own | {name: own[owner] for name, owner in self._same.items()}


@contextmanager
def watching(by_name: Mapping[str, nn.Module], names: list[str], uses: str) -> Iterator[_Seen]:
    """What the named ops are fed inside. by_name: the ops that may run, tied ones under each of their names; of a
    weight that an embedding and a head share it is what the head is fed."""
    seen = _Seen(uses == "gram")
    wanted = {id(by_name[n].weight): n for n in names} if uses else {}
    handles = [
        op.register_forward_pre_hook(partial(_look, seen, wanted[id(op.weight)]))
        for op in by_name.values()
        if isinstance(op, Linear) and id(op.weight) in wanted
    ]
    try:
        yield seen
    finally:
        for h in handles:
            h.remove()


def moments_of(fed: list[Tensor], uses: str, half: bool) -> Moments:
    """Of inputs (..., in), a list over calls. half: whether what is summed is multiplied in bfloat16."""
    seen = _Seen(uses == "gram")
    with half_products(half):
        for x in fed:
            seen.add("", x)
    return seen.moments()[""]


def _look(seen: _Seen, name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
    seen.add(name, args[0])


@torch.no_grad()
def moments(model: nn.Module, batches: list[Batch], names: list[str], uses: str) -> dict[str, Moments]:
    """Of the named ops' inputs, by op's name: their "squares", or the whole "gram"; the whole model runs."""
    with watching(dict(ops(model)), names, uses) as seen:
        for batch in batches:
            model(**batch.inputs)
    return seen.moments()
