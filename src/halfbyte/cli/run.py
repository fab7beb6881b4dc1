"""halfbyte run RECIPE.yaml"""

from __future__ import annotations

from typing import Annotated

import typer

from halfbyte.cli.console import Json, Overwrite, emit, say


def command(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE.yaml")],
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Take the steps of a recipe."""
    from halfbyte.card import ledger_table
    from halfbyte.recipe import read_recipe

    made = read_recipe(recipe)
    run = made.run(overwrite, say)
    for line in ledger_table(run.rows) if run.rows else ():
        say(line)
    if json:
        log = run.log.summary() if run.log else None
        emit({"output": made.output, "training": log, "ledger": [{"stage": s, **row} for s, row in run.rows]})
