"""halfbyte apply BASE FILE.delta -o DIR"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli.console import Json, Output, Overwrite, emit, progress, say


def command(
    base: Annotated[str, typer.Argument(metavar="BASE", help="What the delta was made against: any MODEL.")],
    delta: Annotated[Path, typer.Argument(metavar="DELTA", help="What `export --to delta` wrote.")],
    output: Output,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Rebuild a model, byte for byte, from its base and what differs."""
    from halfbyte.delta import apply

    made = apply(base, delta, output, overwrite, progress("byte"))
    say(f"{output}: {len(made.files)} files, {made.size / 1e6:.1f} MB, each with the sha256 that was sent")
    if json:
        emit({"output": str(output), "files": {f.path: f.sha256 for f in made.files}, "bytes": made.size})
