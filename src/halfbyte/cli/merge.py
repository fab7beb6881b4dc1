"""halfbyte merge DIR -o OUT [--to SCHEME]"""

from __future__ import annotations

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
        str, typer.Option(help="trained: what the adapter was trained on; original: the 16-bit one.")
    ] = "trained",
    data: Annotated[
        str | None, typer.Option(help="What the difference is measured on; the run's own if left out.")
    ] = None,
    no_verify: NoVerify = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Fold an adapter into its base, and measure the difference to the unmerged model."""
    from halfbyte import export, run
    from halfbyte.errors import InputError
    from halfbyte.folders import FILES, check_free, whole
    from halfbyte.recipe import merge_steps
    from halfbyte.run import disk_bytes, to_scheme

    check_free(output, overwrite, adapter, data, calibration, imatrix)
    found = export.Found(solver, calibration, samples, imatrix=imatrix)
    if to is None and found.needs_model:
        raise InputError("--solver, --calibration and --imatrix are of a scheme to quantize to: add --to SCHEME.")
    scheme = None if to is None else export.chosen(to) if output.suffix in FILES else to_scheme(to, group_size)
    merged = run.load(adapter)
    if scheme is not None and output.suffix not in FILES:
        merged.holds(scheme)
    text = data or _recorded(merged.notes)
    settings = {} if to is None else {**vars(found), "on_block": progress("block")}
    for step in merge_steps(merged, scheme, base, **settings):
        step(merged)
    _say_rounding(merged.notes["merge_rounding"])
    name = output.resolve().name
    if output.suffix in FILES:
        _to_file(adapter, merged, output, no_verify, overwrite, json)
        return
    if to is None and not merged.holds_as_it_is():
        raise InputError(
            f"{adapter} merges into the zero points of its base's codes, which no folder layout holds: name the output "
            "OUT.gguf or OUT.onnx, or say by --to what it is to be rounded to."
        )
    with whole(output, overwrite) as partial:
        row: dict[str, Any] = {}
        merged.write(partial, name)
        if text is not None:
            # what is measured is what was written, read back; the row then goes into its ledger
            row = _difference(str(partial), adapter, text)
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
        emit({"output": str(output), "bytes": disk_bytes(output), **row, "rounding": merged.notes["merge_rounding"]})


def _say_rounding(found: dict[str, Any]) -> None:
    n = found["zero_points"]
    if n:
        say(f"the zero points of {n} weights took the adapter in: their codes and scales are what they were")
    what = "zero points" if n else "sums"
    say(f"rounding the {what} moved weights by {found['mean']:.2g} on average, {found['largest']:.2g} at most")


def _to_file(adapter: str, merged: Any, output: Path, no_verify: bool, overwrite: bool, json: bool) -> None:
    """The merged model as a file, read back by the program that it is for; the reference is the unmerged one."""
    from halfbyte import export
    from halfbyte.kinds import kind
    from halfbyte.run import disk_bytes

    target = kind(None, output)
    job = export.prepare(merged.loaded, target, None, False, say)
    job.on_tensor = progress("tensor")
    done = export.export(adapter, job, target, output, None if no_verify else export.Proof(), overwrite, say)
    if json:
        emit({
            "output": str(output), "bytes": disk_bytes(output), "read_back": bool(done.rows), "ledger": done.ledger,
            "rounding": merged.notes["merge_rounding"],
        })  # fmt: skip


def _recorded(notes: dict[str, Any]) -> str | None:
    """The run's held-out data if it is still there, else its training data."""
    return next((p for k in ("eval_data", "data") if (p := notes.get(k)) and Path(p).is_file()), None)


def _difference(merged: str, adapter: str, text: str, windows: int = 8) -> dict[str, Any]:
    from halfbyte import run
    from halfbyte.evaluate import Reference
    from halfbyte.steps import Evaluate

    again = run.load(merged)
    Evaluate(
        data=text, against=Reference(run.load(adapter).model), max_windows=windows, stage="merged",
        on_batch=progress("measuring the merge"),
    )(again)  # fmt: skip
    return again.rows[-1][1]
