"""Training: what a Train step trains, and on what."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from halfbyte import adapters, data, evaluate, layers, resume
from halfbyte.distill import Distillation, asked, kl_of_likeliest, likeliest, remembered
from halfbyte.errors import InputError
from halfbyte.kernels.half import half_layers
from halfbyte.run import FORM, Run
from halfbyte.steps.step import Positive, Step, check_length, pad_id, read
from halfbyte.steps.trained import settle, sleep, trainable
from halfbyte.train import LossOf, Pace, TrainingArguments, loss_sum, matrices_decay, train

SHARES = {"kl": 1.0, "both": 0.5}  # of the divergence in a loss
ENCODING = ("max_length", "packing", "completion_only_loss", "assistant_only_loss")  # how records become rows
_OWN = (*ENCODING, "eval_split", "batch_size", "loss", "scale_lr_ratio", "loraplus_lr_ratio", "norms",
        "fake_quant_after_n_steps", "bf16")  # fmt: skip
_BEGUN_FROM = ("grid", "grid_search", "stored", "solver", "teacher", "transforms")  # notes of the steps before
LEARNING_RATES = {"adapters": 2e-4, "stored": 2e-5, "qat": 1e-5, "scales": 2e-5}


class Train(Step):
    """Trains adapters if there are any, else scales if the weights are codes, else the whole model.

    data, eval_data: a file, records, or an encoded Dataset. eval_split takes that share of the records away from
    training. steps or epochs (3 by default); learning_rate: by what is trained if left out. Text longer than max_length
    is split. loss: ce, the cross-entropy of the text; kl, the divergence from what the run's teacher predicts; or both,
    halves of each.

    scale_lr_ratio, loraplus_lr_ratio: the learning rates of scales and zeros, where other parameters are trained with
    them, and of LoRA's B (LoRA+, arXiv:2402.12354), over learning_rate. norms: whether norms are trained beside scales.
    fake_quant_after_n_steps: steps in which nothing is seen through its grid yet. cache_teacher: whether the teacher is
    run once, its last hidden states kept on disk beside the output and its head run on them in every step.
    teacher_top_k: what is kept instead are that many of the likeliest tokens, which takes less where a model is wide,
    and nothing of the teacher stays in memory. bf16: whether products are computed in bfloat16 (half_layers) where
    the model is in float32; what is trained stays so.
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
    scale_lr_ratio: Annotated[float, Field(gt=0)] = 1.0
    loraplus_lr_ratio: Annotated[float, Field(gt=0)] = 1.0
    norms: bool = False
    fake_quant_after_n_steps: Annotated[int, Field(ge=0)] = 0
    cache_teacher: bool = False
    teacher_top_k: Positive | None = None
    bf16: bool = False
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
        what = trainable(run.model, self.norms)
        self._check_ratios(run.model)
        args = self._arguments(what, len(rows), run)
        if held is not None and not args.eval_steps:
            args = replace(args, eval_steps=max(1, args.steps // 10))
        if self.on_start:
            self.on_start(rows, held, args, what)
        notes = {
            "base_sha256": run.loaded.sha256,
            "dtype": (any(map(run.notes.get, FORM)) and run.notes.get("dtype"))
            or str(run.loaded.config.dtype).removeprefix("torch."),
            "data_sha256": rows.sha256, "data_kind": rows.kind, "data_tokens": rows.tokens, "trained": what,
            "adapter": run.notes.get("adapter"),
            "training": {**vars(args), **{k: getattr(self, k) for k in _OWN}, "seed": run.seed},
            **({} if held is None else {"eval_data_sha256": held.sha256}),
        }  # fmt: skip
        torch.manual_seed(run.seed)
        where = run.checkpoint
        same = {**notes, **{k: run.notes.get(k) for k in _BEGUN_FROM}}
        begun = None if where is None else resume.load(where, same)
        done = 0 if begun is None else len(begun.curve) * args.gradient_accumulation_steps
        sleep(run.model, self.fake_quant_after_n_steps > (0 if begun is None else len(begun.curve)))
        with resume.scratch(where) as states:
            run.log = train(
                run.model,
                self._stream(rows, run, done),
                args,
                loss_of=self._in_bf16(self._loss(run, rows, args, states)),
                pace=self._pace,
                begun=begun,
                on_step=lambda row: self._after(run.model, row),
                evaluate=None if held is None else lambda: _held_out_loss(run.model, held),
                save=None if where is None else lambda state: resume.save(where, state, same),
            )
        settle(run.model)
        run.notes |= notes
        for key, source in (("data", self.data), ("eval_data", self.eval_data)):
            if isinstance(source, str | Path):
                run.notes[key] = str(Path(source).absolute())

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.cache_teacher and self.loss == "ce":
            raise InputError("--cache-teacher: the loss asks no teacher; add --loss kl or --loss both.")
        if self.teacher_top_k is not None and not self.cache_teacher:
            raise InputError("--teacher-top-k says what of a teacher is kept: add --cache-teacher.")
        if self.steps is not None:
            self._check_warm_up(self.steps)
        return self

    def _check_warm_up(self, steps: int) -> None:
        if self.fake_quant_after_n_steps >= steps:
            raise InputError(
                f"--fake-quant-after-n-steps {self.fake_quant_after_n_steps}: none of {steps} steps would see the grid."
            )

    def _check_ratios(self, model: nn.Module) -> None:
        trained = [n.split(".") for n, p in model.named_parameters() if p.requires_grad]
        if self.scale_lr_ratio != 1 and not any(_is_scale(parts) for parts in trained):
            raise InputError(
                "--scale-lr-ratio: no scale is learned here; --init SOLVER or --method scales learns them."
            )
        if self.loraplus_lr_ratio != 1 and not any(parts[-1] == "lora_B" for parts in trained):
            raise InputError("--loraplus-lr-ratio: no LoRA is trained here; leave it out.")

    def _after(self, model: nn.Module, row: dict[str, float]) -> None:
        sleep(model, self.fake_quant_after_n_steps > row["step"])
        if self.on_step:
            self.on_step(row)

    def _pace(self, name: str, p: nn.Parameter) -> Pace:
        parts = name.split(".")
        if _is_scale(parts):
            return Pace(self.scale_lr_ratio, decays=False)
        return Pace(self.loraplus_lr_ratio) if parts[-1] == "lora_B" else matrices_decay(name, p)

    def _stream(self, rows: data.Dataset, run: Run, done: int = 0) -> Iterator[data.Batch]:
        return data.batches(rows, self.batch_size, seed=run.seed, pad_token_id=pad_id(run), start=done)

    def held_out_loss(self, run: Run, records: list[data.Record]) -> float:
        """The loss on records, as it is measured while training: eval_loss in a ledger. Raises InputError for records
        that cannot be encoded."""
        return _held_out_loss(run.model, self._encode(records, run))

    def _loss(self, run: Run, rows: data.Dataset, args: TrainingArguments, folder: Path) -> LossOf:
        """folder: for what is kept of the teacher."""
        if self.loss == "ce":
            return loss_sum
        if run.teacher is None:
            raise InputError(f"loss {self.loss} needs a teacher: add a teacher step before what changes the weights.")
        share = SHARES[self.loss]
        if not self.cache_teacher:
            return Distillation(asked(run.teacher), share)
        once = min(args.steps * args.gradient_accumulation_steps, math.ceil(len(rows) / self.batch_size))
        batches, file = islice(self._stream(rows, run), once), folder / "teacher"
        teacher, run.teacher = run.teacher, None
        if self.teacher_top_k is not None:
            return Distillation(likeliest(teacher, self.teacher_top_k, batches, file), share, kl_of_likeliest)
        head = teacher.get_output_embeddings()
        if head is None:
            raise InputError("--cache-teacher: this model has no head to be run again; leave it out.")
        return Distillation(remembered(teacher, head, batches, file), share)

    def _in_bf16(self, loss_of: LossOf) -> LossOf:
        if not self.bf16:
            return loss_of

        def loss(model: nn.Module, batch: data.Batch) -> Tensor:
            with half_layers(batch.input_ids.device.type):
                return loss_of(model, batch)

        return loss

    def _records(self, run: Run) -> tuple[Any, Any]:
        """What is trained on, and what is held out, if anything is: records, or an encoded Dataset."""
        records = _given(self.data)
        if self.eval_data is not None:
            return records, _given(self.eval_data)
        if self.eval_split and isinstance(records, data.Dataset):
            raise InputError("eval_split takes records away: of data that is encoded, give eval_data.")
        return data.split(records, self.eval_split, run.seed) if self.eval_split else (records, None)

    def _encode(self, given: Any, run: Run) -> data.Dataset:
        rows = given if isinstance(given, data.Dataset) else self._rows(given, run)
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
        if self.fake_quant_after_n_steps and not gridded:
            raise InputError("--fake-quant-after-n-steps: nothing is seen through a grid here; leave it out.")
        self._check_warm_up(steps)
        keep = ("gradient_accumulation_steps", "lr_scheduler_type", "warmup_ratio", "weight_decay", "max_grad_norm",
                "gradient_checkpointing", "eval_steps", "save_steps")  # fmt: skip
        return TrainingArguments(
            steps=steps,
            learning_rate=rate if self.learning_rate is None else self.learning_rate,
            **{k: getattr(self, k) for k in keep},
        )


def _is_scale(name: list[str]) -> bool:
    """Whether the parts of a parameter's name are those of a scale or a zero: of a grid, or of codes."""
    return len(name) > 1 and name[-2] in ("grid", "stored")


def _given(source: Any) -> Any:
    return source if isinstance(source, data.Dataset) else read(source)


def _held_out_loss(model: nn.Module, held: data.Dataset) -> float:
    if held.kind == "classification":
        return evaluate.classification(model, held).loss or 0.0
    return evaluate.measure(model, held).loss or 0.0
