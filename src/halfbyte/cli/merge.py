"""halfbyte merge DIR -o OUT [--to SCHEME]"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from halfbyte.cli.console import (
    Calibration,
    GroupSize,
    Imatrix,
    Json,
    NoVerify,
    Output,
    Overwrite,
    Samples,
    SolverName,
    emit,
    progress,
    say,
)


def command(
    adapter: Annotated[str, typer.Argument(metavar="DIR", help="An adapter folder.")],
    output: Output,
    to: Annotated[str | None, typer.Option(help="Quantize the result; a QAT-LoRA run takes its own scheme.")] = None,
    group_size: GroupSize = None,
    solver: SolverName = "rtn",
    calibration: Calibration = None,
    samples: Samples = None,
    imatrix: Imatrix = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="trained: what it was trained on (default); original: what that was made from; both: the better."
        ),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Where the base is, or another one of the same layers.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="What the difference is measured on; the run's own if left out.")
    ] = None,
    no_verify: NoVerify = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Fold an adapter into its base, and measure the difference to the unmerged model."""
    from halfbyte import bases, export, run
    from halfbyte.errors import InputError
    from halfbyte.folders import FILES, check_free, disk_bytes, whole
    from halfbyte.methods import merge_steps
    from halfbyte.scheme import to_scheme

    check_free(output, overwrite, adapter, data, calibration, imatrix, base_model)
    if base not in (None, *_BASES):
        raise InputError(f"--base {base}: it is {', '.join(_BASES)}.")
    found = export.Found(solver, calibration, samples, imatrix=imatrix)
    if to is None and found.needs_model:
        raise InputError("--solver, --calibration and --imatrix are of a scheme to quantize to: add --to SCHEME.")
    is_file = output.suffix in FILES
    scheme = None if to is None else export.chosen(to) if is_file else to_scheme(to, group_size)
    own = bases.own(adapter, base_model)
    other = None if own is not None else base_model
    if base == "trained" and other is not None:
        raise InputError(
            f"--base-model {other}: other weights than {adapter} was trained on; leave out --base trained."
        )
    base = base or ("trained" if other is None else "original")
    merged = run.load(adapter, base=own)
    trained_for = None if (grid := merged.notes.get("grid")) is None else to_scheme(grid)
    if not is_file and (chosen := scheme or trained_for) is not None:
        merged.holds(chosen)
    dtype = run.fixed_dtype(merged.model)
    text = data or _recorded(merged.notes)
    settings = {} if to is None else {**vars(found), "on_block": progress("block")}

    def fold(unmerged: Any, base: str, other: str | None) -> None:
        for step in merge_steps(unmerged, scheme, base, model=other, **settings):
            step(unmerged)
        rounding = unmerged.notes.get("merge_rounding")
        if to is None and not is_file and rounding and rounding["zero_points"] and not unmerged.holds_as_it_is():
            raise InputError(
                f"{adapter} merges into the zero points of its base's codes, which no folder layout holds: name the "
                "output OUT.gguf or OUT.onnx, or say by --to what it is to be rounded to."
            )

    tries: dict[str, dict[str, Any]] = {}
    if base == "both":
        merged, base, tries = _better(adapter, own, merged, fold, other, text)
    else:
        fold(merged, base, other)
    rounding = merged.notes.get("merge_rounding")
    _say_rounding(rounding)
    name = output.resolve().name
    if is_file:
        proof = None if no_verify else export.Proof(base=own, dtype=dtype or export.Proof.dtype)
        _to_file(adapter, merged, output, proof, overwrite, json, tries)
        return
    with whole(output, overwrite) as partial:
        row: dict[str, Any] = {}
        merged.write(partial, name)
        if text is not None:
            # what is measured is what was written, read back; the row then goes into its ledger
            row = _difference(run.load(str(partial)), run.load(adapter, base=own), text)
            merged.rows.append(("merged, against unmerged", row))
            merged.describe(partial, name)
    if row:
        say(
            f"merged against unmerged on {row['tokens']} tokens of {text}: mean KL {row['kl_mean']:.3g}, "
            f"top-1 agreement {100 * row['top1_agreement']:.2f}%, loss {row['loss_difference']:+.5f}"
        )
    else:
        say("the difference was not measured: the run's data is not where it was; add --data FILE.")
    if json:
        about = {"rounding": rounding, "base": base, **({"bases": tries} if tries else {})}
        emit({"output": str(output), "bytes": disk_bytes(output), **row, **about})


_BASES = ("trained", "original", "both")


def _better(
    adapter: str, own: str | None, trained: Any, fold: Callable[[Any, str, str | None], None], other: str | None,
    text: str | None,
) -> tuple[Any, str, dict[str, dict[str, Any]]]:  # fmt: skip
    """Merges into both bases by `fold`, then measures each against the unmerged model on text. Gives back the one with
    the lower loss on it, which base that is, and the figures of each. Raises InputError where there is no text, or no
    second base."""
    from halfbyte import bases, run
    from halfbyte.errors import InputError

    if text is None:
        raise InputError("--base both is decided on text, and the run's data is not where it was: add --data FILE.")
    other = bases.other(trained, other)
    bases_of = {"trained": trained, "original": run.load(adapter, base=own)}
    for base, merged in bases_of.items():
        fold(merged, base, other if base == "original" else None)
    unmerged, best, tries = run.load(adapter, base=own), None, {}
    for base, merged in bases_of.items():
        row = tries[base] = _difference(merged, unmerged, text)
        where = "what it was trained on" if base == "trained" else other
        say(f"merged into {where}: loss {row['loss_difference']:+.5f} against unmerged, mean KL {row['kl_mean']:.3g}")
        if best is None or row["loss"] < tries[best[1]]["loss"]:
            best = (merged, base)
        merged.rows.clear()
    assert best is not None
    say(f"the lower loss on {text}, so what is written: --base {best[1]}")
    best[0].rows += [(f"merged, base {base}", row) for base, row in tries.items()]
    return *best, tries


def _say_rounding(found: dict[str, Any] | None) -> None:
    if found is None:
        return
    n = found["zero_points"]
    if n:
        say(f"the zero points of {n} weights took the adapter in: their codes and scales are what they were")
    what = "zero points" if n else "sums"
    say(f"rounding the {what} moved weights by {found['mean']:.2g} on average, {found['largest']:.2g} at most")


def _to_file(
    adapter: str, merged: Any, output: Path, proof: Any, overwrite: bool, json: bool, tries: dict[str, Any]
) -> None:  # fmt: skip
    """The merged model as a file, read back by the program that it is for; the reference is the unmerged one."""
    from halfbyte.folders import disk_bytes
    from halfbyte.outputs import write_file

    done = write_file(merged, output, proof, overwrite, False, say, progress("tensor"), adapter)
    if json:
        emit({
            "output": str(output), "bytes": disk_bytes(output), "read_back": done.read_back, "ledger": done.ledger,
            "rounding": merged.notes.get("merge_rounding"), **({"bases": tries} if tries else {}),
        })  # fmt: skip


def _recorded(notes: dict[str, Any]) -> str | None:
    """The run's held-out data if it is still there, else its training data."""
    return next((p for k in ("eval_data", "data") if (p := notes.get(k)) and Path(p).is_file()), None)


def _difference(merged: Any, unmerged: Any, text: str, windows: int = 8) -> dict[str, Any]:
    from halfbyte.evaluate import Reference
    from halfbyte.steps import Evaluate

    Evaluate(
        data=text, against=Reference(unmerged.model), max_windows=windows, stage="merged",
        on_batch=progress("measuring the merge"),
    )(merged)  # fmt: skip
    return merged.rows[-1][1]
