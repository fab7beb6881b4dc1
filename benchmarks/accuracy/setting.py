"""What all contenders are measured on: one model, its own logits, text that nothing was calibrated or chosen on."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import novels
import torch

from halfbyte import data, evaluate, models, run, sample_data, self_samples
from halfbyte.cli.demo import packaged
from halfbyte.layers import ops
from halfbyte.run import Run

LENGTH = 512
TEXTS = {"prose": sample_data.domain_text, "docstrings": sample_data.docstring_task}


def off_the_grid(model: torch.nn.Module, role: dict[str, str]) -> None:
    """Uniform noise of half a step of every block of 32 in every projection, in place."""
    generator = torch.Generator().manual_seed(0)
    for name, op in ops(model):
        if role[name] == "linear":
            blocks = op.weight.base().detach().clone().reshape(-1, 32)
            step = (blocks.amax(1, keepdim=True) - blocks.amin(1, keepdim=True)) / 15
            blocks += (torch.rand(blocks.shape, generator=generator) - 0.5) * step
            op.weight.store(blocks.reshape(op.weight.shape).bfloat16().float())


@dataclass
class Setting:
    """windows: of each text that is measured on. held_out: whether that is the held-out part; otherwise it is windows
    of the training part that calibration does not see, for experiments. rows: of calibration text. novels: the file
    that prose is taken from (see novels.py) instead of from the demo's domain."""

    windows: int = 6
    held_out: bool = True
    rows: int = 16
    novels: Path | None = None
    _known: dict[str, data.Dataset] = field(default_factory=dict)

    @cached_property
    def reference(self) -> Run:
        """SmolLM2-135M in float32, off the Q4_1 grid that its package keeps it on."""
        found = run.load(packaged(), "float32")
        run.dequantize(found)
        off_the_grid(found.model, models.roles(found.model))
        return found

    @cached_property
    def texts(self) -> dict[str, data.Dataset]:
        return {name: self._measured_on(name) for name in TEXTS}

    def _measured_on(self, name: str) -> data.Dataset:
        if self._of_novels(name) and not self.held_out:
            found = self._whole(name)
        else:
            part = self._split(name)["heldout" if self.held_out else "train"]
            found = data.encode(data.records(part[:400]), self.reference.tokenizer, LENGTH)
        step = len(found) // self.windows if self._of_novels(name) and self.held_out else 1  # of all of the novel
        return replace(found, rows=found.rows[::step][: self.windows])

    def _of_novels(self, name: str) -> bool:
        return self.novels is not None and name == "prose"

    def _split(self, name: str) -> sample_data.Split:
        return novels.split(self.novels) if self.novels and self._of_novels(name) else TEXTS[name]()

    @cached_property
    def references(self) -> dict[str, evaluate.Reference]:
        return {k: evaluate.Reference(self.reference.model, keep=2_000_000_000) for k in self.texts}

    def _written(self, rows: int) -> data.Dataset:
        """So many rows that the model writes itself, which takes long."""
        found = self._known.get("self")
        if found is None or len(found) < rows:
            found = self_samples.sample(self.reference.model, self.reference.tokenizer, rows, LENGTH)
            self._known["self"] = found
        return found

    def training(self, name: str) -> data.Dataset:
        """All rows of LENGTH tokens of a text that calibration is taken from."""
        if name not in self._known:
            self._known[name] = self._calibration(name)
        return self._known[name]

    def calibration(self, name: str, rows: int | None = None) -> data.Dataset:
        """Rows of LENGTH tokens: of one of TEXTS' training part, or "self"."""
        wanted = rows or self.rows
        found = self._written(wanted) if name == "self" else self.training(name)
        assert len(found) >= wanted, f"{name} has {len(found)} rows, not {wanted}."
        return replace(found, rows=found.rows[:wanted])

    def _calibration(self, name: str) -> data.Dataset:
        found = self._whole(name)
        return replace(found, rows=found.rows[0 if self.held_out else self.windows :])

    def _whole(self, name: str) -> data.Dataset:
        # all that a record says, as text: peers take whole rows of tokens
        texts = [{"text": r.get("text") or r["prompt"] + r["completion"]} for r in self._split(name)["train"]]
        found = data.windows(data.records(texts), self.reference.tokenizer, LENGTH)
        whole = [r for r in found.rows if len(r) == LENGTH]
        if self._of_novels(name):  # so that a few are of all novels
            random.Random(0).shuffle(whole)
        return replace(found, rows=whole)

    def copy(self) -> Run:
        return copy.deepcopy(self.reference)

    def measured(self, there: Run) -> dict[str, Any]:
        """Of each text: the mean KL and its error, the difference of losses and its 95% interval, and how often the
        likeliest token is the same."""
        out = {}
        for name, rows in self.texts.items():
            m = evaluate.measure(there.model, rows, self.references[name])
            interval = [m.loss_difference, m.loss_difference_low, m.loss_difference_high]
            out[name] = {
                "kl": [m.kl_mean, m.kl_error], "loss": interval, "top1": m.top1_agreement, "perplexity": m.perplexity
            }  # fmt: skip
        return out

    def noise_floor(self) -> dict[str, Any]:
        """The reference against itself, computed in bfloat16."""
        there = self.copy()
        there.model.to(torch.bfloat16)
        return self.measured(there)
