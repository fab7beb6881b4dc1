"""quantize without --to: formats chosen for a size or a loss, and the choice as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.cli.console import progress, say
from halfbyte.errors import BudgetExceeded, InputError

if TYPE_CHECKING:
    from halfbyte.bits import Choice, Costs, Try
    from halfbyte.data import Dataset
    from halfbyte.run import Run
    from halfbyte.scheme import Scheme


@dataclass(frozen=True)
class Target:
    """What is asked for: one of bits, size and kl. formats: what is chosen from. data: what KL is measured on."""

    bits: float | None = None
    size: str | None = None
    kl: float | None = None
    formats: str | None = None
    data: str | None = None

    def check(self, **refused: Any) -> None:
        """Raises InputError for a limit that is no such thing, and for options, by flag's name, that do not go with
        one."""
        for name, value in refused.items():
            if value:
                raise InputError(f"--{name.replace('_', '-')} goes with --to, not with a target.")
        for flag, value in (("--target-bits", self.bits), ("--max-kl", self.kl)):
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"{flag} {value}: it is a number above 0.")
        if self.data is not None and self.kl is None:
            raise InputError("--data is what --max-kl is measured on.")


def wanted(to: str | None, target: Target) -> bool:
    """Whether formats are to be chosen. Raises InputError unless exactly one of the four is given."""
    from halfbyte.bits import parse_size

    given = {"--to": to, "--target-bits": target.bits, "--target-size": target.size, "--max-kl": target.kl}
    named = [flag for flag, value in given.items() if value is not None]
    if len(named) != 1:
        says = "; give one of them" if named else ""
        raise InputError(f"{' and '.join(named) or 'no target'}: it is {', '.join(given)}{says}.")
    if to is not None:
        for flag, value in (("--formats", target.formats), ("--data", target.data)):
            if value is not None:
                raise InputError(f"{flag} goes with a target such as --target-size, not with --to.")
    if target.size is not None:
        parse_size(target.size)
    return to is None


@dataclass
class Chosen:
    """scheme, and the text that it was chosen on. solver: the one that codes are found by. run: already quantized so,
    where it had to be to know. tried: what was measured on the way. failed: why what was asked for cannot be had."""

    scheme: Scheme
    rows: Dataset
    solver: str
    choice: Choice
    run: Run | None = None
    tried: list[Try] = field(default_factory=list)
    failed: str | None = None

    def as_dict(self) -> dict[str, Any]:
        rows = [
            {"name": n, "format": o.name, "bytes": o.bytes, "predicted_kl": o.loss}
            for n, o in self.choice.options.items()
        ]
        tries = {"tries": [t.as_dict() for t in self.tried]} if self.tried else {}
        return {"predicted_kl": self.choice.loss, "choice": rows, **tries}

    def done(self, size: int, target: Target) -> None:
        """Raises BudgetExceeded if what was written is not what was asked for."""
        from halfbyte.bits import parse_size

        if target.size is not None and size > parse_size(target.size):
            raise BudgetExceeded(f"the weight files take {size} bytes, more than --target-size {target.size}.")
        if self.failed is not None:
            raise BudgetExceeded(self.failed)


def choose(
    model: str, output: Path, target: Target, solver: str | None, text: Mapping[str, Any], dtype: str | None,
    revision: str | None, work: Path,
) -> Chosen:  # fmt: skip
    """Chooses, and says so. text: calibration, samples and max_length. work: where to keep what is found on the way.
    Raises InputError before weights are read for what cannot be."""
    from halfbyte import bits, run, solvers

    by = solvers.solver(solver or "gptq").name
    formats = bits.candidates(target.formats, output.suffix)
    measured = bits.Measured(**text, work=work, on_batch=progress("row of text"), on_weight=progress("weight"))
    measured.on_token = progress("token of the model's own text")
    loaded = run.load(model, dtype, revision, weights=False)
    sizes = bits.check(loaded.loaded, formats, output.suffix == ".gguf", target.bits, target.size)
    names = dict.fromkeys(f.name for choices in sizes.choices.values() for f in choices)
    say(f"{model}: what {', '.join(names)} cost at each weight")
    bits.floats(loaded)
    rows = measured.rows(loaded)
    costs = measured.costs(loaded, sizes, rows)
    if target.kl is not None:
        return _climb(loaded, costs, target.kl, target, solver, rows, text, work)
    budget = int(target.bits * sizes.parameters / 8) if target.bits is not None else bits.parse_size(target.size or "")
    choice = costs.within(budget)
    show(choice, costs)
    return Chosen(choice.scheme, rows, by, choice)


def _climb(
    loaded: Run, costs: Costs, limit: float, target: Target, solver: str | None, rows: Dataset, text: Mapping[str, Any],
    work: Path,
) -> Chosen:  # fmt: skip
    from halfbyte import bits

    held = bits.held_out(loaded, target.data, text["max_length"], progress("token to measure on"))
    where = "text that the model writes itself, not that of calibration" if target.data is None else target.data
    say(f"KL is measured on {held.tokens} tokens of {where}")
    settings = {"calibration": rows, "samples": text["samples"]}
    climb = bits.Climb(loaded, costs, limit, held, settings, work, _say_try)
    best = climb(bits.CLIMB if solver is None else (solver,))
    show(best.choice, costs)
    failed = None
    if best.kl > limit:
        failed = (
            f"--max-kl {limit} was not met in {len(climb.tries)} tries; the nearest was kept: "
            f"{best.choice.scheme.name} by {best.solver}, with a KL of {_short(best.kl)}."
        )
    return Chosen(best.choice.scheme, rows, best.solver, best.choice, best.run, climb.tries, failed)


def _short(kl: float) -> str:
    return f"{kl:.4f}" if kl == 0 or kl >= 0.001 else f"{kl:.1e}"


def _say_try(found: Try) -> None:
    error = "" if found.row.kl_error is None else f" +- {_short(found.row.kl_error)}"
    say(f"{found.solver}, {found.choice.scheme.name}, {found.choice.size / 1e6:.1f} MB: KL {_short(found.kl)}{error}")


def show(choice: Choice, costs: Costs) -> None:
    """The choice as a table, a line for weights whose names differ by a number."""
    from halfbyte.plan import numberless

    classes: dict[str, list[str]] = {}
    for name in choice.options:
        classes.setdefault(numberless(name), []).append(name)
    say(f"  {'weights':42} {'MB':>8} {'predicted KL':>13}  formats")
    for pattern, names in classes.items():
        found = [choice.options[n] for n in names]
        count = Counter(o.name for o in found)
        formats = ", ".join(f"{n} x {f}" if len(names) > 1 else f for f, n in sorted(count.items()))
        size, loss = sum(o.bytes for o in found) / 1e6, sum(o.loss for o in found)
        say(f"  {pattern:42} {size:8.2f} {loss:13.5f}  {formats}")
    for name, why in costs.footprint.kept.items():
        say(f"  {name:42} {'':8} {'':13}  stays as it is: {why}")
    say(f"  {'all, and what is no choice':42} {choice.size / 1e6:8.2f} {choice.loss:13.5f}  {choice.scheme.name}")
