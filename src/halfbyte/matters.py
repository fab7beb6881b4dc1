"""Which directions of what blocks give matter to what the model says: from one pass back through it, block by block.

To second order an error d in what a block gives of a token costs a KL of 1/2 d E[g g^T] d^T, by tokens, where g is the
gradient there of the log-probability of tokens that the model itself draws (the Fisher information). Norms take a token
by its size, so that d and g are taken by it too: d / |h| and g |h|, with h what the block gives. Those of the first
tokens, to which all others attend, are so large that they would be most of the sum; but far from second order: with
their errors taken away, the others lose as much. So a token counts for a few times the median at most.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from halfbyte.block import Store
from halfbyte.feed import Feed
from halfbyte.kernels import second_moments

ROWS = 16  # of text that are enough to tell
MOST = 2.0  # of a token's gradient, in medians of a call's
EVENLY = 0.1  # of all directions alike, beside what they tell
_log = logging.getLogger("halfbyte")


def directions(feed: Feed, blocks: list[tuple[str, nn.Module]], store: Store, seed: int = 0) -> list[Tensor]:
    """Of each block, float32 (width, width), with a mean of 1 on its diagonal: E[g g^T] as above, for the most part.
    Empty, as the log says, for a model that has no logits, or with gradients that are not finite.
    Two passes through the float blocks, and one back; what is kept meanwhile is what each block is fed of ROWS rows."""
    few = _few(feed.floats)
    given = [feed.floats[:few]]
    for i, (prefix, _) in enumerate(blocks):
        store.bring(prefix)
        with store.passing():
            given.append(feed.through(i, given[-1]))
        store.let_go(prefix)
    with store.passing():
        back = feed.asked(given.pop(), torch.Generator().manual_seed(seed))
    if not back:
        _log.warning("all directions count alike: this model gives no logits that tell which of them matter")
        return []
    found: list[Tensor] = []
    for i, (prefix, _) in reversed(list(enumerate(blocks))):
        store.bring(prefix)
        with store.passing():
            outputs, back_in = feed.back(i, given.pop(), back)
        store.let_go(prefix)
        found.append(_gram(outputs, back))
        back = back_in
    if not all(m.isfinite().all() for m in found):
        _log.warning("all directions count alike: on the calibration text gradients hold NaN or infinity")
        return []
    return found[::-1]


def _few(states: list[Tensor]) -> int:
    """How many calls have ROWS rows."""
    rows = 0
    for i, x in enumerate(states):
        rows += len(x)
        if rows >= ROWS:
            return i + 1
    return len(states)


def _gram(outputs: list[Tensor], gradients: list[Tensor]) -> Tensor:
    width = outputs[0].shape[-1]
    total = torch.zeros(width, width)
    for h, g in zip(outputs, gradients, strict=True):
        x = (g.float() * h.float().norm(dim=-1, keepdim=True)).flatten(0, -2)
        size = x.norm(dim=-1, keepdim=True)
        x *= (MOST * size.median() / size.clamp(min=torch.finfo(size.dtype).tiny)).clamp(max=1)
        second_moments.add(total, x)
    second_moments.mirror(total)
    mean = total.diagonal().mean()
    evenly = EVENLY if mean > 0 else 1.0
    total *= (1 - evenly) / mean.clamp(min=torch.finfo(total.dtype).tiny)
    total.diagonal().add_(evenly)
    return total
