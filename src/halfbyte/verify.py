"""Whether a model's folder is what it is said to be: the bytes that were sent, and the ledger's figures again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte import bases, data, evaluate, models
from halfbyte.containers.delta import Delta, base_sha256, files_of
from halfbyte.errors import InputError
from halfbyte.folders import disk_bytes
from halfbyte.run import NOTES, Run, load, notes_of
from halfbyte.steps import ENCODING, Evaluate, Train

# Figures of a row that are measured again, and which of them need the reference.
FIGURES = ("perplexity", "loss", "accuracy", "loss_difference", "kl_mean", "top1_agreement")
OF_REFERENCE = ("loss_difference", "kl_mean", "top1_agreement")
RELATIVE, ABSOLUTE = 5e-3, 1e-3  # what other kernels and other processors may change in a figure
_NUMBERS = (*FIGURES, "eval_loss", "bits_per_weight", "bytes", "tokens", "windows", "context")
_WORDS = ("data_sha256", "against_sha256", "conventions")
OnBatch = Callable[[int, int], None]


@dataclass(frozen=True)
class Finding:
    """what: was looked at. claimed, found: a hash or a figure. holds: whether they agree; None where it could not be
    looked at, and `why` then says what it would take."""

    what: str
    claimed: Any = None
    found: Any = None
    holds: bool | None = True
    why: str = ""

    def __str__(self) -> str:
        """A line: what was claimed beside what was found."""
        state = {True: "holds", False: "DIFFERS", None: "not known"}[self.holds]
        beside = [f"claimed {_short(self.claimed)}"] if self.claimed is not None else []
        beside += [f"found {_short(self.found)}"] if self.found is not None else []
        return f"{state:10} {self.what}" + "".join(f"; {part}" for part in (*beside, self.why) if part)


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else f"{value[:12]}..." if isinstance(value, str) else str(value)


def verify(
    model: str | Path, base: str | Path | None = None, delta: str | Path | None = None, given: str | None = None,
    on_batch: OnBatch = lambda done, total: None,
) -> Iterator[Finding]:  # fmt: skip
    """What is found, one thing after the other. model: a folder; base: what it, or the delta, was made against, and
    what a ledger's figures are held against; given: a file of the data that they were measured on. Raises InputError
    for what cannot be read."""
    path = models.resolve(model)
    if not path.is_dir():
        raise InputError(f"{path} is not a folder; of a file nothing is recorded that could be verified.")
    records = [] if given is None else data.read_records(given)
    theirs = None if base is None else models.resolve(base)
    read, rows = None if delta is None else Delta(Path(delta)), _rows(path / evaluate.LEDGER)
    yield from files(path, theirs, read)
    if rows:
        yield from ledger(path, rows, theirs, records, on_batch)


# --- files


def files(path: Path, base: Path | None, delta: Delta | None) -> Iterator[Finding]:
    """Hashes against those of a delta, and against those that the folder's notes record."""
    notes, here = notes_of(path), base_sha256(path)
    if claimed := notes.get("sha256"):
        yield _hash(f"weights, by {NOTES}", claimed, here)
    elif delta is None:
        yield Finding("weights", None, here, None, "no record of their hash; a --delta has one")
    if delta is not None:
        wrong = delta.differences(path)
        yield from (Finding("file", holds=False, why=w) for w in wrong)
        if not wrong:
            yield Finding(f"{len(files_of(path))} files, by {delta.path}")
    if base is not None:
        if delta is not None:
            yield _hash(f"base, by {delta.path}", delta.manifest.base, base_sha256(base))
        elif claimed := notes.get("base_sha256"):
            yield _hash(f"base, by {NOTES}", claimed, models.sha256(base))


def _hash(what: str, claimed: Any, found: str) -> Finding:
    return Finding(what, claimed, found, claimed == found)


# --- the ledger


def ledger(
    path: Path, rows: list[dict[str, Any]], base: Path | None, given: list[data.Record], on_batch: OnBatch
) -> Iterator[Finding]:  # fmt: skip
    """The figures that a ledger's rows claim of this model, measured again where there is the data: what is given, or
    lies where the notes say. A figure against a reference needs that reference as the base. Rows of more or fewer bits
    a weight are of an earlier stage, and of several on the same data the last counts."""
    notes = notes_of(path)
    texts = _texts(given, notes)
    run = load(path, weights=False, base=bases.own(path, None if base is None else str(base)))
    bits = run.bits_per_weight()
    last: dict[Any, dict[str, Any]] = {}
    for row in rows:
        stage, claimed = row["stage"], row.get("bits_per_weight")
        if claimed is not None and not math.isclose(claimed, bits, rel_tol=RELATIVE):
            yield Finding(
                f"{stage}", holds=None, why=f"an earlier stage, of {claimed:.2f} bits a weight, not {bits:.2f}"
            )
            continue
        if row.get("bytes") and stage != "evaluate":  # where it is that of the files that were read
            yield Finding(f"{stage}: bytes", row["bytes"], disk_bytes(path), row["bytes"] == disk_bytes(path))
        last[row.get("data_sha256"), row.get("against_sha256"), "eval_loss" in row] = row
    for row in last.values():
        if row.get("tokens"):
            yield from _measured(row, run, texts, base, on_batch)
        elif row.get("eval_loss") is not None:
            yield from _held_out(row, run, texts, notes)


def _rows(file: Path) -> list[dict[str, Any]]:
    """Raises InputError for a ledger that is none."""
    if not file.exists():
        return []
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        rows = None
    if not isinstance(rows, list) or not all(isinstance(r, dict) and isinstance(r.get("stage"), str) for r in rows):
        raise InputError(f"{file} is not a list of a ledger's rows.")
    for row in rows:
        if bad := [k for k in _NUMBERS if not _is_number(row.get(k))]:
            raise InputError(f"{file}: {bad[0]} of {row['stage'][:80]!r} is no number.")
        if bad := [k for k in _WORDS if not isinstance(row.get(k), str | None)]:
            raise InputError(f"{file}: {bad[0]} of {row['stage'][:80]!r} is no text.")
    return rows


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 63)


def _texts(given: list[data.Record], notes: dict[str, Any]) -> dict[str, list[data.Record]]:
    """Records by their hash: those given, those that lie where the notes say, and what of either was held out."""
    found = [given]
    for place in (notes.get("eval_data"), notes.get("data")):
        if isinstance(place, str) and Path(place).is_file():
            with suppress(InputError):  # what lies there now need not be data
                found.append(data.read_records(place))
    settings = notes.get("training")
    share, seed = (settings.get("eval_split"), settings.get("seed")) if isinstance(settings, dict) else (None, None)
    if isinstance(share, float) and isinstance(seed, int):
        for records in [r for r in found if r]:
            with suppress(InputError):
                found.append(data.split(records, share, seed)[1])
    return {data.sha256(r): r for r in found if r}


def _measured(
    row: dict[str, Any], run: Run, texts: dict[str, list[data.Record]], base: Path | None, on_batch: OnBatch
) -> Iterator[Finding]:
    """A row that Evaluate made, once more."""
    stage, wanted = row["stage"], row.get("against_sha256")
    if stage.startswith("read back"):
        yield Finding(stage, holds=None, why="measured by the program that it was exported for, not by halfbyte")
        return
    if (records := texts.get(str(row.get("data_sha256")))) is None:
        yield _unread(stage, row.get("data_sha256"))
        return
    run.read_weights()
    against = base if base is not None and wanted and models.sha256(base) == wanted else None
    again = _again(row, run, records, against, on_batch)
    if again["tokens"] != row["tokens"]:
        yield Finding(f"{stage}: tokens", row["tokens"], again["tokens"], None, "it was measured by other settings")
        return
    for name in FIGURES:
        if row.get(name) is None:
            continue
        if name in OF_REFERENCE and against is None:
            which = f"weights' sha256 {wanted[:12]}..." if isinstance(wanted, str) and wanted else "not recorded"
            yield Finding(f"{stage}: {name}", row[name], None, None, f"the reference ({which}) is not the --base")
        else:
            yield _figure(f"{stage}: {name}", row[name], again[name])


def _again(
    row: dict[str, Any], run: Run, records: list[data.Record], against: Path | None, on_batch: OnBatch
) -> dict[str, Any]:  # fmt: skip
    said = "keys and values in "
    caches = [c.removeprefix(said) for c in str(row.get("conventions")).split("; ") if c.startswith(said)]
    step = Evaluate(
        data=records, against=against, context=row.get("context") or evaluate.CONTEXT,
        max_windows=row.get("windows") or None, kv_cache=caches[0] if caches else None, on_batch=on_batch,
    )  # fmt: skip
    step(run)
    return run.rows[-1][1]


def _held_out(
    row: dict[str, Any], run: Run, texts: dict[str, list[data.Record]], notes: dict[str, Any]
) -> Iterator[Finding]:
    """The loss on held-out data at the end of training: measured before learned scales were rounded to the file's."""
    what, sha256, settings = f"{row['stage']}: eval_loss", notes.get("eval_data_sha256"), notes.get("training")
    if (records := texts.get(str(sha256))) is None or not isinstance(settings, dict):
        yield _unread(what, sha256)
        return
    run.read_weights()
    step = Train(data=records, **{k: settings[k] for k in ENCODING if k in settings})
    yield _figure(what, row["eval_loss"], step.held_out_loss(run, records))


def _unread(what: str, sha256: Any) -> Finding:
    which = f"sha256 {str(sha256)[:12]}..." if sha256 else "not recorded which"
    return Finding(
        what, holds=None, why=f"the data that it was measured on ({which}) is not here; --data FILE gives it"
    )


def _figure(what: str, claimed: float, found: float | None) -> Finding:
    close = found is not None and math.isclose(claimed, found, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
    return Finding(what, claimed, found, close)
