"""halfbyte export MODEL --to KIND [--format Q4_0] -o OUT, or --to delta --base BASE"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli.console import (
    Calibration,
    Dtype,
    Imatrix,
    Json,
    ModelArgument,
    NoVerify,
    Output,
    Overwrite,
    Revision,
    Samples,
    SolverName,
    emit,
    progress,
    say,
)


def command(
    model: ModelArgument,
    output: Output,
    to: Annotated[
        str | None, typer.Option(help="gguf, onnx, ollama, hf, mlx, delta ...; told by the output's name if left out.")
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="Q4_K_M, Q8_0, F16, W4A16 ...; weights stay as they are if left out.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="For a delta: the MODEL that who gets it has.")] = None,
    without: Annotated[
        list[str] | None, typer.Option(help="For a delta: a file or folder of MODEL that is not sent, as masters.")
    ] = None,
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Codes on another grid may be rounded again.")
    ] = False,
    solver: SolverName = "rtn",
    calibration: Calibration = None,
    samples: Samples = None,
    imatrix: Imatrix = None,
    data: Annotated[
        str | None, typer.Option(help="What it is measured on; Python's own reference if left out.")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of 512 tokens of it.")] = 4,
    max_kl: Annotated[
        float | None,
        typer.Option(help="Exit 3 if the reader's logits are further from ours; 0.02, W8A8 0.1, LoRA 0.001."),
    ] = None,
    no_verify: NoVerify = False,
    dtype: Dtype = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write a model for other programs, have them read it back, and measure what it cost."""
    if to == "delta" or (to is None and output.suffix == ".delta"):
        other = {
            "--format": format, "--requantize": requantize, "--calibration": calibration, "--samples": samples,
            "--imatrix": imatrix, "--data": data, "--max-kl": max_kl, "--dtype": dtype, "--revision": revision,
        }  # fmt: skip
        unfit = [name for name, value in other.items() if value]
        _delta(model, base, output, without or [], unfit, no_verify, overwrite, json)
        return
    from halfbyte import export
    from halfbyte.data import read_records
    from halfbyte.errors import InputError
    from halfbyte.folders import check_free, disk_bytes
    from halfbyte.kinds import kind
    from halfbyte.models import parse_dtype

    if base is not None or without:
        raise InputError(f"{'--without' if base is None else '--base'} is of --to delta.")
    target = kind(to, output)
    check_free(output, overwrite, model, data, calibration, imatrix)
    records = None if data is None else read_records(data)
    found = export.Found(solver, calibration, samples, imatrix=imatrix)
    loaded = export.read(model, parse_dtype(dtype), revision, target.ADAPTERS)
    job = export.job(loaded, target, format, requantize, found, revision, say, progress("block"))
    job.on_tensor = progress("tensor")
    proof = None if no_verify else export.Proof(records, windows, max_kl=max_kl)
    done = export.export(model, job, target, output, proof, overwrite, say)
    say(f"{output}: {disk_bytes(output) / 1e6:.1f} MB")
    if json:
        emit({
            "output": str(output), "kind": target.NAME, "format": format, "bytes": disk_bytes(output),
            "read_back": done.read_back, "ledger": done.ledger,
        })  # fmt: skip


def _delta(
    model: str, base: str | None, output: Path, without: list[str], unfit: list[str], no_verify: bool, overwrite: bool,
    json: bool,
) -> None:  # fmt: skip
    """What differs from the base, and nothing else is done to a model that is sent."""
    from halfbyte.delta import export
    from halfbyte.errors import InputError
    from halfbyte.run import MASTERS

    if base is None:
        raise InputError("--to delta needs --base BASE, the model that who gets it has.")
    if unfit:
        raise InputError(f"{unfit[0]} is not of --to delta, which sends a model's folder as it is.")
    made = export(model, base, output, overwrite, not no_verify, progress("byte"), without)
    if masters := sum(f.size for f in made.files if f.path.startswith(f"{MASTERS}/")):
        say(f"{masters / 1e6:.1f} MB are the floats that were trained; --without {MASTERS} sends the codes alone")
    size = output.stat().st_size
    say(f"{output}: {size / 1e6:.2f} MB for {len(made.files)} files of {made.size / 1e6:.1f} MB")
    if json:
        emit({
            "output": str(output), "kind": "delta", "bytes": size, "model_bytes": made.size, "base_sha256": made.base,
            "files": {f.path: f.sha256 for f in made.files}, "read_back": not no_verify,
        })  # fmt: skip
