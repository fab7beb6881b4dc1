"""What text tells: transforms, and codes."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from pydantic import model_validator

from halfbyte import adapters, calibrate, data, evaluate, layers, models, observe, plan, self_samples
from halfbyte.errors import InputError
from halfbyte.run import Run, dequantize, freeze, learn_from_codes
from halfbyte.scheme import check_static, to_scheme
from halfbyte.solvers import solver
from halfbyte.steps.step import Positive, Step, is_word, pad_id, read
from halfbyte.transforms import Target, transform

_log = logging.getLogger("halfbyte")
ROWS = 32  # of calibration text, where it is a file or records


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

    @property
    def writes(self) -> bool:
        """Whether the model writes the text itself."""
        return is_word(self._text, "self")

    @property
    def most(self) -> int:
        """Rows of text, where there are so many; 0 where none is needed."""
        return 0 if self._text is None else self.samples or (self_samples.ROWS if self.writes else ROWS)

    def check_text(self, run: Run) -> None:
        """Raises InputError, before weights are read, for a model that the text cannot be put to."""
        if self._text is None or isinstance(self._text, data.Dataset):
            return
        _ = run.needs_tokenizer
        if self.writes and not self_samples.able(run.model):
            raise InputError(f"{run.loaded.source} does not write text of its own: give it some, --calibration FILE.")

    def _rows(self, run: Run) -> data.Dataset | None:
        self.check_text(run)
        if self._text is None or isinstance(self._text, data.Dataset):
            return self._text
        length = min(self.max_length, getattr(run.model.config, "max_position_embeddings", None) or self.max_length)
        if length < self.max_length != evaluate.CONTEXT:
            _log.warning("--max-length %d: this model takes %d tokens, and is given as many", self.max_length, length)
        if self.writes:
            run.read_weights()
            told = {} if self.on_token is None else {"on_token": self.on_token}
            return self_samples.sample(run.model, run.needs_tokenizer, self.most, length, run.seed, **told)
        found = data.encode(read(self._text), run.needs_tokenizer, length)
        if len(found) < (self.samples or 0):
            _log.warning("--samples %d: the calibration text has %d rows, and all are taken", self.samples, len(found))
        return found

    def _most(self, rows: data.Dataset) -> int:
        return min(len(rows), self.most)

    def _batches(self, run: Run, rows: data.Dataset) -> list[data.Batch]:
        stream = data.batches(rows, 1, seed=run.seed, pad_token_id=pad_id(run))
        return [next(stream) for _ in range(self._most(rows))]


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
        if not transform(self.name).needs_data or is_word(self.calibration, "none"):
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
            fed = observe.fed(run.model, first, self._batches(run, rows), run.seed)
        note |= row.apply(run.model, edges, fed, targets, run.seed if self.seed is None else self.seed)
        run.notes.setdefault("transforms", []).append(note)


class Freeze(Calibrated):
    """Makes codes: by a scheme and a solver, or without a scheme each weight by its own grid. keep: weights that are
    codes already stay as they are. inputs: how the scales of static inputs are found on the calibration text, minmax,
    percentile-P or mse. imatrix: a file of llama.cpp's, the importance of inputs, instead of calibration text.

    learn: weights stay floats, the nearest to what they were that have the codes found, and are seen through grids
    whose scales are learned from those found on.

    work: a folder to keep each block's codes in, so that the same step goes on from those that are there; a run whose
    weights are still on disk is then quantized a block at a time."""

    scheme: Any = None
    keep: bool = False
    group_size: int | None = None
    solver: str = "rtn"
    imatrix: str | Path | None = None
    inputs: str = "mse"
    learn: bool = False
    work: Path | None = None
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
            if self.learn and self.keep:
                raise InputError("codes that are kept have no floats to learn: leave out keep, or learn.")
            if by.needs_data and self._text is None:
                raise InputError(f"--calibration none: {by.name} needs text; give a FILE, or self.")
        return self

    @property
    def _text(self) -> Any:
        """What is read for calibration: a source of records, "self", or None."""
        if is_word(self.calibration, "none"):
            return None
        if self.calibration is not None or self.scheme is None or self.imatrix is not None:
            return self.calibration
        needed = solver(self.solver).needs_data or to_scheme(self.scheme, self.group_size).static
        return "self" if needed else None

    def __call__(self, run: Run) -> None:
        if self.scheme is None:
            for name, w in layers.weights(run.model).items():
                if w.grid is not None:
                    if run.log is not None and run.notes.get("trained") == "stored":
                        run.masters[name] = w.base().detach().clone()
                    w.freeze()
            run.let_go()
            run.notes["stored"] = run.notes.pop("grid", None)
            return
        chosen, by = to_scheme(self.scheme, self.group_size), solver(self.solver)
        squares = None if self.imatrix is None else models.importance(run.model, self.imatrix)
        rows = self._rows(run)
        if self.work is not None:
            run.leave_weights()  # which had to be there for the model to write
        if rows is not None:
            run.notes["calibration"] = {"rows": self._most(rows), "sha256": rows.sha256}
        told = {k: f for k, f in (("on_block", self.on_block), ("on_batch", self.on_batch)) if f is not None}
        batches = None if rows is None else data.stacked(self._batches(run, rows), calibrate.TOGETHER)
        floats = {n: w.base().detach() for n, w in layers.weights(run.model).items()} if self.learn else {}
        freeze(
            run, chosen, by, batches, keep=self.keep,
            inputs=self.inputs, squares=squares, store=self._store(run, chosen, by, rows), **told,
        )  # fmt: skip
        if self.learn:
            learn_from_codes(run, floats)

    def _store(self, run: Run, chosen: Any, by: Any, rows: data.Dataset | None) -> calibrate.Store:
        """Where weights are meanwhile: on disk, but for a block, if there is a place to keep what is found."""
        if self.work is None:
            run.read_weights()
            return calibrate.IN_MEMORY
        settings = {
            "weights": models.identity(run.loaded.path), "dtype": str(run.loaded.config.dtype), "seed": run.seed,
            "scheme": chosen.notation(), "solver": by.name, "keep": self.keep,
            "samples": None if rows is None else self._most(rows), "max_length": self.max_length,
            "text": None if rows is None else rows.sha256,
            "imatrix": None if self.imatrix is None else models.identity(Path(self.imatrix)),
            "transforms": run.notes.get("transforms"),
        }  # fmt: skip
        kept = models.Kept(run.loaded, self.work, settings)
        return models.Blockwise(kept) if run.from_disk else calibrate.InMemory(kept)
