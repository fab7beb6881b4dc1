"""Which directions of what blocks give matter to what the model says: from one pass back through it, block by block.

To second order an error d in what a block gives of a token costs a KL of 1/2 d E[g g^T] d^T, by tokens, where g is the
gradient there of the log-probability of tokens that the model itself draws (the Fisher information). Norms take a token
by its size, so that d and g are taken by it too: d / |h| and g |h|, with h what the block gives. Those of the first
tokens, to which all others attend, are so large that they would be most of the sum; but far from second order: with
their errors taken away, the others lose as much. So a token counts for a few times the median at most.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from halfbyte.block import Store
from halfbyte.errors import InputError
from halfbyte.feed import Feed
from halfbyte.kernels import second_moments

ROWS = 16  # of text that are enough to tell
MOST = 2.0  # of a token's gradient, in medians of a call's
EVENLY = 0.1  # of all directions alike, beside what they tell


def directions(feed: Feed, blocks: list[tuple[str, nn.Module]], store: Store, seed: int = 0) -> list[Tensor]:
    """Of each block, float32 (width, width), with a mean of 1 on its diagonal: E[g g^T] as above, for the most part.
    Empty for a model that has no logits. Two passes through the float blocks, and one back; what is kept meanwhile is
    what each block is fed of ROWS rows. Raises InputError for a gradient that is not finite."""
    few = _few(feed.floats)
    given = [feed.floats[:few]]
    for i, (prefix, _) in enumerate(blocks):
        store.bring(prefix)
        with store.passing():
            given.append(feed.through(i, given[-1]))
        store.let_go(prefix)
    with store.passing():
        back = feed.asked(given.pop(), torch.Generator().manual_seed(seed))
    found: list[Tensor] = []
    for i, (prefix, _) in reversed(list(enumerate(blocks))) if back else ():
        store.bring(prefix)
        with store.passing():
            outputs, back_in = feed.back(i, given.pop(), back)
        store.let_go(prefix)
        found.append(_gram(outputs, back, prefix))
        back = back_in
    return found[::-1]


def _few(states: list[Tensor]) -> int:
    """How many calls have ROWS rows."""
    rows = 0
    for i, x in enumerate(states):
        rows += len(x)
        if rows >= ROWS:
            return i + 1
    return len(states)


def _gram(outputs: list[Tensor], gradients: list[Tensor], prefix: str) -> Tensor:
    width = outputs[0].shape[-1]
    total = torch.zeros(width, width)
    for h, g in zip(outputs, gradients, strict=True):
        x = (g.float() * h.float().norm(dim=-1, keepdim=True)).flatten(0, -2)
        size = x.norm(dim=-1, keepdim=True)
        x *= (MOST * size.median() / size.clamp(min=torch.finfo(size.dtype).tiny)).clamp(max=1)
        second_moments.add(total, x)
    second_moments.mirror(total)
    if not total.isfinite().all():
        raise InputError(f"the gradient at what {prefix} gives holds NaN or infinity on the calibration text.")
    mean = total.diagonal().mean()
    evenly = EVENLY if mean > 0 else 1.0
    total *= (1 - evenly) / mean.clamp(min=torch.finfo(total.dtype).tiny)
    total.diagonal().add_(evenly)
    return total
