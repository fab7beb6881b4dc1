"""halfbyte quantize MODEL --to SCHEME -o OUT"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
    emit,
    progress,
    say,
    show_plan,
)


def command(
    model: ModelArgument,
    to: Annotated[str, typer.Option(help="W8A16, W4A16, NF4, Q4_K_M ..., or a format's name such as int4-g64.")],
    output: Output,
    group_size: GroupSize = None,
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
    scheme, by = to_scheme(to, group_size), solvers.solver(solver)
    if calibration not in (None, "none") and not (by.needs_data or by.uses or scheme.static):
        say(f"--calibration is not used: {by.name} takes none.")
    if input_search is not None and not scheme.static:
        say(f"--input-search is not used: {scheme.name} has no scales of inputs to find.")
    found = export.Found(solver, calibration, samples, max_length, imatrix, input_search or export.Found.inputs)
    summary: dict[str, Any] = {"output": str(output), "scheme": scheme.name, "solver": solver}
    if output.suffix in FILES:
        summary |= _to_file(model, output, to, found, no_verify, dtype, revision, resume, overwrite)
    else:
        freeze = Freeze(scheme=scheme, **vars(found))
        loaded = run.load(model, dtype, revision, weights=False)
        entries = plan(loaded.model, scheme)
        say(f"{model} -> {scheme.name} by {by.says}:")
        show_plan(entries)
        loaded.holds(scheme)
        freeze.on_block, freeze.on_batch = progress("block"), progress("calibration row")
        freeze.on_token = progress("token of the model's own text")
        with whole(output, overwrite, resume) as partial:
            loaded.checkpoint = partial / CHECKPOINT
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


def _to_file(
    model: str,
    output: Path,
    to: str,
    found: Any,
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
    from halfbyte.run import parse_dtype

    target = kind(None, output)
    loaded = export.read(model, parse_dtype(dtype), revision)
    entries = plan(loaded.model, export.chosen(to))
    say(f"{model} -> {to} by {solvers.solver(found.solver).says}:")
    show_plan(entries)
    work = begin(output, overwrite, resume) / CHECKPOINT
    job = export.job(loaded, target, to, True, found, revision, say, progress("block"), work)
    job.on_tensor = progress("tensor")
    done = export.export(model, job, target, output, None if no_verify else export.Proof(), overwrite, say, True)
    n, before, _ = totals(entries)
    return {
        "parameters": n, "bytes_before": before, "read_back": bool(done.rows),
        "ledger": done.ledger,
    }  # fmt: skip
