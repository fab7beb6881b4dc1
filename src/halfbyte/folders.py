"""Output folders that appear whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from halfbyte.errors import InputError

CHECKPOINT = "checkpoint"


def check_free(target: Path, overwrite: bool = False) -> None:
    """Refuses, before any work, a target that exists or cannot be made. Raises InputError."""
    if target.exists() and not overwrite:
        raise InputError(f"{target} exists already; choose another -o, or add --overwrite to replace it.")
    parent = next(p for p in (target.absolute().parents) if p.exists())
    if not parent.is_dir():
        raise InputError(f"{target} cannot be made: {parent} is a file, not a folder.")


@contextmanager
def whole(target: Path, overwrite: bool = False, resume: bool = False) -> Iterator[Path]:
    """Yields `target.partial`, an empty folder that becomes `target` when the block ends well.

    When the block raises, the unfinished folder is removed, unless it holds a CHECKPOINT to go on from; with
    `resume` what is there from an earlier try is left in place. Raises InputError if `target` exists and
    `overwrite` is not set.
    """
    check_free(target, overwrite)
    partial = target.with_name(target.name + ".partial")
    if partial.exists() and not resume:
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
    except BaseException:
        if not (partial / CHECKPOINT).exists():
            shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(partial / CHECKPOINT, ignore_errors=True)
    if target.exists():
        # the old result goes only once the new one is complete
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    partial.rename(target)
