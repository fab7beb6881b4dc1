"""halfbyte quantize MODEL --to SCHEME -o OUT, or to a target: --target-bits, --target-size, --max-kl"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte.cli.console import (
    Calibration,
    Dtype,
    FormatNames,
    GroupSize,
    Imatrix,
    Json,
    MaxKL,
    MaxLength,
    ModelArgument,
    NoVerify,
    Output,
    Overwrite,
    Resume,
    Revision,
    Samples,
    TargetBits,
    TargetSize,
    Transforms,
    Untie,
    emit,
    progress,
    say,
    show_plan,
)
from halfbyte.cli.transforms import announce
from halfbyte.errors import InputError

if TYPE_CHECKING:
    from halfbyte.run import Run
    from halfbyte.steps import Transform


def command(
    model: ModelArgument,
    output: Output,
    to: Annotated[
        str | None, typer.Option(help="W8A16, W4A16, NF4, Q4_K_M ..., or a format's name such as int4-g64.")
    ] = None,
    target_bits: TargetBits = None,
    target_size: TargetSize = None,
    max_kl: MaxKL = None,
    formats: FormatNames = None,
    data: Annotated[str | None, typer.Option(help="What --max-kl is measured on; the model's own text.")] = None,
    group_size: GroupSize = None,
    transform: Transforms = None,
    untie: Untie = False,
    solver: Annotated[
        str | None,
        typer.Option(help="How codes are found: rtn, hqq, gptq, autoround. With --to rtn, with a target gptq."),
    ] = None,
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
    from halfbyte import export, solvers
    from halfbyte.cli.target import Target, choose, wanted
    from halfbyte.data import read_records
    from halfbyte.folders import FILES, begin, check_free, disk_bytes, finished
    from halfbyte.scheme import to_scheme
    from halfbyte.transforms import check_untie

    if resume and finished(output, overwrite):
        say(f"{output} is finished; nothing to do.")
        if json:
            emit({"output": str(output), "bytes": disk_bytes(output)})
        return
    target = Target(target_bits, target_size, max_kl, formats, data)
    targeted = wanted(to, target)
    check_free(output, overwrite, model, calibration, imatrix, data)
    if calibration not in (None, "none", "self"):
        read_records(calibration)  # what is wrong with it is said before the model is read
    text: dict[str, Any] = {"calibration": calibration, "samples": samples, "max_length": max_length}
    chosen, form = None, to
    if targeted:
        target.check(group_size=group_size, transform=transform, imatrix=imatrix, input_search=input_search)
        begin(output, overwrite, resume)  # what an interrupted run left is refused before the work
        if resume:
            say("--resume: what formats cost is measured anew; only blocks with codes are gone on from.")
        chosen = choose(model, output, target, solver, text, dtype, revision)
        form, solver, text["calibration"] = chosen.scheme, chosen.solver, chosen.rows
    solver = solver or "rtn"
    check_untie(untie, transform or [])
    if transform and imatrix is not None:
        raise InputError(
            "--imatrix and --transform: what a matrix says of inputs no longer holds once they are changed."
        )
    scheme, by = to_scheme(form, group_size), solvers.solver(solver)
    form = form if group_size is None else scheme
    first = _transforms(transform or [], scheme, untie=untie, **text)
    if calibration not in (None, "none") and not (by.needs_data or by.uses or scheme.static or first):
        say(f"--calibration is not used: {by.name} takes none.")
    if samples is not None and not (targeted or by.needs_data or calibration or scheme.static or first):
        say(f"--samples is not used: {by.name} takes no text unless --calibration gives it some.")
    if no_verify and output.suffix not in FILES:
        say("--no-verify is not used: a folder is not read back while it is quantized.")
    if input_search is not None and not scheme.static:
        say(f"--input-search is not used: {scheme.name} has no scales of inputs to find.")
    usual = "minmax" if "smooth" in (transform or []) else export.Found.inputs  # nothing is left that stands out
    found = export.Found(solver, **text, imatrix=imatrix, inputs=input_search or usual)
    summary: dict[str, Any] = {"output": str(output), "scheme": scheme.name, "solver": solver}
    made = None if chosen is None else chosen.run
    if output.suffix in FILES:
        summary |= _to_file(model, output, form, found, first, made, no_verify, dtype, revision, resume, overwrite)
    else:
        summary |= _to_folder(model, output, scheme, found, first, made, dtype, revision, resume, overwrite)
    size = disk_bytes(output)
    say(f"{output}: {size / 1e6:.1f} MB on disk; `halfbyte evaluate` tells what it cost.")
    if chosen is not None:
        summary |= chosen.as_dict()
    if json:
        emit({**summary, "bytes": size})
    if chosen is not None:
        chosen.done(size, target)


def _transforms(names: list[str], scheme: Any, **settings: Any) -> list[Transform]:
    """The steps that come before. Raises InputError for an unknown one, or one that cannot be for want of text."""
    from halfbyte.steps import Transform

    told = progress("token of the model's own text")
    return [Transform(name=name, scheme=scheme, on_token=told, **settings) for name in names]


def _to_folder(
    model: str,
    output: Path,
    scheme: Any,
    found: Any,
    first: list[Transform],
    made: Run | None,
    dtype: str | None,
    revision: str | None,
    resume: bool,
    overwrite: bool,
) -> dict[str, Any]:
    """A block at a time, from disk to disk, where nothing is done before that needs the whole model."""
    from halfbyte import run, solvers
    from halfbyte.folders import CHECKPOINT, whole
    from halfbyte.plan import plan, totals
    from halfbyte.steps import Freeze

    freeze = Freeze(scheme=scheme, **vars(found))
    loaded = run.load(model, dtype, revision, weights=False)
    entries = plan(loaded.model, scheme)
    say(f"{model} -> {scheme.name} by {solvers.solver(found.solver).says}:")
    show_plan(entries)
    loaded.holds(scheme)
    announce(first, loaded)
    freeze.on_block, freeze.on_batch = progress("block"), progress("calibration row")
    freeze.on_token = progress("token of the model's own text")
    with whole(output, overwrite, resume) as partial:
        freeze.work = partial / CHECKPOINT
        for step in first:
            step(loaded)
        if made is None:
            freeze(loaded)
        else:
            loaded = made
        bits = loaded.bits_per_weight()
        loaded.rows.append(("quantized", {"bits_per_weight": bits, "scheme": scheme.name}))
        loaded.write(partial, output.resolve().name)
    n, before, _ = totals(entries)
    return {"parameters": n, "bytes_before": before, "bits_per_weight": bits}


def _to_file(
    model: str,
    output: Path,
    to: Any,
    found: Any,
    first: list[Transform],
    made: Run | None,
    no_verify: bool,
    dtype: str | None,
    revision: str | None,
    resume: bool,
    overwrite: bool,
) -> dict[str, Any]:
    """A tensor at a time where no text is needed, read back by the program that the file is for."""
    from halfbyte import export, solvers
    from halfbyte.folders import before
    from halfbyte.kinds import kind
    from halfbyte.models import parse_dtype
    from halfbyte.plan import plan, totals
    from halfbyte.run import Run

    target = kind(None, output)
    loaded = export.read(model, parse_dtype(dtype), revision)
    entries = plan(loaded.model, export.chosen(to))
    name = to if isinstance(to, str) else to.name
    say(f"{model} -> {name} by {solvers.solver(found.solver).says}:")
    show_plan(entries)
    announce(first, Run(loaded))
    with before(output, overwrite, resume) as work:
        if made is None:
            job = export.job(loaded, target, to, True, found, revision, say, progress("block"), work, first)
        else:
            job = export.prepare(made.loaded, target, None, False, say)
    job.on_tensor = progress("tensor")
    done = export.export(model, job, target, output, None if no_verify else export.Proof(), overwrite, say, True)
    n, before, _ = totals(entries)
    return {
        "parameters": n, "bytes_before": before, "read_back": bool(done.rows),
        "ledger": done.ledger,
    }  # fmt: skip
