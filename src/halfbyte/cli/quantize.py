"""halfbyte quantize MODEL --to SCHEME -o OUT"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte.cli.console import (
    Calibration,
    Dtype,
    GroupSize,
    Imatrix,
    Json,
    MaxLength,
    ModelArgument,
    NoVerify,
    Output,
    Overwrite,
    Resume,
    Revision,
    Samples,
    SolverName,
    Transforms,
    Untie,
    emit,
    progress,
    say,
    show_plan,
)
from halfbyte.errors import InputError

if TYPE_CHECKING:
    from halfbyte.run import Run
    from halfbyte.steps import Transform


def command(
    model: ModelArgument,
    to: Annotated[str, typer.Option(help="W8A16, W4A16, NF4, Q4_K_M ..., or a format's name such as int4-g64.")],
    output: Output,
    group_size: GroupSize = None,
    transform: Transforms = None,
    untie: Untie = False,
    solver: SolverName = "rtn",
    calibration: Calibration = None,
    samples: Samples = None,
    max_length: MaxLength = 512,
    imatrix: Imatrix = None,
    input_search: Annotated[
        str | None, typer.Option(help="How W8A8_STATIC finds scales of inputs: minmax, percentile-99.99, mse.")
    ] = None,
    no_verify: NoVerify = False,
    dtype: Dtype = None,
    revision: Revision = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Quantize a model after training: into a folder, or a file such as OUT.gguf."""
    from halfbyte import export, run, solvers
    from halfbyte.folders import CHECKPOINT, FILES, check_free, whole
    from halfbyte.plan import plan, totals
    from halfbyte.run import disk_bytes, to_scheme
    from halfbyte.steps import Freeze

    if resume and output.exists():
        say(f"{output} is finished; nothing to do.")
        if json:
            emit({"output": str(output), "bytes": disk_bytes(output)})
        return
    check_free(output, overwrite, model, calibration, imatrix)
    if transform and imatrix is not None:
        raise InputError(
            "--imatrix and --transform: what a matrix says of inputs no longer holds once they are changed."
        )
    scheme, by = to_scheme(to, group_size), solvers.solver(solver)
    text = {"calibration": calibration, "samples": samples, "max_length": max_length}
    first = _transforms(transform or [], scheme, untie=untie, **text)
    if calibration not in (None, "none") and not (by.needs_data or by.uses or scheme.static or first):
        say(f"--calibration is not used: {by.name} takes none.")
    if input_search is not None and not scheme.static:
        say(f"--input-search is not used: {scheme.name} has no scales of inputs to find.")
    usual = "minmax" if "smooth" in (transform or []) else export.Found.inputs  # nothing is left that stands out
    found = export.Found(solver, calibration, samples, max_length, imatrix, input_search or usual)
    summary: dict[str, Any] = {"output": str(output), "scheme": scheme.name, "solver": solver}
    if output.suffix in FILES:
        summary |= _to_file(model, output, to, found, first, no_verify, dtype, revision, resume, overwrite)
    else:
        freeze = Freeze(scheme=scheme, **vars(found))
        loaded = run.load(model, dtype, revision, weights=False)
        entries = plan(loaded.model, scheme)
        say(f"{model} -> {scheme.name} by {by.says}:")
        show_plan(entries)
        loaded.holds(scheme)
        _announce(first, loaded)
        freeze.on_block, freeze.on_batch = progress("block"), progress("calibration row")
        freeze.on_token = progress("token of the model's own text")
        with whole(output, overwrite, resume) as partial:
            loaded.checkpoint = partial / CHECKPOINT
            for step in first:
                step(loaded)
            freeze(loaded)
            bits = loaded.bits_per_weight()
            loaded.rows.append(("quantized", {"bits_per_weight": bits, "scheme": scheme.name}))
            loaded.write(partial, output.resolve().name)
        n, before, _ = totals(entries)
        summary |= {"parameters": n, "bytes_before": before, "bits_per_weight": bits}
    size = disk_bytes(output)
    say(f"{output}: {size / 1e6:.1f} MB on disk; `halfbyte evaluate` tells what it cost.")
    if json:
        emit({**summary, "bytes": size})


def _transforms(names: list[str], scheme: Any, **settings: Any) -> list[Transform]:
    """The steps that come before. Raises InputError for an unknown one, or one that cannot be for want of text."""
    from halfbyte.steps import Transform
    from halfbyte.transforms import transform

    for name in names:
        if transform(name).rounds_inputs and not any(r.input for r in getattr(scheme, "rules", ())):
            say(f"--transform {name} is for schemes that round inputs, which {scheme.name} does not.")
    told = progress("token of the model's own text")
    return [Transform(name=name, scheme=scheme, on_token=told, **settings) for name in names]


def _announce(first: list[Transform], loaded: Run) -> None:
    """Says what will be done before. Raises InputError for what cannot be."""
    from halfbyte.transforms import transform

    for step in first:
        step.check(loaded)
        more = step.adds(loaded)
        apart = f"; the head gets a weight of its own, {more / 1e6:.1f} MB more" if more else ""
        say(f"  before: {transform(step.name).says}{apart}")


def _to_file(
    model: str,
    output: Path,
    to: str,
    found: Any,
    first: list[Transform],
    no_verify: bool,
    dtype: str | None,
    revision: str | None,
    resume: bool,
    overwrite: bool,
) -> dict[str, Any]:
    """A tensor at a time where no text is needed, read back by the program that the file is for."""
    from halfbyte import export, solvers
    from halfbyte.folders import CHECKPOINT, begin
    from halfbyte.kinds import kind
    from halfbyte.plan import plan, totals
    from halfbyte.run import Run, parse_dtype

    target = kind(None, output)
    loaded = export.read(model, parse_dtype(dtype), revision)
    entries = plan(loaded.model, export.chosen(to))
    say(f"{model} -> {to} by {solvers.solver(found.solver).says}:")
    show_plan(entries)
    _announce(first, Run(loaded))
    work = begin(output, overwrite, resume) / CHECKPOINT
    job = export.job(loaded, target, to, True, found, revision, say, progress("block"), work, first)
    job.on_tensor = progress("tensor")
    done = export.export(model, job, target, output, None if no_verify else export.Proof(), overwrite, say, True)
    n, before, _ = totals(entries)
    return {
        "parameters": n, "bytes_before": before, "read_back": bool(done.rows),
        "ledger": done.ledger,
    }  # fmt: skip
