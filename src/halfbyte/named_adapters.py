"""Several adapters over one base, of which one is in use: by name, with PEFT's names for what is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from halfbyte import adapters
from halfbyte.errors import InputError
from halfbyte.run import FORM, Run, attach_from, bring, check_base, inherited

_OWN = ("notes", "log", "files", "rows")  # of a run, what belongs to the adapter in use


def load_adapter(run: Run, path: Path, name: str) -> None:
    """Reads an adapter folder beside those that are there, under a name. The first is in use at once, and brings the
    base into the form that it was trained on, where that has none of its own yet; others wait for `set_adapter`.
    Raises InputError for a name that is taken, and for one that was trained on another base or form of it, or on codes
    that were made in another dtype; nothing of what is refused is in use then."""
    adapters.check_name(name)
    before, notes = adapters.loaded(run.model), inherited(path)
    if name in before:
        raise InputError(f"there is an adapter {name!r} already; give {path} another name.")
    check_base(run, path)
    form, here = ({k: n[k] for k in FORM if n.get(k)} for n in (notes, run.notes))
    made = (here and run.notes.get("dtype")) or str(run.loaded.config.dtype).removeprefix("torch.")
    if form and (wanted := notes.get("dtype", made)) != made:
        raise InputError(
            f"{path}: the codes that it was trained beside were made in {wanted}: load the model in that "
            f"dtype, not in {made}."
        )
    if form and not here and not before:
        bring(run, notes)
    elif notes and form != here:
        was, now = (f.get("stored") or f.get("grid") or "floats" for f in (form, here))
        raise InputError(f"{path}: it was trained beside its base as {was}, which is {now} here: load it by itself.")
    held, active = _own(run), adapters.active(run.model)
    adapters.set_adapter(run.model, None)
    try:
        attach_from(run, path, name)
    except BaseException:
        adapters.remove(run.model, name)
        adapters.set_adapter(run.model, active)
        raise
    run.notes = notes or run.notes  # what others wrote has none
    if active is None:
        adapters.set_adapter(run.model, name)
        return
    run.waiting[name] = {**_own(run), "log": None, "rows": []}
    vars(run).update(held)
    adapters.set_adapter(run.model, active)


def _own(run: Run) -> dict[str, Any]:
    return {key: getattr(run, key) for key in _OWN}


def set_adapter(run: Run, name: str) -> None:
    """Has the adapter of that name in use, and no other. Raises InputError if there is none."""
    active = adapters.active(run.model)
    adapters.set_adapter(run.model, name)
    if active is not None and active != name:
        run.waiting[active] = _own(run)
    if name in run.waiting:
        vars(run).update(run.waiting.pop(name))
