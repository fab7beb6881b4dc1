"""A training's state on disk: what an interrupted run goes on from, to the same bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import save_file

from halfbyte.containers.shards import Shards, read_json
from halfbyte.folders import check_begun
from halfbyte.train import State

STATE, WHERE, SCRATCH = "state.safetensors", "where.json", "scratch"


def save(folder: Path, state: State, settings: dict[str, Any]) -> None:
    """Writes the state beside the old one and then in its place, so that a kill leaves one or the other."""
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    save_file({**state.tensors, "rng": state.rng}, str(new / STATE))
    (new / WHERE).write_text(json.dumps({"curve": state.curve, "settings": settings}))
    if folder.exists():
        shutil.rmtree(folder)
    new.rename(folder)


@contextmanager
def scratch(checkpoint: Path | None) -> Iterator[Path]:
    """A folder for what a training needs on disk meanwhile: beside its checkpoint, where the next run removes what a
    killed one left; without a checkpoint, the system's."""
    if checkpoint is None:
        with TemporaryDirectory() as name:
            yield Path(name)
        return
    folder = checkpoint.with_name(SCRATCH)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def load(folder: Path, settings: dict[str, Any]) -> State | None:
    """The state, or None where there is none. Raises InputError if it was made with other settings or data."""
    if not folder.exists() and (new := folder.with_name(folder.name + ".new")).exists() and (new / WHERE).exists():
        new.rename(folder)  # killed between the two steps of save
    if not folder.exists():
        return None
    where = read_json(folder / WHERE)
    check_begun(folder.parent, settings, where.get("settings", {}))
    shards = Shards([folder / STATE])
    tensors = {name: shards.get(name) for name in shards}
    rng = tensors.pop("rng")
    return State(where["curve"], tensors, rng)
