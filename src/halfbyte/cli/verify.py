"""halfbyte verify DIR [--base BASE] [--delta FILE] [--data FILE]"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli.console import Json, emit, progress, say


def command(
    model: Annotated[str, typer.Argument(metavar="DIR", help="The folder of a model that was made or sent.")],
    base: Annotated[
        str | None, typer.Option(help="The MODEL that it was made from, which figures are held against.")
    ] = None,
    delta: Annotated[Path | None, typer.Option(help="The delta that it was sent as.")] = None,
    data: Annotated[
        str | None, typer.Option(help="What its ledger was measured on; where the run had it if left out.")
    ] = None,
    json: Json = False,
) -> None:
    """Check that a folder is what it is said to be: its bytes by their hashes, its ledger measured again."""
    from halfbyte.errors import Differs
    from halfbyte.verify import verify

    found = []
    for finding in verify(model, base, delta, data, progress("batch")):
        found.append(finding)
        (say if json else print)(str(finding))
    wrong = [f for f in found if f.holds is False]
    if json:
        emit({"model": model, "holds": not wrong, "findings": [vars(f) for f in found]})
    if wrong:
        raise Differs(
            f"{model} is not what it is said to be: {len(wrong)} of {len(found)} claims do not hold, the first being "
            f"{wrong[0].what}."
        )
