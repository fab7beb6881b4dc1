"""halfbyte quantize MODEL --to SCHEME -o OUT, or to a target: --target-bits, --target-size, --max-kl"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
    from halfbyte.export import Found
    from halfbyte.run import Run
    from halfbyte.scheme import Mix, Scheme
    from halfbyte.solvers import Solver
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
    from halfbyte.cli.target import Target, choose, wanted
    from halfbyte.data import read_records
    from halfbyte.folders import before, check_free, disk_bytes, finished

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
    asked = Asked(
        model, output, to, group_size, tuple(transform or ()), untie, solver or "rtn", text, imatrix, input_search,
        no_verify, dtype, revision, resume, overwrite,
    )  # fmt: skip
    if not targeted:
        summary = _quantize(asked)
        if json:
            emit(summary)
        return
    target.check(group_size=group_size, transform=transform, imatrix=imatrix, input_search=input_search)
    with before(output, overwrite, resume) as work:
        chosen = choose(model, output, target, solver, text, dtype, revision, work)
        text = {**text, "calibration": chosen.rows}
        summary = _quantize(replace(asked, to=chosen.scheme, solver=chosen.solver, text=text, resume=True), chosen.run)
    if json:
        emit({**summary, **chosen.as_dict()})
    chosen.done(summary["bytes"], target)


@dataclass(frozen=True)
class Asked:
    """What the flags say. to: a scheme, or its name. text: calibration, samples and max_length."""

    model: str
    output: Path
    to: Any
    group_size: int | None
    transform: tuple[str, ...]
    untie: bool
    solver: str
    text: dict[str, Any]
    imatrix: str | Path | None
    input_search: str | None
    no_verify: bool
    dtype: str | None
    revision: str | None
    resume: bool
    overwrite: bool


def _quantize(asked: Asked, made: Run | None = None) -> dict[str, Any]:
    """Quantizes, or writes what is quantized already: what --json tells of it. Raises InputError."""
    from halfbyte import export, solvers
    from halfbyte.folders import FILES, disk_bytes
    from halfbyte.scheme import to_scheme
    from halfbyte.transforms import check_untie

    check_untie(asked.untie, list(asked.transform))
    if asked.transform and asked.imatrix is not None:
        raise InputError(
            "--imatrix and --transform: what a matrix says of inputs no longer holds once they are changed."
        )
    scheme, by = to_scheme(asked.to, asked.group_size), solvers.solver(asked.solver)
    first = _transforms(asked, scheme)
    _say_unused(asked, scheme, by, bool(first))
    usual = "minmax" if "smooth" in asked.transform else export.Found.inputs  # nothing is left that stands out
    found = export.Found(asked.solver, **asked.text, imatrix=asked.imatrix, inputs=asked.input_search or usual)
    form = asked.to if asked.group_size is None else scheme
    if asked.output.suffix in FILES:
        told = _to_file(asked, form, found, first, made)
    else:
        told = _to_folder(asked, scheme, found, first, made)
    size = disk_bytes(asked.output)
    say(f"{asked.output}: {size / 1e6:.1f} MB on disk; `halfbyte evaluate` tells what it cost.")
    return {"output": str(asked.output), "scheme": scheme.name, "solver": asked.solver, **told, "bytes": size}


def _say_unused(asked: Asked, scheme: Scheme | Mix, by: Solver, first: bool) -> None:
    """What was asked for and nothing uses."""
    from halfbyte.folders import FILES
    from halfbyte.steps import is_word

    calibration, takes = asked.text["calibration"], by.needs_data or scheme.static or first
    if calibration is not None and not is_word(calibration, "none") and not (takes or by.uses):
        say(f"--calibration is not used: {by.name} takes none.")
    if asked.text["samples"] is not None and calibration is None and not takes:
        say(f"--samples is not used: {by.name} takes no text unless --calibration gives it some.")
    if asked.no_verify and asked.output.suffix not in FILES:
        say("--no-verify is not used: a folder is not read back while it is quantized.")
    if asked.input_search is not None and not scheme.static:
        say(f"--input-search is not used: {scheme.name} has no scales of inputs to find.")


def _transforms(asked: Asked, scheme: Scheme | Mix) -> list[Transform]:
    """The steps that come before. Raises InputError for an unknown one, or one that cannot be for want of text."""
    from halfbyte.steps import Transform

    told = progress("token of the model's own text")
    named = asked.transform
    return [Transform(name=n, scheme=scheme, on_token=told, untie=asked.untie, **asked.text) for n in named]


def _to_folder(
    asked: Asked, scheme: Scheme | Mix, found: Found, first: list[Transform], made: Run | None
) -> dict[str, Any]:  # fmt: skip
    """A block at a time, from disk to disk, where nothing is done before that needs the whole model."""
    from halfbyte import run, solvers
    from halfbyte.folders import CHECKPOINT, whole
    from halfbyte.plan import plan, totals
    from halfbyte.steps import Freeze

    freeze = Freeze(scheme=scheme, **vars(found))
    loaded = run.load(asked.model, asked.dtype, asked.revision, weights=False)
    entries = plan(loaded.model, scheme)
    say(f"{asked.model} -> {scheme.name} by {solvers.solver(found.solver).says}:")
    show_plan(entries)
    loaded.holds(scheme)
    announce(first, loaded)
    freeze.on_block, freeze.on_batch = progress("block"), progress("calibration row")
    freeze.on_token = progress("token of the model's own text")
    with whole(asked.output, asked.overwrite, asked.resume) as partial:
        freeze.work = partial / CHECKPOINT
        for step in first:
            step(loaded)
        if made is None:
            freeze(loaded)
        else:
            loaded = made
        bits = loaded.bits_per_weight()
        loaded.rows.append(("quantized", {"bits_per_weight": bits, "scheme": scheme.name}))
        loaded.write(partial, asked.output.resolve().name)
    n, before, _ = totals(entries)
    return {"parameters": n, "bytes_before": before, "bits_per_weight": bits}


def _to_file(asked: Asked, to: Any, found: Found, first: list[Transform], made: Run | None) -> dict[str, Any]:
    """A tensor at a time where no text is needed, read back by the program that the file is for."""
    from halfbyte import export, solvers
    from halfbyte.folders import before
    from halfbyte.kinds import kind
    from halfbyte.models import parse_dtype
    from halfbyte.plan import plan, totals
    from halfbyte.run import Run

    target, model = kind(None, asked.output), asked.model
    loaded = export.read(model, parse_dtype(asked.dtype), asked.revision)
    entries = plan(loaded.model, export.chosen(to))
    name = to if isinstance(to, str) else to.name
    say(f"{model} -> {name} by {solvers.solver(found.solver).says}:")
    show_plan(entries)
    announce(first, Run(loaded))
    with before(asked.output, asked.overwrite, asked.resume) as work:
        if made is None:
            job = export.job(loaded, target, to, True, found, asked.revision, say, progress("block"), work, first)
        else:
            job = export.prepare(made.loaded, target, None, False, say)
    job.on_tensor = progress("tensor")
    proof = None if asked.no_verify else export.Proof()
    done = export.export(model, job, target, asked.output, proof, asked.overwrite, say, True)
    n, was, _ = totals(entries)
    return {
        "parameters": n, "bytes_before": was, "read_back": done.read_back,
        "ledger": done.ledger,
    }  # fmt: skip
