"""halfbyte plan MODEL --to SCHEME"""

from __future__ import annotations

from typing import Annotated

import typer

from halfbyte.cli.console import (
    Calibration,
    GroupSize,
    Json,
    MaxLength,
    ModelArgument,
    Revision,
    Samples,
    Transforms,
    Untie,
    emit,
    show_plan,
)
from halfbyte.cli.transforms import announce


def command(
    model: ModelArgument,
    to: Annotated[str, typer.Option(help="A scheme, or a format's name.")],
    group_size: GroupSize = None,
    transform: Transforms = None,
    untie: Untie = False,
    solver: Annotated[str, typer.Option(help="What finds codes: rtn, hqq, gptq, autoround.")] = "rtn",
    calibration: Calibration = None,
    samples: Samples = None,
    max_length: MaxLength = 512,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Say what would become of every parameter, and do nothing."""
    from halfbyte import export, models, needs
    from halfbyte.containers import peft
    from halfbyte.plan import plan, totals
    from halfbyte.run import Run
    from halfbyte.scheme import Mix, to_scheme
    from halfbyte.solvers import solver as solver_named
    from halfbyte.steps import Freeze, Transform
    from halfbyte.transforms import check_untie

    by = solver_named(solver)
    scheme = to_scheme(to, group_size)
    check_untie(untie, transform or [])
    text = {"calibration": calibration, "samples": samples, "max_length": max_length}
    first = [Transform(name=name, scheme=scheme, untie=untie, **text) for name in transform or []]
    freeze = Freeze(scheme=scheme, solver=solver, **text)
    path = models.resolve(model, revision)
    source = peft.read(path)[0] if (path / peft.CONFIG).exists() else model  # merging leaves the base's layers
    loaded = models.load(source, revision=revision, weights=False)
    made = Run(loaded)
    for step in first:
        step.check(made)
    for step in (*first, freeze):
        step.check_text(made)
    entries = plan(loaded.model, scheme)
    readers = export.readers(loaded, entries)
    n, before, after = totals(entries)
    takes = needs.needs(
        loaded.model, entries, by, freeze.most, max_length, isinstance(scheme, Mix), freeze.writes, bool(first)
    )
    if json:
        rows = [
            {"name": e.name, "shape": e.shape, "before": e.before, "after": e.after.name if e.after else e.before,
             "bytes_before": e.bytes_before, "bytes": e.bytes_after, "why": e.why, "tied_to": e.tied_to,
             "readers": readers.get(e.name, [])}
            for e in entries
        ]  # fmt: skip
        emit({"scheme": scheme.name, "parameters": rows, "count": n, "bytes_before": before, "bytes": after,
              "added_bytes": sum(step.adds(made) for step in first), "solver": by.name,
              "peak_memory": takes.memory, "disk": takes.disk})  # fmt: skip
    else:
        print(f"{model} -> {scheme.name}:")
        show_plan(entries, print)
        announce(first, made, print)
        on = f" on {freeze.most} rows {'that the model writes itself' if freeze.writes else f'of {calibration}'}"
        memory, disk = f"{takes.memory / 1e9:.1f} GB of memory", f"{takes.disk / 1e6:.1f} MB of disk"
        print(f"  by {by.name}{on if freeze.most else ''}: about {memory}, {disk} while it runs")
        _show_readers(readers)


def _show_readers(readers: dict[str, list[str]]) -> None:
    """Which kinds of export take all quantized weights, and what the others lack."""
    from halfbyte.kinds import KINDS

    if not readers:
        return
    able = [k for k in KINDS if all(k in kinds for kinds in readers.values())]
    print(f"  can be written as: {', '.join(able) or 'nothing as a whole'}")
    for k in KINDS:
        without = [n for n, kinds in readers.items() if k not in kinds]
        if k not in able and len(without) < len(readers):
            print(f"  {k} lacks a place for {len(without)} of {len(readers)}, such as {without[0]}")
