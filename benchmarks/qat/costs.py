"""What training costs: rank by rank, and step by step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from statistics import median

import torch
from setting import LENGTH, Setting
from torch import nn
from trials import BATCH, W4, Asked, Trial, chosen, measured, trained

from halfbyte import data
from halfbyte.distill import targets
from halfbyte.kernels.half import half_layers
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
    """Seconds of a step, forward and backward and AdamW's, all methods in turn: the median of rounds. Products in
    bfloat16, as the trainings here have them, then in float32."""
    kinds: dict[str, tuple[str, str | None, str | None]] = {
        "full": ("full", None, None), "qat": ("qat", W4, None), "qat, learned scales": ("qat", W4, "rtn"),
        "lora": ("lora", None, None), "qat-lora": ("qat-lora", W4, None),
        "qat-lora, learned scales": ("qat-lora", W4, "rtn"), "scales": ("scales", W4, None),
    }  # fmt: skip
    rows = setting.calibration("prose", BATCH)
    batch = next(data.eval_batches(rows, BATCH, 0))
    ready = {name: _ready(setting, *kind) for name, kind in kinds.items()}
    for dtype in (torch.bfloat16, torch.float32):
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(ROUNDS + 1):
            for name, (model, optimizer) in ready.items():
                seconds[name].append(_step(model, optimizer, batch, dtype))
        found = {name: median(s[1:]) for name, s in seconds.items()}  # the first of each allocates
        for name, s in found.items():
            against = next((n for n in ("lora", "full") if name != n and n in name.replace("qat", "full")), None)
            yield {"what": f"{BATCH} x {LENGTH} tokens, {str(dtype).removeprefix('torch.')}", "name": name,
                   "seconds": round(s, 2), "over": against,
                   "ratio": None if against is None else round(s / found[against], 3)}  # fmt: skip


def _ready(setting: Setting, method: str, to: str | None, init: str | None) -> tuple[nn.Module, torch.optim.Optimizer]:
    there = setting.copy()
    for step in method_steps(method, to, {"data": setting.calibration("prose", BATCH)}, init=init):
        if isinstance(step, Train):
            break
        with torch.no_grad():
            step(there)
    trainable(there.model)
    parameters = [p for p in there.model.parameters() if p.requires_grad]
    return there.model.train(), torch.optim.AdamW(parameters, lr=1e-6)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: data.Batch, dtype: torch.dtype) -> float:
    began = time.perf_counter()
    with half_layers("cpu") if dtype != torch.float32 else nullcontext():
        logits, labels = targets(model, batch)
        loss = nn.functional.cross_entropy(logits.float(), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - began
