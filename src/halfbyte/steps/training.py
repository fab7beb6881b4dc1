"""Training: what a Train step trains, and on what."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from halfbyte import adapters, data, evaluate, layers, resume
from halfbyte.distill import Distillation
from halfbyte.errors import InputError
from halfbyte.run import Run
from halfbyte.steps.step import Positive, Step, check_length, pad_id, read
from halfbyte.train import TrainingArguments, loss_sum, train

SHARES = {"kl": 1.0, "both": 0.5}  # of the divergence in a loss
LEARNING_RATES = {"adapters": 2e-4, "stored": 2e-5, "qat": 1e-5, "scales": 1e-4}


class Train(Step):
    """Trains adapters if there are any, else scales if the weights are codes, else the whole model.

    steps or epochs (3 by default); learning_rate: by what is trained if left out. eval_split takes that share
    of the records away from training. Text longer than max_length is split. loss: ce, the cross-entropy of the
    text; kl, the divergence from what the run's teacher predicts; or both, halves of each.
    """

    data: Any
    eval_data: Any = None
    eval_split: Annotated[float, Field(ge=0, lt=1)] = 0.0
    steps: Positive | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    batch_size: Positive = 8
    gradient_accumulation_steps: Positive = 1
    max_length: int = 512
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    loss: Literal["ce", "kl", "both"] = "ce"
    lr_scheduler_type: str = "cosine"
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.03
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    eval_steps: Annotated[int, Field(ge=0)] = 0
    save_steps: Annotated[int, Field(ge=0)] = 0
    packing: bool = True
    completion_only_loss: bool = True
    assistant_only_loss: bool = True
    gradient_checkpointing: bool = False
    on_step: Any = None
    on_start: Any = None

    def __call__(self, run: Run) -> None:
        records, held_out = self._records(run)
        rows, held = self._encode(records, run), None if held_out is None else self._encode(held_out, run)
        if not run.causal and adapters.attached(run.model):
            raise InputError("a classification head is trained with --method full: adapters would leave it random.")
        what = trainable(run.model)
        args = self._arguments(what, len(rows), run)
        if held is not None and not args.eval_steps:
            args = replace(args, eval_steps=max(1, args.steps // 10))
        if self.on_start:
            self.on_start(rows, held, args, what)
        notes = {
            "base_sha256": run.loaded.sha256, "dtype": str(run.loaded.config.dtype).removeprefix("torch."),
            "data_sha256": rows.sha256, "data_kind": rows.kind, "data_tokens": rows.tokens, "trained": what,
            "adapter": run.notes.get("adapter"),
            "training": {**vars(args), "loss": self.loss, "batch_size": self.batch_size, "max_length": self.max_length,
                         "seed": run.seed},
        }  # fmt: skip
        torch.manual_seed(run.seed)
        where = run.checkpoint
        begun = None if where is None else resume.load(where, notes)
        done = 0 if begun is None else len(begun.curve) * args.gradient_accumulation_steps
        run.log = train(
            run.model,
            data.batches(rows, self.batch_size, seed=run.seed, pad_token_id=pad_id(run), start=done),
            args,
            loss_of=self._loss(run),
            begun=begun,
            on_step=self.on_step or (lambda row: None),
            evaluate=None if held is None else lambda: _held_out_loss(run.model, held),
            save=None if where is None else lambda state: resume.save(where, state, notes),
        )
        settle(run.model)
        run.notes |= notes
        for key, source in (("data", self.data), ("eval_data", self.eval_data)):
            if isinstance(source, str | Path):
                run.notes[key] = str(Path(source).absolute())

    def _loss(self, run: Run) -> Any:
        if self.loss == "ce":
            return loss_sum
        if run.teacher is None:
            raise InputError(f"loss {self.loss} needs a teacher: add a teacher step before what changes the weights.")
        return Distillation(run.teacher, SHARES[self.loss])

    def _records(self, run: Run) -> tuple[list[data.Record], list[data.Record] | None]:
        records = read(self.data)
        if self.eval_data is not None:
            return records, read(self.eval_data)
        if self.eval_split:
            return data.split(records, self.eval_split, run.seed)
        return records, None

    def _encode(self, records: list[data.Record], run: Run) -> data.Dataset:
        rows = self._rows(records, run)
        check_length(rows, run, "--max-length")
        return rows

    def _rows(self, records: list[data.Record], run: Run) -> data.Dataset:
        if not run.causal:
            return data.encode_classification(records, run.needs_tokenizer, self.max_length, run.labels)
        return data.encode(
            records, run.needs_tokenizer, self.max_length, packing=self.packing,
            completion_only_loss=self.completion_only_loss, assistant_only_loss=self.assistant_only_loss,
        )  # fmt: skip

    def _arguments(self, what: str, rows: int, run: Run) -> TrainingArguments:
        per_epoch = rows / (self.batch_size * self.gradient_accumulation_steps)
        steps = self.steps or max(1, math.ceil((self.epochs or 3) * per_epoch))
        gridded = any(w.grid is not None for w in layers.weights(run.model).values())
        rate = LEARNING_RATES["qat" if what == "stored" and gridded else what]
        keep = ("gradient_accumulation_steps", "lr_scheduler_type", "warmup_ratio", "weight_decay", "max_grad_norm",
                "gradient_checkpointing", "eval_steps", "save_steps")  # fmt: skip
        return TrainingArguments(
            steps=steps,
            learning_rate=rate if self.learning_rate is None else self.learning_rate,
            **{k: getattr(self, k) for k in keep},
        )


def _held_out_loss(model: nn.Module, held: data.Dataset) -> float:
    if held.kind == "classification":
        return evaluate.classification(model, held).loss or 0.0
    return evaluate.measure(model, held).loss or 0.0


def trainable(model: nn.Module) -> str:
    """Marks what a Train step trains, and only that, as requiring a gradient. Says which: adapters, scales or
    stored (everything that is a float)."""
    model.requires_grad_(False)
    if found := adapters.attached(model):
        for adapter in found.values():
            adapter.requires_grad_(True)
        adapters.whole.requires_grad(model)
        return "adapters"
    coded = [w for w in layers.weights(model).values() if isinstance(w.stored, layers.Codes)]
    if coded:
        for w in coded:
            w.store(w.frozen(), learn=True)
        return "scales"
    model.requires_grad_(True)
    return "stored"


@torch.no_grad()
def settle(model: nn.Module) -> None:
    """Ends training: nothing requires a gradient, learned scales are rounded to what the file will hold."""
    model.requires_grad_(False)
    for w in layers.weights(model).values():
        if isinstance(w.stored, layers.Codes) and w.stored.learned:
            w.store(w.stored.q)
    model.eval()
