"""Finds the scales that inputs in static formats are rounded by, from what a model is fed on calibration text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte import kernels
from halfbyte.data import Batch
from halfbyte.errors import InputError
from halfbyte.formats import Format
from halfbyte.layers import RoundsInputs, ops
from halfbyte.qtensor import QParams
from halfbyte.transforms import Fed

BINS = 1 << 14  # of a histogram; at least 32 for each step of 8 bits
STEPS = 100  # clippings that "mse" tries
ROWS = 512  # tokens whose inputs are kept for a transform


def observe(
    model: nn.Module,
    inputs: Mapping[str, Format],
    batches: Sequence[Any],
    how: str = "mse",
    on_batch: Callable[[int, int], None] = lambda done, total: None,
    call: Callable[[nn.Module, Any], Any] = lambda model, batch: model(**batch.inputs),
) -> None:
    """Has the named ops (Linear, Conv) round their inputs to static formats, by scales found on batches in which none
    of them is rounded yet. What is kept of inputs meanwhile is a range and a histogram an op, whatever their number.
    call: how the model is given a batch, which is one of halfbyte.data's if it is left out.

    how: what of the inputs' magnitudes is covered, all else being clipped: "minmax" all, "percentile-99.99" that
    share of them, "mse" what has the least squared error (the default: SmolLM2 in W8A8_STATIC is 0.47 of KL away from
    itself, with "minmax" 0.86). Raises InputError for another `how`, for inputs that hold
    NaN or infinity, and for an op that the batches do not reach.
    """
    check(how)
    by_name = {name: op for name, op in ops(model) if name in inputs and isinstance(op, RoundsInputs)}
    seen = {name: Seen(name, binned=how != "minmax") for name in inputs}
    handles = [op.register_forward_pre_hook(partial(_look, seen[name])) for name, op in by_name.items()]
    try:
        for op in by_name.values():
            op.input = None
        for i, batch in enumerate(batches):
            with torch.inference_mode():
                call(model, batch)
            on_batch(i + 1, len(batches))
    finally:
        for handle in handles:
            handle.remove()
    for name, f in inputs.items():
        op, p = by_name[name], seen[name].qparams(f, how)
        tiny = torch.finfo(op.weight.dtype).tiny
        # in the weight's dtype, to which readers cast it
        op.round_inputs(f, QParams(p.scale.clamp(min=tiny).to(op.weight.dtype), p.zero))


def _look(seen: Seen, _: nn.Module, args: tuple[Any, ...]) -> None:
    seen.add(args[0])


@torch.inference_mode()
def fed(model: nn.Module, names: list[str], batches: list[Batch], seed: int = 0) -> dict[str, Fed]:
    """What the named ops (Linear) are fed on batches, by name: the largest magnitudes, and the inputs of about ROWS
    tokens, drawn at random. What the batches do not reach is left out. Raises InputError for NaN and infinity."""
    generator = torch.Generator().manual_seed(seed)
    most = -(-ROWS // max(1, len(batches)))
    held: dict[str, list[Fed]] = {}

    def look(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].reshape(-1, args[0].shape[-1])
        largest = x.abs().amax(0).float()
        if not largest.isfinite().all():
            raise InputError(f"the inputs of {name} hold NaN or infinity on the calibration text.")
        held.setdefault(name, []).append(Fed(largest, x[torch.randperm(len(x), generator=generator)[:most]].clone()))

    handles = [op.register_forward_pre_hook(partial(look, n)) for n, op in ops(model) if n in names]
    try:
        for batch in batches:
            model(**batch.inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: Fed(torch.stack([s.largest for s in seen]).amax(0), torch.cat([s.rows for s in seen]))
        for name, seen in held.items()
    }


def check(how: str) -> float | None:
    """The percentile of "percentile-P", None for the others. Raises InputError for what is none of them."""
    if how in ("minmax", "mse"):
        return None
    try:
        percent = float(how.removeprefix("percentile-")) if how.startswith("percentile-") else 0.0
    except ValueError:
        percent = 0.0
    if not 0 < percent <= 100:
        raise InputError(
            f"{how!r} is no way to find scales of inputs; those are minmax, mse and percentile-P such as "
            "percentile-99.99."
        )
    return percent


class Seen:
    """What an op was fed: the range, exactly, and, if `binned`, how many values lay in each of BINS bins between -edge
    and edge, a power of two. Where the range outgrows it, edge doubles and bins become one with their neighbours."""

    def __init__(self, name: str, binned: bool = True) -> None:
        self.name, self.binned = name, binned
        self.low, self.high = math.inf, -math.inf
        self.edge = 2.0**-24
        self.counts = torch.zeros(BINS, dtype=torch.int64)

    @property
    def largest(self) -> float:
        return max(-self.low, self.high)

    def add(self, x: Tensor) -> None:
        """x of any shape and float dtype. Raises InputError for NaN and infinity."""
        if not x.numel():
            return
        x = x.float()
        low, high = (float(end) for end in x.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise InputError(f"the inputs of {self.name} hold NaN or infinity on the calibration data.")
        self.low, self.high = min(self.low, low), max(self.high, high)
        if not self.binned:
            return
        while self.edge < self.largest:
            self.edge *= 2
            quarter = torch.zeros(BINS // 4, dtype=torch.int64)
            self.counts = torch.cat((quarter, self.counts.view(-1, 2).sum(1), quarter))
        self.counts += torch.histc(x.cpu(), BINS, -self.edge, self.edge).long()

    def qparams(self, f: Format, how: str) -> QParams:
        """Scale and zero point of f, each (1,), by one of `observe`'s ways. Raises InputError if nothing was seen."""
        if self.low > self.high:
            raise InputError(f"the calibration data never reaches {self.name}, so that its inputs have no scale.")
        percent = check(how)
        clip = self._least(f) if how == "mse" else self.largest if percent is None else self._percentile(percent)
        return self._clipped(f, clip)

    def _clipped(self, f: Format, clip: float) -> QParams:
        """For magnitudes of up to `clip`."""
        return kernels.qparams(torch.tensor([max(self.low, -clip), min(self.high, clip)]), f, "absmax")

    def _percentile(self, percent: float) -> float:
        """The magnitude that this share of all does not exceed, to a bin."""
        below, above = self.counts.view(2, -1)
        by_magnitude = (below.flip(0) + above).cumsum(0)
        wanted = max(1, round(int(by_magnitude[-1]) * percent / 100))
        bins = int(torch.searchsorted(by_magnitude, wanted)) + 1
        return min(self.largest, bins * 2 * self.edge / BINS)

    def _least(self, f: Format) -> float:
        """The clipping with the least squared error of what the bins hold, each taken at its middle."""
        middles = (torch.arange(BINS) + 0.5) * (2 * self.edge / BINS) - self.edge
        held = self.counts > 0
        middles, counts = middles[held], self.counts[held].double()
        best, least = self.largest, math.inf
        for step in range(STEPS, 0, -1):
            clip = self.largest * step / STEPS
            rounded = kernels.fake(middles, f, self._clipped(f, clip))
            error = float(counts @ (rounded - middles).double().square())
            if error < least:
                best, least = clip, error
        return best
