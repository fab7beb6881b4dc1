"""What training costs: rank by rank, and step by step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from setting import LENGTH, Setting
from torch import nn
from trials import BATCH, W4, Asked, Trial, chosen, measured, trained

from halfbyte import data
from halfbyte.distill import targets
from halfbyte.methods import method_steps
from halfbyte.steps import Train, trainable

ROUNDS = 3


def ranks(setting: Setting, asked: Asked) -> Iterator[dict]:
    """LoRA on docstrings, rank by rank."""
    trials = tuple(
        Trial(f"r = {r}", "lora", 2e-4, text="docstrings", more={"r": r, "lora_alpha": 2 * r})
        for r in (1, 2, 4, 8, 16, 64)
    )
    for t in chosen(trials, asked):
        found = trained(setting, t, asked)
        yield {"what": "LoRA", "name": t.name, "rate": t.rate, **found.row, **measured(setting, found.there)}


def steps(setting: Setting, asked: Asked) -> Iterator[dict]:
    """Seconds of a step, forward and backward and AdamW's, all methods in turn: the median of rounds."""
    kinds: dict[str, tuple[str, str | None, str | None]] = {
        "full": ("full", None, None), "qat": ("qat", W4, None), "qat, learned scales": ("qat", W4, "rtn"),
        "lora": ("lora", None, None), "qat-lora": ("qat-lora", W4, None),
        "qat-lora, learned scales": ("qat-lora", W4, "rtn"), "scales": ("scales", W4, None),
    }  # fmt: skip
    rows = setting.calibration("prose", BATCH)
    batch = next(data.eval_batches(rows, BATCH, 0))
    ready: dict[str, tuple[nn.Module, Any]] = {}
    for name, (method, to, init) in kinds.items():
        there = setting.copy()
        for step in method_steps(method, to, {"data": rows}, init=init):
            if isinstance(step, Train):
                break
            with torch.no_grad():
                step(there)
        trainable(there.model)
        parameters = [p for p in there.model.parameters() if p.requires_grad]
        ready[name] = there.model.train(), torch.optim.AdamW(parameters, lr=1e-6)
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(ROUNDS + 1):
        for name, (model, optimizer) in ready.items():
            began = time.perf_counter()
            logits, labels = targets(model, batch)
            nn.functional.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds[name].append(time.perf_counter() - began)
            del logits
    found = {name: median(s[1:]) for name, s in seconds.items()}  # the first of each allocates
    for name, s in found.items():
        against = next((n for n in ("lora", "full") if name != n and n in name.replace("qat", "full")), None)
        ratio = None if against is None else round(s / found[against], 3)
        yield {
            "what": f"{BATCH} x {LENGTH} tokens",
            "name": name,
            "seconds": round(s, 2),
            "over": against,
            "ratio": ratio,
        }
