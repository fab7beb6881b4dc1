"""Exporting: a model -> what other programs run, read back by them and measured before it is kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halfbyte import data, evaluate, models, run, sample_data
from halfbyte.containers import peft
from halfbyte.errors import BudgetExceeded, InputError
from halfbyte.folders import disk_bytes, whole, whole_file
from halfbyte.formats import Format
from halfbyte.kinds import KINDS, Job, Kind
from halfbyte.layers import Codes, Linear, ops
from halfbyte.models import Loaded
from halfbyte.models.gguf_saving import FLOATS
from halfbyte.plan import Entry, inventory, plan, totals
from halfbyte.scheme import MIXES, Mix, Scheme, static, to_scheme
from halfbyte.solvers import solver
from halfbyte.steps import Freeze, Step

MAX_KL = 0.02  # of the reader's logits to ours in the same format: above this the file is not what was meant
MAX_KL_ROUNDED = 0.1  # where inputs are rounded too: a last digit turns codes over, and SmolLM2 in W8A8 gives 0.03
MAX_KL_BESIDE = 0.001  # an adapter beside a base in float32: nothing is rounded, and it moves logits by little itself
Say = Callable[[str], None]


@dataclass
class Exported:
    """path: what was written. rows: the ledger, (stage, figures). read_back: whether the reader has rows in it.
    differs: what it computes otherwise than we do, where that was kept."""

    path: Path
    rows: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    read_back: bool = False
    differs: str | None = None

    @property
    def ledger(self) -> list[dict[str, Any]]:
        """The rows as JSON has them."""
        return [{"stage": stage, **row} for stage, row in self.rows]


@dataclass
class Proof:
    """How an export is held against the model. data: held-out text, records or a file; the packaged sample if None.
    max_kl: of the reader's logits to ours, mean over tokens; one of MAX_KL above if None. base: the MODEL where an
    adapter's base is, if not where its folder says. dtype: what the model is computed in. keep: whether what is read
    otherwise than it should be stays all the same, since it cannot be made again."""

    data: Any = None
    windows: int = 4
    context: int = evaluate.CONTEXT
    max_kl: float | None = None
    base: str | None = None
    dtype: torch.dtype = torch.float32
    keep: bool = False


def read(
    source: str | Path, dtype: torch.dtype | None = None, revision: str | None = None, adapter: bool = False
) -> Loaded:  # fmt: skip
    """Any MODEL, its floats left on disk until they are written. adapter: whether an adapter is what is wanted; else
    InputError is raised for one, since it is merged first."""
    path = models.resolve(source, revision)
    if path.is_dir() and (path / peft.CONFIG).exists():
        if adapter:
            return run.load(source, dtype).loaded
        raise InputError(
            f"{source} is an adapter; `halfbyte merge {source} -o MERGED` makes a model of it, and --to gguf-lora "
            "exports it alone."
        )
    return models.load(source, dtype, revision, weights=False)


@dataclass(frozen=True)
class Found:
    """How codes are found while a model is exported: the settings of a Freeze step. With none of them each weight is
    rounded by itself, while it is written."""

    solver: str = "rtn"
    calibration: Any = None
    samples: int | None = None
    max_length: int = evaluate.CONTEXT
    imatrix: str | Path | None = None
    inputs: str = "mse"

    @property
    def needs_model(self) -> bool:
        """Whether the whole model must run, or a file say what it is fed."""
        text = self.calibration is not None and self.calibration != "none"
        return solver(self.solver).needs_data or text or self.imatrix is not None


def job(
    loaded: Loaded, kind: Kind, format: str | Scheme | None, requantize: bool, found: Found = Found(),
    revision: str | None = None, say: Say = lambda line: None,
    on_block: Callable[[int, int], None] | None = None, work: Path | None = None, first: Sequence[Step] = (),
) -> Job:  # fmt: skip
    """Prepares what `read` gave; where `found` asks for it, the model is first quantized: a block at a time, where
    `work` is the folder to keep those in that are done. first: what is done to it before, in memory. Raises InputError
    as `prepare` does."""
    if not found.needs_model and not first:
        return prepare(loaded, kind, format, requantize, say)
    if format is None or _floats(format):
        raise InputError(f"--solver, --calibration and --imatrix are of a --format to quantize to, not of {format}.")
    freeze = Freeze(scheme=chosen(format), on_block=on_block, work=work, **vars(found))
    prepare(loaded, kind, format, requantize)  # what cannot be is refused before the work
    made = run.load(loaded.source, loaded.config.dtype, revision, weights=work is None)
    for step in first:
        step(made)
    freeze(made)
    made.read_weights()
    return prepare(made.loaded, kind, None, False, say)


def prepare(
    loaded: Loaded, kind: Kind, format: str | Scheme | None, requantize: bool, say: Say = lambda line: None
) -> Job:  # fmt: skip
    """Decides what every weight becomes, and says so. format: a scheme, a mix, F32, F16 or BF16; None keeps what is
    there. Raises InputError, before anything is written, for what the kind cannot hold, and for codes that would have
    to be quantized anew unless `requantize`."""
    if kind.ADAPTERS:
        wanted, floats, found = {}, None, []
        if format is not None:
            raise InputError(f"--format {format}: {kind.NAME} holds an adapter, which is not quantized.")
    else:
        (wanted, floats), found = _wanted(loaded, format), inventory(loaded.model)
    by_name, formats = dict(ops(loaded.model)), {}
    carried, anew = 0, []
    for e in found:
        name = e.name.removesuffix(".weight")
        op = by_name.get(name)
        if op is None or e.tied_to:
            continue
        if not isinstance(op.weight.stored, Codes):
            if name in wanted:
                formats[name] = wanted[name]
            continue
        fit = kind.fitting(op.weight.stored.q)
        if fit is not None and not floats and fit.format == wanted.get(name, fit.format):
            op.weight.store(fit)
            carried += 1
        else:
            anew.append(name)
            if name in wanted:
                formats[name] = wanted[name]
    if anew:
        _say_anew(loaded, anew, formats, requantize, floats or (loaded.config.dtype if wanted else None), say)
        for name in anew:
            if name not in formats and floats is None:  # what a scheme keeps
                by_name[name].weight.dequantize()
    if carried:
        say(f"{carried} weights are carried over: codes and scales unchanged")
    job = Job(loaded, formats, floats)
    if (why := kind.refuses(job)) is not None:
        raise InputError(f"{loaded.source} cannot be written as {kind.NAME}: {why}.")
    for remark in kind.remarks(job):
        say(f"note: {remark}")
    return job


def refuses(loaded: Loaded, kind: Kind, format: str | Scheme | Mix | None) -> str | None:
    """Why the kind cannot hold what a format makes of the model, or the model as it is, in words; None if it can."""
    return kind.refuses(Job(loaded, *_wanted(loaded, format)))


def _wanted(loaded: Loaded, format: str | Scheme | Mix | None) -> tuple[dict[str, Format], torch.dtype | None]:
    """op's name -> format, or the dtype that all matrices get. What inputs are rounded to is set in the ops."""
    if format is None:
        return {}, None
    floats = _floats(format)
    entries = [] if floats else [e for e in plan(loaded.model, chosen(format)) if e.after is not None and not e.tied_to]
    _round_inputs(loaded, entries)
    return {e.name.removesuffix(".weight"): e.after for e in entries if e.after is not None}, floats


def _round_inputs(loaded: Loaded, entries: list[Entry]) -> None:
    """Sets in the ops what a plan says of their inputs."""
    inputs = {e.name.removesuffix(".weight"): e.input for e in entries if e.after is not None}
    for name, op in ops(loaded.model):
        if isinstance(op, Linear):
            op.input = inputs.get(name)


def _floats(format: str | Scheme | Mix) -> torch.dtype | None:
    return FLOATS.get(format.upper()) if isinstance(format, str) else None


def chosen(format: str | Scheme | Mix) -> Scheme | Mix:
    """The mix of that name in any case, else the scheme. Raises InputError."""
    return (MIXES.get(format.upper()) if isinstance(format, str) else None) or to_scheme(format)


def _say_anew(
    loaded: Loaded, anew: list[str], formats: dict[str, Format], requantize: bool, floats: torch.dtype | None, say: Say
) -> None:
    such = next((n for n in anew if n in formats), anew[0])
    stored: Any = dict(ops(loaded.model))[such].weight.stored
    becomes = formats[such].name if such in formats else str(floats).removeprefix("torch.") if floats else None
    shown = f"{len(anew)} weights on another grid (such as {such}: {stored.q.format.name})"
    if becomes is None:
        raise InputError(
            f"{loaded.source} has {shown}, which the target cannot hold; choose a --format, BF16 for floats, and "
            "--requantize."
        )
    if not requantize:
        raise InputError(f"{loaded.source} has {shown}; add --requantize to make them {becomes}, which costs accuracy.")
    say(f"{shown} are quantized anew, to {becomes}: the ledger has the cost")


def readers(loaded: Loaded, entries: list[Entry]) -> dict[str, list[str]]:
    """Of every weight that is quantized, by its name: the kinds in KINDS whose readers take it so, all else being
    floats."""
    known: dict[Any, list[str]] = {}
    out = {}
    for e in entries:
        if e.after is None or e.tied_to:
            continue
        alike = (e.after, e.input, e.role, e.shape[-1])
        if alike not in known:
            _round_inputs(loaded, [e])
            job = Job(loaded, {e.name.removesuffix(".weight"): e.after}, torch.float32)
            known[alike] = [k.NAME for k in KINDS.values() if not k.ADAPTERS and k.refuses(job) is None]
        out[e.name] = known[alike]
    return out


def export(
    source: str | Path, job: Job, kind: Kind, output: Path, proof: Proof | None, overwrite: bool = False,
    say: Say = lambda line: None, resume: bool = False, rows: Sequence[tuple[str, dict[str, Any]]] = (),
) -> Exported:  # fmt: skip
    """Writes what was prepared, whole or not at all, also where it was in parts already (`resume`); reads it back by
    the kind's own reader and measures it, unless proof is None. rows: the ledger so far. Raises BudgetExceeded where
    the reader computes something else than we do, and keeps nothing unless the proof says so, and InputError before the
    work where inputs are to be rounded by scales that the model does not have."""
    for name, op in ops(job.loaded.model):
        if isinstance(op, Linear) and static(op.input) and op.input_qparams is None:
            raise InputError(
                f"{source} has no scale for the inputs of {name}, which is found on text: add --calibration FILE, or "
                "quantize first with it, then export."
            )
    done = Exported(output, [*rows])
    with (whole_file if kind.SUFFIX else whole)(output, overwrite, resume) as partial:
        kind.write(job, partial)
        if proof is None:
            say("not read back: --no-verify")
        elif (why := kind.missing()) is not None:
            say(f"not read back by {kind.READER}: {why}")
        elif job.loaded.tokenizer is None:
            say(f"not read back by {kind.READER}: the model has no tokenizer, and text needs one")
        else:
            try:
                done.rows += _prove(source, partial, kind, job, proof, say)
                done.read_back = True
            except BudgetExceeded as e:
                if not proof.keep:
                    raise BudgetExceeded(f"{e}; nothing was kept.") from None
                done.differs = f"{e}; {output} was kept."
        if not kind.SUFFIX:
            notes = {"exported": kind.NAME, "source": Path(str(source)).name}
            (partial / run.NOTES).write_text(json.dumps(notes, indent=1) + "\n")
            _write_ledger(partial / evaluate.LEDGER, done)
    if kind.SUFFIX:
        _write_ledger(output.with_suffix(".ledger.json"), done)
    return done


def _write_ledger(path: Path, done: Exported) -> None:
    if done.rows:
        path.write_text(json.dumps(done.ledger, indent=1) + "\n")


def _prove(
    source: str | Path, path: Path, kind: Kind, job: Job, proof: Proof, say: Say
) -> list[tuple[str, dict[str, Any]]]:
    """The reader's rows: against our reading of the same file, and against the model as it was. Of a kind that
    halfbyte does not read it gives the model as it was written."""
    in_memory = kind.ours(job)
    ours = run.load(path, torch.float32) if in_memory is None else run.Run(in_memory)
    records = _records(proof.data)
    rows = data.encode(records, ours.needs_tokenizer, proof.context, packing=records[0].kind == "text")
    rows.rows[:] = rows.rows[: proof.windows]
    context = max(map(len, rows.rows))
    if kind.ADAPTERS:
        size = 4 * totals(inventory(job.loaded.model))[0]
        say(f"its base is written beside it in float32 until it is read: {size / 1e6:.0f} MB")
    reader = kind.beside(job, path, context) if kind.ADAPTERS else kind.open(path, context)
    if job.loaded.tokenizer is not None and (difference := kind.differs(reader, job.loaded)):
        raise BudgetExceeded(f"{kind.READER} reads {difference}")
    out = [("read back, against halfbyte", _row(reader, rows, ours.model, ours, path))]
    kl = out[0][1]["kl_mean"]
    say(f"read back by {kind.READER}: mean KL to halfbyte's own reading {kl:.2g} on {rows.tokens} tokens")
    rounded = any(isinstance(op, Linear) and op.input for _, op in ops(job.loaded.model))
    usual = MAX_KL_BESIDE if kind.ADAPTERS else MAX_KL_ROUNDED if rounded else MAX_KL
    limit = usual if proof.max_kl is None else proof.max_kl
    if not kl <= limit:
        raise BudgetExceeded(
            f"{kind.READER} computes something else than halfbyte does: mean KL {kl:.4f} is above --max-kl {limit}"
        )
    before = run.load(source, proof.dtype, base=proof.base)
    out.append((f"read back, against {Path(str(source)).name}", _row(reader, rows, before.model, ours, path)))
    row = out[1][1]
    error = f" +- {row['kl_error']:.4f}" if row["kl_error"] is not None else ""  # of one window there is none
    say(
        f"against {source}: perplexity {row['perplexity']:.3f}, mean KL {row['kl_mean']:z.4f}{error}, "
        f"top-1 agreement {100 * row['top1_agreement']:.1f}%"
    )
    return out


def _records(given: Any) -> list[data.Record]:
    if given is None:
        return data.records(sample_data.domain_text()["heldout"])
    return data.read_records(given) if isinstance(given, str | Path) else list(given)


def _row(reader: nn.Module, rows: data.Dataset, reference: nn.Module, ours: run.Run, path: Path) -> dict[str, Any]:
    row = evaluate.measure(reader, rows, evaluate.Reference(reference), 1)
    row.bytes, row.bits_per_weight, row.context = disk_bytes(path), ours.bits_per_weight(), max(map(len, rows.rows))
    return row.as_dict()
