"""Measuring: rows of the ledger."""

from __future__ import annotations

from typing import Any, Self

import torch
from pydantic import model_validator

from halfbyte import data, evaluate, kv_cache, self_samples
from halfbyte.errors import InputError
from halfbyte.folders import disk_bytes
from halfbyte.formats import Format
from halfbyte.run import Run, load
from halfbyte.steps.step import Positive, Step, check_length, is_word, read


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
        if is_word(self.data, "self") and self.against is None:
            raise InputError("--data self are the reference's own samples: name the reference by --against MODEL.")
        self._cache()
        return self

    def _cache(self) -> Format | None:
        return None if self.kv_cache is None else kv_cache.parse(self.kv_cache)

    def __call__(self, run: Run) -> None:
        row = self._on_samples(run) if is_word(self.data, "self") else self._on_records(run, read(self.data))
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
            rows = data.encode_classification(records, tokenizer, self.context, run.labels)
            row = evaluate.classification(run.model, rows)
            row.context = self.context
            return row
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
        # of a run that something was done to, its files are not what it is
        return evaluate.Reference(other.model, sha256="" if other.notes else other.loaded.sha256)

    def _measure(self, run: Run, rows: data.Dataset, reference: evaluate.Reference | None) -> evaluate.Row:
        told = {} if self.on_batch is None else {"on_batch": self.on_batch}
        row = evaluate.measure(run.model, rows, reference, self.batch_size, cache=self._cache(), **told)
        row.context = self.context
        row.against_sha256 = "" if reference is None else reference.sha256
        return row
