"""halfbyte quantize MODEL --to SCHEME -o DIR"""

from __future__ import annotations

from typing import Annotated

import typer

from halfbyte.cli.console import (
    Dtype,
    GroupSize,
    Json,
    ModelArgument,
    Output,
    Overwrite,
    Revision,
    emit,
    progress,
    say,
    show_plan,
)


def command(
    model: ModelArgument,
    to: Annotated[str, typer.Option(help="W8A16, W4A16, NF4 ..., or a format's name such as int4-g64.")],
    output: Output,
    group_size: GroupSize = None,
    solver: Annotated[str, typer.Option(help="How codes are found.")] = "rtn",
    calibration: Annotated[str | None, typer.Option(help="Text for solvers that need some.")] = None,
    dtype: Dtype = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Quantize a model after training."""
    from halfbyte import run, solvers
    from halfbyte.folders import check_free
    from halfbyte.plan import plan, totals
    from halfbyte.recipe import save
    from halfbyte.run import disk_bytes, to_scheme
    from halfbyte.steps import Freeze

    check_free(output, overwrite, model, calibration)
    scheme, by = to_scheme(to, group_size), solvers.solver(solver)
    loaded = run.load(model, dtype, revision)
    entries = plan(loaded.model, scheme)
    say(f"{model} -> {scheme.name} by {by.says}:")
    show_plan(entries)
    if calibration is not None and not by.needs_data:
        say(f"--calibration is not used: {by.name} needs none.")
    loaded.holds(scheme)
    Freeze(scheme=scheme, solver=solver, calibration=calibration, on_block=progress("block"))(loaded)
    loaded.rows.append(("quantized", {"bits_per_weight": loaded.bits_per_weight(), "scheme": scheme.name}))
    save(loaded, output, overwrite)
    n, before, _ = totals(entries)
    say(f"{output}: {disk_bytes(output) / 1e6:.1f} MB on disk; `halfbyte evaluate` tells what it cost.")
    if json:
        emit({
            "output": str(output), "scheme": scheme.name, "solver": solver, "parameters": n, "bytes_before": before,
            "bytes": disk_bytes(output), "bits_per_weight": loaded.bits_per_weight(),
        })  # fmt: skip
