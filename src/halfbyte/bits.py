"""Bits where they matter: each weight's format chosen by what it costs the model, for a size or a loss."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from halfbyte import allocate, data, evaluate, kv_cache, models, self_samples, sensitivity
from halfbyte.containers.shards import read_json
from halfbyte.errors import InputError
from halfbyte.folders import FILES, check_begun, write_json
from halfbyte.footprint import Footprint, footprint, usual
from halfbyte.formats import Format, parse
from halfbyte.layers import ops
from halfbyte.models import Loaded
from halfbyte.run import Run, dequantize, sharing
from halfbyte.scheme import SCHEMES, Rule, Scheme
from halfbyte.solvers import solver
from halfbyte.steps import Calibrated, Freeze, check_length, is_word, read

CLIMB = ("rtn", "gptq", "autoround")  # solvers that a limit of KL is tried with
LAST = "autoround"  # takes so long that it is tried where no other came within the limit
TRIES = 3  # with each solver
NEAR = 0.9  # of the limit: what comes so near is not tried to be made smaller
AIM = 0.97  # of the limit: what is aimed at, since a prediction that is met by half would cost a try
BETTER = 0.5  # of what rounding to nearest loses, a solver that takes text is first expected to
WINDOWS = 32  # of a file, that are measured on
COSTS = "costs.json"
_KEEP = 2_000_000_000  # bytes of the float model's log-probabilities that are kept between tries
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
Say = Callable[[str], None]
Progress = Callable[[int, int], None]


def parse_size(text: str) -> int:
    """Bytes of "90MB", "1.5GB", "80MiB". Raises InputError."""
    m = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)", text.strip(), re.IGNORECASE)
    if m is None or not (size := int(float(m[1]) * _UNITS[m[2].upper()])):
        raise InputError(f"--target-size {text}: it is a number with a unit, such as 90MB, 1.5GB or 80MiB.")
    return size


def candidates(names: str | None, suffix: str) -> list[Format] | None:
    """The formats of a comma-separated list, if there is one. Raises InputError for an unknown one, and for an output
    that, by its suffix, is neither a GGUF file nor a folder."""
    if suffix in FILES and suffix != ".gguf":
        raise InputError(f"formats are chosen for a folder or a .gguf file, not for one with {suffix}.")
    return None if names is None else list(dict.fromkeys(parse(n.strip()) for n in names.split(",")))


@dataclass(frozen=True)
class Choice:
    """options: op's name -> its format, with the predicted KL and the bytes that this takes. size: bytes in all."""

    scheme: Scheme
    options: dict[str, allocate.Option]
    size: int

    @property
    def loss(self) -> float:
        """The KL that is predicted for rounding to nearest: the sum over all weights."""
        return sum(o.loss for o in self.options.values())


@dataclass(frozen=True)
class Costs:
    """What each format costs at each weight. losses: op's name -> format's name -> predicted KL."""

    footprint: Footprint
    losses: dict[str, dict[str, float]]

    def within(self, budget: int) -> Choice:
        """The least predicted KL in so many bytes, those that are no choice included. `budget` is at least
        `footprint.least`."""
        f = self.footprint
        table = {
            n: [allocate.Option(form.name, self.losses[n][form.name], size) for form, size in sizes.items()]
            for n, sizes in f.choices.items()
        }
        options = allocate.allocate(table, budget - f.rest)
        rules = [Rule(re.escape(n), parse(o.name), why="chosen by sensitivity") for n, o in options.items()]
        rules += [Rule(re.escape(n), None, why=why) for n, why in f.kept.items()]
        rules += [r for r in SCHEMES["W8A16"].rules if r.weight is None]  # parameters of no op, such as positions
        size = f.rest + sum(o.bytes for o in options.values())
        return Choice(Scheme(f"{8 * size / f.parameters:.2f} bits", tuple(rules)), options, size)

    def smallest(self, loss: float) -> Choice:
        """The fewest bytes, to a thousandth, that have at most this predicted KL; the most there are, if none have."""
        low, high = self.footprint.least, self.footprint.most
        best = self.within(low)
        if best.loss <= loss:
            return best
        best = self.within(high)
        while best.loss <= loss and high - low > high // 1000:
            middle = (low + high) // 2
            if (found := self.within(middle)).loss <= loss:
                best, high = found, middle
            else:
                low = middle
        return best


class Measured(Calibrated):
    """What formats cost, from one backward pass a row of calibration text: of the model itself, if none is given. work:
    a folder to keep that in, from which the next such step takes it."""

    work: Path | None = None
    on_batch: Any = None
    on_weight: Any = None

    @property
    def _text(self) -> Any:
        return "self" if self.calibration is None else self.calibration

    def rows(self, run: Run) -> data.Dataset:
        """The calibration text, encoded: what a Freeze step takes for it too. Raises InputError."""
        if is_word(self._text, "none"):
            raise InputError("--calibration none: formats are chosen on text; give a FILE, or self.")
        found = self._rows(run)
        assert found is not None
        return found

    def costs(self, run: Run, sizes: Footprint, rows: data.Dataset) -> Costs:
        """Of every weight that `sizes` has choices for. The run's weights are floats, all in memory. Raises InputError
        where others are kept."""
        if self.work is None:
            return Costs(sizes, self._losses(run, sizes, rows))
        file, settings = self.work / COSTS, {
            "weights": models.identity(run.loaded.path), "dtype": str(run.loaded.config.dtype), "seed": run.seed,
            "formats": {n: [f.name for f in choices] for n, choices in sizes.choices.items()},
            "text": rows.sha256, "samples": self._most(rows),
        }  # fmt: skip
        if file.exists():
            kept = read_json(file)
            check_begun(self.work.parent, settings, kept.get("settings", {}))
            return Costs(sizes, kept["losses"])
        losses = self._losses(run, sizes, rows)
        self.work.mkdir(parents=True, exist_ok=True)
        write_json(file, {"settings": settings, "losses": losses})
        return Costs(sizes, losses)

    def _losses(self, run: Run, sizes: Footprint, rows: data.Dataset) -> dict[str, dict[str, float]]:
        told = {} if self.on_batch is None else {"on_batch": self.on_batch}
        seen = sensitivity.fishers(run.model, self._batches(run, rows), run.seed, **told)
        shared, by_weight = models.tied(run.model), {}
        for name, found in seen.items():
            by_weight.setdefault(shared.get(name, name), []).append(found)
        by_name, losses, usual = dict(ops(run.model)), {}, sensitivity.Usual(seen.values())
        for i, (name, choices) in enumerate(sizes.choices.items()):
            weight, formats = by_name[name].weight.value(), {f.name: f for f in choices}
            losses[name] = sensitivity.losses(weight, by_weight.get(name) or [usual.of(weight)], formats)
            if self.on_weight is not None:
                self.on_weight(i + 1, len(sizes.choices))
        return losses


def check(
    loaded: Loaded, formats: Sequence[Format] | None, as_gguf: bool, bits: float | None = None, size: str | None = None
) -> Footprint:  # fmt: skip
    """What formats take, those that are usual if None, with or without weights in memory. Raises InputError, before any
    work, for a target that is smaller than all of them, and for a model that predicts no next token."""
    kv_cache.floats(loaded.model)
    sizes = footprint(loaded, formats or usual(loaded, as_gguf), as_gguf, disk=bits is None)
    least = math.ceil(800 * sizes.least / sizes.parameters) / 100  # rounded up, so that what is said can be had
    stays = (
        "" if as_gguf or not sizes.kept else f", where {next(iter(sizes.kept))} stays as it is: in OUT.gguf it need not"
    )
    if bits is not None and bits < least:
        raise InputError(
            f"--target-bits {bits}: the least that these formats make of {loaded.source} is {least:.2f} bits a "
            f"weight{stays}."
        )
    if size is not None and parse_size(size) < sizes.least:
        raise InputError(
            f"--target-size {size}: the smallest that these formats make of {loaded.source} takes "
            f"{math.ceil(sizes.least / 1e4) / 100:.2f} MB{stays}."
        )
    return sizes


@dataclass
class Try:
    """A way up: solver and choice, the run that they made, and what was measured of it."""

    solver: str
    choice: Choice
    row: evaluate.Row
    run: Run = field(repr=False)

    @property
    def kl(self) -> float:
        assert self.row.kl_mean is not None
        return self.row.kl_mean

    def as_dict(self) -> dict[str, Any]:
        bits = self.choice.scheme.name.removesuffix(" bits")
        return {"solver": self.solver, "bits": float(bits), "bytes": self.choice.size,
                "predicted_kl": self.choice.loss, "kl_mean": self.kl, "kl_error": self.row.kl_error}  # fmt: skip


@dataclass
class Climb:
    """The smallest result whose KL to a run is at most `limit`, on `held`. settings: of the Freeze steps. work: a
    folder to keep the codes of every try in, from which the next such climb takes those that it would find."""

    run: Run
    costs: Costs
    limit: float
    held: data.Dataset
    settings: dict[str, Any]
    work: Path | None = None
    on_try: Callable[[Try], None] = lambda found: None
    tries: list[Try] = field(default_factory=list)

    def __call__(self, solvers: Sequence[str] = CLIMB) -> Try:
        """The smallest try that meets the limit, or else the one that came nearest. A solver's first try is as large as
        predicted to do; what is then measured corrects the prediction, which is off by the same factor for all sizes,
        for the next. A try that does not meet the limit with the most bytes ends a solver. LAST only tries where no
        other has met it."""
        reference = evaluate.Reference(self.run.model, keep=_KEEP)
        scale, best, nearest = 1.0, None, None
        for i, name in enumerate(solvers):
            if name == LAST and best is not None:
                break
            scale *= BETTER if i and solver(name).needs_data else 1.0
            seen: set[int] = set()
            for _ in range(TRIES):
                choice = self.costs.smallest(AIM * self.limit / scale)
                if choice.size in seen or (best is not None and choice.size >= best.choice.size):
                    break
                seen.add(choice.size)
                found = self._try(name, choice, reference)
                scale = max(found.kl / choice.loss, 1e-6) if choice.loss > 0 else scale
                nearest = found if nearest is None or found.kl < nearest.kl else nearest
                if found.kl <= self.limit:
                    best = found
                    if found.kl >= NEAR * self.limit:
                        break
        return best or nearest  # pyright: ignore[reportReturnType]

    def _try(self, by: str, choice: Choice, reference: evaluate.Reference) -> Try:
        made = sharing(self.run)
        work = None if self.work is None else self.work / f"try-{len(self.tries) + 1}"
        Freeze(scheme=choice.scheme, solver=by, work=work, **self.settings)(made)
        found = Try(by, choice, evaluate.measure(made.model, self.held, reference, 1), made)
        found.row.context, found.row.bits_per_weight = max(map(len, self.held.rows)), made.bits_per_weight()
        made.rows.append(("chosen for --max-kl", found.row.as_dict()))
        self.tries.append(replace(found, run=self.run))  # its codes are held no longer than they are needed
        self.on_try(found)
        return found


def floats(run: Run) -> Run:
    """The run with all weights in memory, as floats."""
    run.read_weights()
    run.from_disk = False
    with torch.no_grad():
        dequantize(run)
    return run


def held_out(run: Run, source: Any, length: int, on_token: Progress | None = None) -> data.Dataset:
    """What a climb is measured on: windows of a file or records, or rows that the model writes itself, by another seed
    than those of calibration. Raises InputError."""
    if source is None:
        told = {} if on_token is None else {"on_token": on_token}
        most = getattr(run.model.config, "max_position_embeddings", None) or length
        return self_samples.sample(
            run.model, run.needs_tokenizer, self_samples.ROWS, min(length, most), run.seed + 1, **told
        )
    records = read(source)
    rows = data.encode(records, run.needs_tokenizer, length, packing=records[0].kind == "text")
    check_length(rows, run, "--max-length")
    rows.rows[:] = rows.rows[:WINDOWS]
    return rows
