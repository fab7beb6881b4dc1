"""halfbyte inspect MODEL"""

from __future__ import annotations

from halfbyte.cli.console import Json, ModelArgument, Revision, emit


def command(model: ModelArgument, revision: Revision = None, json: Json = False) -> None:
    """List every parameter: shape, format or dtype, bytes, what it is tied to."""
    from halfbyte import run
    from halfbyte.plan import inventory, totals

    loaded = run.load(model, revision=revision)
    entries = inventory(loaded.model)
    n, size, _ = totals(entries)
    if json:
        rows = [
            {"name": e.name, "shape": e.shape, "format": e.before, "bytes": e.bytes_before, "tied_to": e.tied_to}
            for e in entries
        ]
        kind = type(loaded.model).__name__
        emit({"model": model, "architecture": kind, "parameters": rows, "count": n, "bytes": size})
        return
    for e in entries:
        shape = "x".join(map(str, e.shape))
        tie = f"tied to {e.tied_to}" if e.tied_to else f"{e.bytes_before / 1e6:9.3f} MB"
        print(f"{e.name:60} {shape:>14} {e.before:18} {tie}")
    print(f"{n:,} parameters, {size / 1e6:.1f} MB, {8 * size / n:.2f} bits a weight")
