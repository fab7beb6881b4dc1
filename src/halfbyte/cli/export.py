"""halfbyte export MODEL --to KIND [--format Q4_0] -o OUT"""

from __future__ import annotations

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
        str | None, typer.Option(help="gguf, onnx, ollama, hf, mlx ...; told by the output's name if left out.")
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="Q4_K_M, Q8_0, F16, W4A16 ...; weights stay as they are if left out.")
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
    from halfbyte import export
    from halfbyte.data import read_records
    from halfbyte.folders import check_free
    from halfbyte.kinds import kind
    from halfbyte.run import disk_bytes, parse_dtype

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
            "read_back": bool(done.rows), "ledger": done.ledger,
        })  # fmt: skip
