"""Output folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from halfbyte.errors import InputError

CHECKPOINT = "checkpoint"
FILES = (".gguf", ".onnx")  # outputs that are one file

_OURS = ("halfbyte.json", "ledger.json")  # what a folder that halfbyte wrote holds


def check_free(target: Path, overwrite: bool = False, *sources: str | Path | None) -> None:
    """Refuses, before any work, a target that exists or cannot be made; with `overwrite`, one that halfbyte did not
    write, or in which one of the `sources` lies that are to be read. Raises InputError."""
    full = target.resolve()
    if target.exists() and not overwrite:
        raise InputError(f"{target} exists already; choose another -o, or add --overwrite to replace it.")
    if target.is_file() and target.suffix in FILES:
        if same := [s for s in sources if s is not None and Path(s).resolve() == full]:
            raise InputError(f"{target} cannot be replaced: {same[0]} is what is read; choose another -o.")
    elif target.exists():
        if not target.is_dir() or (any(target.iterdir()) and not any((target / n).exists() for n in _OURS)):
            raise InputError(f"{target} is nothing that halfbyte wrote; remove it yourself if it can go.")
        if inside := [s for s in sources if s is not None and Path(s).resolve().is_relative_to(full)]:
            raise InputError(f"{target} cannot be replaced: {inside[0]} is read from there; choose another -o.")
    parent = next(p for p in full.parents if p.exists())
    if not parent.is_dir():
        raise InputError(f"{target} cannot be made: {parent} is a file, not a folder.")
    if not os.access(parent, os.W_OK):
        raise InputError(f"{target} cannot be made: {parent} may not be written to.")


@contextmanager
def whole(target: Path, overwrite: bool = False, resume: bool = False) -> Iterator[Path]:
    """Yields `target.partial`, an empty folder that becomes `target` when the block ends well.

    When the block raises, the unfinished folder is removed, unless it holds a CHECKPOINT to go on from; with
    `resume` what is there from an earlier try is left in place. Raises InputError if `target` exists and
    `overwrite` is not set.
    """
    check_free(target, overwrite)
    target = target.resolve()  # "." has no name to add to
    partial = target.with_name(target.name + ".partial")
    if partial.is_file():
        partial.unlink()
    if (partial / CHECKPOINT).exists() and not (resume or overwrite):
        raise InputError(
            f"{partial} holds the checkpoint of an interrupted run: add --resume to go on, --overwrite to begin anew."
        )
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
        shutil.rmtree(target)
    partial.rename(target)


@contextmanager
def whole_file(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields `NAME.partial.SUFFIX`, a file to be written that becomes `target` when the block ends well, and is removed
    when it raises. Raises InputError as `check_free` does."""
    check_free(target, overwrite)
    target = target.resolve()
    partial = target.with_name(f"{target.stem}.partial{target.suffix}")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
