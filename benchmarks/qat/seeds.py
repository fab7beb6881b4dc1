"""Whether training through a format loses anything: as many trainings as there are seeds, each beside one in full
precision on the same rows in the same order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from setting import Setting
from torch import Tensor
from trials import FULL, READY, Asked, chosen, trained

from halfbyte import data, evaluate
from halfbyte.run import Run

_RESAMPLES = 2000


def seeds(setting: Setting, asked: Asked) -> Iterator[dict]:
    """One training has its luck. Gives the differences of each seed, and at last those of all."""
    asked_for = [(t, {text: list[Tensor]() for text in setting.texts}) for t in chosen(READY, asked)]
    for seed in range(asked.seeds):
        best = trained(setting, FULL, asked, seed).there
        for t, paired in asked_for:
            found = trained(setting, t, asked, seed)
            for text, so_far in paired.items():
                so_far.append(by_window(found.there, best, setting.texts[text]))
            of_it = {text: {"loss": interval(so_far[-1:])} for text, so_far in paired.items()}
            yield {"what": t.to, "name": t.name, "rate": t.rate, "seeds": f"{seed}", **found.row, **of_it}
    for t, paired in asked_for:
        of_all = {text: {"loss": interval(so_far)} for text, so_far in paired.items()}
        yield {"what": t.to, "name": t.name, "rate": t.rate, "seeds": f"all {asked.seeds}", **of_all}


@torch.no_grad()
def by_window(there: Run, other: Run, rows: data.Dataset) -> Tensor:
    """(2, windows): the difference of losses to another model, summed over a window's tokens; how many these are."""
    reference = evaluate.Reference(other.model)
    found = [evaluate.measure(there.model, replace(rows, rows=[row]), reference) for row in rows.rows]
    sums = [[(m.loss_difference or 0.0) * m.tokens for m in found], [m.tokens for m in found]]
    return torch.tensor(sums, dtype=torch.double)


def interval(paired: list[Tensor]) -> list[float]:
    """Of each seed's by_window: the mean over tokens, and its 95% interval, with seeds and windows resampled."""
    found = torch.stack(paired)
    n, windows = len(found), found.shape[-1]
    generator = torch.Generator().manual_seed(0)
    seed = torch.randint(n, (_RESAMPLES, n), generator=generator)
    window = torch.randint(windows, (_RESAMPLES, 1, windows), generator=generator).expand(-1, 2, -1)
    sums, tokens = found[seed].mean(1).gather(2, window).sum(2).unbind(1)
    low, high = (sums / tokens).quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    sums, tokens = found.mean(0).sum(1).tolist()
    return [sums / tokens, low, high]
