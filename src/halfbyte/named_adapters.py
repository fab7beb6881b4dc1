"""Several adapters over one base, of which one is in use: by name, with PEFT's names for what is done."""

from __future__ import annotations

from pathlib import Path

from halfbyte import adapters
from halfbyte.errors import InputError
from halfbyte.run import Run, attach_from, bring, check_base, notes_of

_FORM = ("dequantized", "stored", "kept_codes", "solver", "grid", "grid_search")  # notes on what an adapter is added to


def load_adapter(run: Run, path: Path, name: str) -> None:
    """Reads an adapter folder beside those that are there, under a name. The first is in use at once, and brings the
    base into the form that it was trained on, where that has none of its own yet; others wait for `set_adapter`.
    Raises InputError for a name that is taken, and for one that was trained on another base or form of it."""
    adapters.check_name(name)
    before, notes = adapters.loaded(run.model), notes_of(path)
    if name in before:
        raise InputError(f"there is an adapter {name!r} already; give {path} another name.")
    check_base(run, path)
    form, here = ({k: n[k] for k in _FORM if n.get(k)} for n in (notes, run.notes))
    if form and not here and not before:
        bring(run, notes)
    elif notes and form != here:
        was, now = (f.get("stored") or f.get("grid") or "floats" for f in (form, here))
        raise InputError(f"{path}: it was trained beside its base as {was}, which is {now} here: load it by itself.")
    held, files = run.notes, run.files
    active = adapters.active(run.model)
    adapters.set_adapter(run.model, None)
    try:
        attach_from(run, path, name)
    finally:
        adapters.set_adapter(run.model, active or (name if name in adapters.loaded(run.model) else None))
    mine = notes or run.notes  # what others wrote has none
    if active is None:
        run.notes = mine
    else:
        run.waiting[name] = (mine, run.files)
        run.notes, run.files = held, files


def set_adapter(run: Run, name: str) -> None:
    """Has the adapter of that name in use, and no other. Raises InputError if there is none."""
    active = adapters.active(run.model)
    adapters.set_adapter(run.model, name)
    if active is not None and active != name:
        run.waiting[active] = (run.notes, run.files)
    if name in run.waiting:
        run.notes, run.files = run.waiting.pop(name)
