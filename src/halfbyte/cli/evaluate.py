"""halfbyte evaluate MODEL --data FILE [--against REFERENCE]"""

from __future__ import annotations

from typing import Annotated

import typer

from halfbyte.cli.console import Dtype, Json, ModelArgument, Revision, emit, progress, say


def command(
    model: ModelArgument,
    data: Annotated[
        str, typer.Option(help="Held-out data, in any shape that train takes; self: the REFERENCE's own samples.")
    ],
    against: Annotated[str | None, typer.Option(metavar="REFERENCE", help="Any MODEL; read in float32.")] = None,
    context: Annotated[int, typer.Option(help="Tokens a window.")] = 512,
    max_windows: Annotated[int | None, typer.Option(help="Only the first so many windows.")] = None,
    batch_size: int = 4,
    kv_cache: Annotated[str | None, typer.Option(help="See keys and values through a format: int8, q8_0.")] = None,
    max_kl: Annotated[float | None, typer.Option(help="Exit 3 if the mean KL is above.")] = None,
    max_loss: Annotated[float | None, typer.Option(help="Exit 3 if the loss is above.")] = None,
    dtype: Dtype = None,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Measure a model on held-out data, with errors; against a reference if one is given."""
    from halfbyte import run
    from halfbyte.card import figures
    from halfbyte.data import read_records
    from halfbyte.evaluate import Row, check_budget
    from halfbyte.steps import Evaluate

    if data != "self":
        read_records(data)  # before the model: bad data should fail first
    check_budget(Row(kl_mean=0.0 if against else None, loss=0.0), max_kl, None)
    step = Evaluate(
        data=data, against=against, context=context, max_windows=max_windows, batch_size=batch_size,
        kv_cache=kv_cache, on_batch=progress("batch"), on_token=progress("token"),
    )  # fmt: skip
    loaded = run.load(model, dtype, revision)
    step(loaded)
    row = loaded.rows[-1][1]
    show = say if json else print
    show(f"{model} on {row['tokens']} tokens of {data} ({row['conventions']}):")
    for name, text in figures(row).items():
        if text:
            show(f"  {name:22} {text}")
    if json:
        emit({"model": model, "data": data, "against": against, **row})
    check_budget(Row(**row), max_kl, max_loss)
