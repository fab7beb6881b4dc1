"""The steps that methods are lists of. Each is a row in STEPS: its fields are the keys of a recipe."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import nn

from halfbyte import adapters, calibrate, data, evaluate, kv_cache, layers, models, observe, plan, resume, self_samples
from halfbyte.errors import InputError
from halfbyte.formats import Format
from halfbyte.run import Run, attach_from, check_static, dequantize, disk_bytes, freeze, load, see_through, to_scheme
from halfbyte.solvers import solver
from halfbyte.train import TrainingArguments, train
from halfbyte.transforms import Target, transform

T = TypeVar("T")
Positive = Annotated[int, Field(ge=1)]
LEARNING_RATES = {"adapters": 2e-4, "stored": 2e-5, "qat": 1e-5, "scales": 1e-4}


def checked(make: Callable[[], T]) -> T:
    """Calls `make`, which makes a pydantic model; what that finds wrong becomes one sentence. Raises InputError."""
    try:
        return make()
    except ValidationError as e:
        first = e.errors()[0]
        if isinstance(own := first.get("ctx", {}).get("error"), InputError):
            raise own from None
        key = ".".join(str(p) for p in first["loc"])
        said = {"extra_forbidden": "there is no such key", "missing": "it is missing"}.get(first["type"])
        said = said or f"{first['msg'].replace('Input', 'it', 1)} (got {str(first['input'])[:60]!r})"
        raise InputError(f"{key or 'value'}: {said}.") from None


class Step(BaseModel):
    """Something done to a run. Fields are checked when it is made: InputError for a misspelt or impossible one."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    if not TYPE_CHECKING:  # a type checker knows the fields better

        def __init__(self, **settings: Any) -> None:
            checked(lambda: super(Step, self).__init__(**settings))

    def __call__(self, run: Run) -> None:
        """Moves the run on. Raises InputError for what cannot be done."""
        raise TypeError(f"{type(self).__name__} is no step by itself.")


class Adapt(Step):
    """Adds an adapter to every weight that target_modules meets. Further keys are the adapter's settings.

    path: go on from a PEFT adapter folder instead; its settings and targets then hold.
    """

    model_config = ConfigDict(extra="allow")
    adapter: str = "lora"
    target_modules: str | list[str] = "all-linear"
    path: str | None = None

    def __call__(self, run: Run) -> None:
        if adapters.attached(run.model):
            return  # the model was an adapter folder: training goes on with it
        if run.notes.get("input_search"):
            raise InputError(
                "an adapter's folder has no place for the scales of inputs that this run found: save the quantized "
                "model first, then train an adapter on its folder."
            )
        if self.path is not None:
            attach_from(run, Path(self.path))
            return
        torch.manual_seed(run.seed)  # so that A does not depend on what ran before
        names = adapters.targets(run.model, models.roles(run.model), self.target_modules)
        try:
            adapters.attach(run.model, names, self.adapter, **(self.model_extra or {}))
        except TypeError as e:
            raise InputError(f"adapter {self.adapter}: {e}.") from None
        run.notes["adapter"] = {"adapter": self.adapter, **(self.model_extra or {})}


class Grid(Step):
    """Weights are seen through the scheme's formats from now on; inputs too, where it rounds them."""

    scheme: Any
    group_size: int | None = None
    how: str = "minmax"

    @model_validator(mode="after")
    def _known(self) -> Self:
        chosen = to_scheme(self.scheme, self.group_size)  # a misspelt one fails when the step is made, not at its turn
        if chosen.static:  # scales of inputs would be those of the weights as they were before training
            raise InputError(
                f"{chosen.name} rounds inputs by scales that are found on text: train through a scheme that rounds by "
                f"token, such as W8A8, then quantize the result to {chosen.name} with --calibration FILE."
            )
        return self

    def __call__(self, run: Run) -> None:
        see_through(run, to_scheme(self.scheme, self.group_size), self.how)


class Dequantize(Step):
    """Makes floats of what is codes, in the model's dtype: for what is to be trained or rounded itself."""

    def __call__(self, run: Run) -> None:
        dequantize(run)


class Calibrated(Step):
    """calibration: a file, records, an encoded Dataset, "self" (what the model writes itself) or "none"; left out it is
    "self" where text is needed. samples: rows of max_length tokens of it; 32, or 16 of the model's own."""

    calibration: Any = None
    samples: Positive | None = None
    max_length: Positive = evaluate.CONTEXT
    on_token: Any = None

    @property
    def _text(self) -> Any:
        """What is read for calibration: a source of records, "self", or None."""
        raise TypeError(f"{type(self).__name__} is no step by itself.")

    def _rows(self, run: Run) -> data.Dataset | None:
        if self._text is None or isinstance(self._text, data.Dataset):
            return self._text
        most = getattr(run.model.config, "max_position_embeddings", None) or self.max_length
        length = min(self.max_length, most)
        if isinstance(self._text, str) and self._text == "self":
            run.read_weights()
            told = {} if self.on_token is None else {"on_token": self.on_token}
            return self_samples.sample(
                run.model, run.needs_tokenizer, self.samples or self_samples.ROWS, length, run.seed, **told
            )
        return data.encode(read(self._text), run.needs_tokenizer, length)

    def _most(self, rows: data.Dataset) -> int:
        return min(len(rows), self.samples or (16 if self._text == "self" else 32))

    def _batches(self, run: Run, rows: data.Dataset, most: int | None) -> list[data.Batch]:
        stream = data.batches(rows, 1, seed=run.seed, pad_token_id=pad_id(run))
        return [next(stream) for _ in range(most or len(rows))]


class Transform(Calibrated):
    """Makes the float model, codes dequantized, another one that computes the same and quantizes better: a row of
    TRANSFORMS by name. scheme: what it is to be quantized to, for those that take text. untie: whether the head may get
    a weight of its own. seed: of what is drawn at random; the run's if left out."""

    name: str
    scheme: Any = None
    group_size: int | None = None
    untie: bool = False
    seed: int | None = None

    @model_validator(mode="after")
    def _known(self) -> Self:
        row = transform(self.name)
        if row.needs_data and self.scheme is None:
            raise InputError(f"{row.name} is done for a scheme: say which the model is to be quantized to.")
        if row.needs_data and self._text is None:
            raise InputError(f"--calibration none: {row.name} needs text; give a FILE, or self.")
        if self.scheme is not None:
            to_scheme(self.scheme, self.group_size)
        return self

    @property
    def _text(self) -> Any:
        if not transform(self.name).needs_data or (isinstance(self.calibration, str) and self.calibration == "none"):
            return None
        return "self" if self.calibration is None else self.calibration

    def check(self, run: Run) -> models.Edges:
        """Where the channels of a run's model go. Raises InputError, before weights are read, if the transform cannot
        be done to it."""
        if adapters.attached(run.model) or any(w.grid is not None for w in layers.weights(run.model).values()):
            raise InputError(f"{self.name} changes weights: merge the adapter of {run.loaded.source} first.")
        found = models.edges(run.model)
        apart = replace(found, tied=found.tied and not self.untie)
        if (why := transform(self.name).refuses(apart)) is not None:
            raise InputError(f"{self.name} cannot be done to {run.loaded.source}: {why}.")
        return found

    def adds(self, run: Run) -> int:
        """Bytes that the model will take more, for the weight that the head gets."""
        found = models.edges(run.model)
        return models.head_bytes(run.model) if transform(self.name).refuses(found) is not None else 0

    def __call__(self, run: Run) -> None:
        edges, row = self.check(run), transform(self.name)
        run.read_weights()
        run.from_disk = False  # what is there is not what the weights are from now on
        dequantize(run)
        note: dict[str, Any] = {"name": row.name}
        if row.refuses(edges) is not None:
            note["added_bytes"] = models.head_bytes(run.model)
            models.untie(run.model)
            edges = self.check(run)
        targets, fed = {}, {}
        if row.needs_data:
            made = plan.plan(run.model, to_scheme(self.scheme, self.group_size))
            targets = {e.name.removesuffix(".weight"): Target(e.after, e.input) for e in made if e.after is not None}
        if (rows := self._rows(run)) is not None:
            first = [e.readers[0] for block in edges.blocks for e in block]
            fed = observe.fed(run.model, first, self._batches(run, rows, self._most(rows)), run.seed)
        note |= row.apply(run.model, edges, fed, targets, run.seed if self.seed is None else self.seed)
        run.notes.setdefault("transforms", []).append(note)


class Freeze(Calibrated):
    """Makes codes: by a scheme and a solver, or without a scheme each weight by its own grid. keep: weights that are
    codes already stay as they are. inputs: how the scales of static inputs are found on the calibration text, minmax,
    percentile-P or mse. imatrix: a file of llama.cpp's, the importance of inputs, instead of calibration text.

    A run whose weights are still on disk is quantized a block at a time, and goes on from what its checkpoint holds."""

    scheme: Any = None
    keep: bool = False
    group_size: int | None = None
    solver: str = "rtn"
    imatrix: str | Path | None = None
    inputs: str = "mse"
    on_block: Any = None
    on_batch: Any = None

    @model_validator(mode="after")
    def _known(self) -> Self:
        by = solver(self.solver)
        if self.imatrix is not None and (by.needs_data or self.scheme is None):
            raise InputError(f"--imatrix {self.imatrix}: {by.name} takes none; --calibration FILE gives it more.")
        if self.imatrix is not None and self.calibration is not None:
            raise InputError("--imatrix or --calibration: both say which inputs matter; give one of them.")
        observe.check(self.inputs)
        if self.scheme is not None:
            check_static(to_scheme(self.scheme, self.group_size), self._text)
            if by.needs_data and self._text is None:
                raise InputError(f"--calibration none: {by.name} needs text; give a FILE, or self.")
        return self

    @property
    def _text(self) -> Any:
        """What is read for calibration: a source of records, "self", or None."""
        if isinstance(self.calibration, str) and self.calibration == "none":
            return None
        if self.calibration is not None or self.scheme is None or self.imatrix is not None:
            return self.calibration
        needed = solver(self.solver).needs_data or to_scheme(self.scheme, self.group_size).static
        return "self" if needed else None

    def __call__(self, run: Run) -> None:
        if self.scheme is None:
            for name, w in layers.weights(run.model).items():
                if w.grid is not None:
                    if run.log is not None and isinstance(w.stored, torch.nn.Parameter) and not w.adapters:
                        run.masters[name] = w.base().detach().clone()
                    w.freeze()
            run.notes["stored"] = run.notes.pop("grid", None)
            return
        chosen, by = to_scheme(self.scheme, self.group_size), solver(self.solver)
        squares = None if self.imatrix is None else models.importance(run.model, self.imatrix)
        rows = self._rows(run)
        most = None if rows is None else self._most(rows)
        told = {k: f for k, f in (("on_block", self.on_block), ("on_batch", self.on_batch)) if f is not None}
        freeze(
            run, chosen, by, None if rows is None else self._batches(run, rows, most), keep=self.keep,
            inputs=self.inputs, squares=squares, store=self._store(run, chosen, by, rows, most), **told,
        )  # fmt: skip

    def _store(self, run: Run, chosen: Any, by: Any, rows: data.Dataset | None, most: int | None) -> calibrate.Store:
        """Where weights are meanwhile: on disk, but for a block, if the run has a place to keep what is found."""
        if run.checkpoint is None or not run.from_disk:
            run.read_weights()
            return calibrate.IN_MEMORY
        settings = {
            "weights": models.identity(run.loaded.path), "dtype": str(run.loaded.config.dtype), "seed": run.seed,
            "scheme": chosen.notation(), "solver": by.name, "keep": self.keep, "samples": most,
            "text": None if rows is None else rows.sha256,
            "imatrix": None if self.imatrix is None else models.identity(Path(self.imatrix)),
        }  # fmt: skip
        return models.Blockwise(run.loaded, run.checkpoint, settings)


class Merge(Step):
    """Folds the adapters into their weights. base "trained": into what they were trained on (dequantized, for
    QLoRA); "original": into the checkpoint's own weights."""

    base: str = "trained"

    def __call__(self, run: Run) -> None:
        if self.base not in ("trained", "original"):
            raise InputError(f"--base {self.base}: it is trained or original.")
        if not adapters.attached(run.model):
            raise InputError(f"{run.loaded.source} has no adapter to merge.")
        if self.base == "original":
            fresh = layers.weights(models.load(run.loaded.source, run.loaded.config.dtype).model)
            for name, w in layers.weights(run.model).items():
                if isinstance(w.stored, layers.Codes):
                    w.store(fresh[name].base().detach())
        for w in layers.weights(run.model).values():
            w.merge()
        if not run.holds_as_it_is():  # a base from a file of another kind: the result is a 16-bit model
            dequantize(run)
        run.notes.pop("stored", None)
        run.notes["merged"] = self.base


class Train(Step):
    """Trains adapters if there are any, else scales if the weights are codes, else the whole model.

    steps or epochs (3 by default); learning_rate: by what is trained if left out. eval_split takes that share
    of the records away from training. Text longer than max_length is split.
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
            "training": {**vars(args), "batch_size": self.batch_size, "max_length": self.max_length, "seed": run.seed},
        }  # fmt: skip
        torch.manual_seed(run.seed)
        where = run.checkpoint
        begun = None if where is None else resume.load(where, notes)
        done = 0 if begun is None else len(begun.curve) * args.gradient_accumulation_steps
        run.log = train(
            run.model,
            data.batches(rows, self.batch_size, seed=run.seed, pad_token_id=pad_id(run), start=done),
            args,
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


class Evaluate(Step):
    """Adds a row to the ledger. data: a file, records, or "self": rows that the reference writes itself, max_windows
    of them or 16. against: a MODEL, read in float32, or an evaluate.Reference. kv_cache: a format that the model's
    keys and values are seen through, as kv_cache.parse reads it."""

    data: Any
    against: Any = None
    stage: str = "evaluate"
    context: int = evaluate.CONTEXT
    batch_size: Positive = 4
    max_windows: Positive | None = None
    kv_cache: str | None = None
    max_kl: float | None = None
    max_loss: float | None = None
    on_batch: Any = None
    on_token: Any = None

    @model_validator(mode="after")
    def _known(self) -> Self:
        if _is_self(self.data) and self.against is None:
            raise InputError("--data self are the reference's own samples: name the reference by --against MODEL.")
        self._cache()
        return self

    def _cache(self) -> Format | None:
        return None if self.kv_cache is None else kv_cache.parse(self.kv_cache)

    def __call__(self, run: Run) -> None:
        row = self._on_samples(run) if _is_self(self.data) else self._on_records(run, read(self.data))
        row.bytes = sum(map(disk_bytes, run.files)) if self.stage == "evaluate" else 0
        row.bits_per_weight = run.bits_per_weight()
        run.rows.append((self.stage, row.as_dict()))
        evaluate.check_budget(row, self.max_kl, self.max_loss)

    def _on_samples(self, run: Run) -> evaluate.Row:
        if not run.causal:
            raise InputError("--data self: a classifier writes no text; give it labelled records.")
        reference, tokenizer = self._reference(), run.needs_tokenizer
        assert reference is not None
        n, told = self.max_windows or self_samples.ROWS, {} if self.on_token is None else {"on_token": self.on_token}
        rows = self_samples.sample(reference.model, tokenizer, n, self.context, **told)
        return self._measure(run, rows, reference)

    def _on_records(self, run: Run, records: list[data.Record]) -> evaluate.Row:
        tokenizer = run.needs_tokenizer
        if not run.causal:
            if self.kv_cache is not None:
                raise InputError("--kv-cache: a classifier keeps no keys and values.")
            return evaluate.classification(
                run.model, data.encode_classification(records, tokenizer, self.context, run.labels)
            )
        rows = data.encode(records, tokenizer, self.context, packing=records[0].kind == "text")
        check_length(rows, run, "--context")
        if self.max_windows is not None:
            rows.rows[:] = rows.rows[: self.max_windows]
        row = self._measure(run, rows, self._reference())
        if records[0].kind == "label":
            row.accuracy, row.accuracy_error = evaluate.accuracy(
                run.model, records, tokenizer, self.context, self._cache()
            )
        return row

    def _reference(self) -> evaluate.Reference | None:
        if self.against is None or isinstance(self.against, evaluate.Reference):
            return self.against
        other = self.against if isinstance(self.against, Run) else load(self.against, torch.float32)
        return evaluate.Reference(other.model)

    def _measure(self, run: Run, rows: data.Dataset, reference: evaluate.Reference | None) -> evaluate.Row:
        told = {} if self.on_batch is None else {"on_batch": self.on_batch}
        row = evaluate.measure(run.model, rows, reference, self.batch_size, cache=self._cache(), **told)
        row.context = self.context
        return row


def _is_self(source: Any) -> bool:
    return isinstance(source, str) and source == "self"


def check_length(rows: data.Dataset, run: Run, flag: str) -> None:
    """Raises InputError if a row is longer than the model has positions for."""
    longest, most = max(map(len, rows.rows)), getattr(run.model.config, "max_position_embeddings", None)
    if most is not None and longest > most:
        raise InputError(f"rows of {longest} tokens are more than the {most} that this model takes: {flag} {most}.")


def read(source: Any) -> list[data.Record]:
    """Records from a file's path, or from objects given in Python."""
    if isinstance(source, str | Path):
        return data.read_records(source)
    source = list(source)
    return source if source and isinstance(source[0], data.Record) else data.records(source)


def pad_id(run: Run) -> int:
    """What rows are filled up with; it is never trained, so that any id will do."""
    pad = run.needs_tokenizer.pad_token_id
    return pad if pad is not None else data.end_of_text(run.tokenizer)


STEPS: dict[str, type[Step]] = {
    "adapt": Adapt, "dequantize": Dequantize, "grid": Grid, "freeze": Freeze, "merge": Merge, "train": Train,
    "transform": Transform, "evaluate": Evaluate,
}  # fmt: skip
