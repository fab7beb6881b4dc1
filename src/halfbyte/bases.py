"""The bases that an adapter may be merged into: what it was trained on, and what that was quantized from or to.

With an adapter s B A trained on dequant(Q(W)), merged into what it was trained on it is W + s B A and the correction
dequant(Q(W)) - W, which is what it learned to live with; merged into W plainly it goes without.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from halfbyte import adapters, models
from halfbyte.containers import peft
from halfbyte.errors import InputError
from halfbyte.layers import Codes, RoundsInputs, ops, weights
from halfbyte.run import Run, notes_of


def own(adapter: str | Path, given: str | None) -> str | None:
    """`given`, if it is what an adapter folder was trained on: the same weights by hash, or its folder records no hash,
    as others' do. None where it is another base, or not given: the one that the folder names is read then."""
    path = Path(adapter)
    if given is None or not (path / peft.CONFIG).exists():
        return None
    wanted = notes_of(path).get("base_sha256")
    return given if wanted in (None, models.sha256(models.resolve(given))) else None


def other(run: Run, given: str | None = None) -> str:
    """The MODEL whose weights are the other base of a run's adapter: `given`, or what its codes were made from. Raises
    InputError where it was trained on floats, which were made from nothing else, where codes do not tell, and where the
    original is gone or has changed."""
    if given is not None:
        return given
    if not any(isinstance(w.stored, Codes) for w in weights(run.model).values()):
        raise InputError(
            f"the adapter of {run.loaded.source} was trained on floats; name the other base by --base-model MODEL."
        )
    source = run.loaded.source
    if run.notes.get("stored") and not run.notes.get("kept_codes"):
        return source  # floats, of which codes were made when they were read
    said = notes_of(run.loaded.path).get("original") if run.loaded.path.is_dir() else None
    if not isinstance(said, dict) or not isinstance(said.get("model"), str):
        raise InputError(
            f"{source} is codes and does not say what they were made from: name that by --base-model MODEL."
        )
    named = said["model"]
    if Path(named).is_absolute() and not Path(named).exists():
        raise InputError(f"{source} was made from {named}, which is no longer there: name it by --base-model MODEL.")
    if said.get("sha256") != models.sha256(models.resolve(named)):
        raise InputError(f"{source} was made from other weights than those now at {named}.")
    return named


def put(run: Run, model: str) -> None:
    """Puts the weights of another MODEL, floats or codes, below the adapters of a run. Raises InputError where it is no
    model of the same layers. What was trained whole stays. Inputs are rounded as the other model has it, but where a
    grid says how."""
    other = models.load(model, run.loaded.config.dtype).model
    fresh, held = weights(other), weights(run.model)
    if differing := next((n for n, w in held.items() if n not in fresh or fresh[n].shape != w.shape), None):
        raise InputError(
            f"{model} is no base of this adapter: it has no {differing} of {tuple(held[differing].shape)}."
        )
    inside, theirs = adapters.whole.inside(run.model), dict(ops(other))
    for name, w in held.items():
        if not inside(name):
            stored = fresh[name].stored
            w.store(stored.q if isinstance(stored, Codes) else stored.detach())
    for name, op in ops(run.model):
        if isinstance(op, RoundsInputs) and op.weight.grid is None and not inside(name):
            _round_inputs(op, theirs[name])


def _round_inputs(op: RoundsInputs, other: Any) -> None:
    """As the other op does."""
    if (p := other.input_qparams) is None:
        op.input = other.input
    else:
        op.round_inputs(other.input, replace(p, scale=other.input_scale))
