"""Output folders that appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from halfbyte.errors import InputError

CHECKPOINT = "checkpoint"
FILES = (".gguf", ".onnx", ".delta")  # outputs that are one file

_SHOWN = 160  # characters of settings, in a message
_OURS = ("halfbyte.json", "ledger.json")  # what a folder that halfbyte wrote holds


def beside(target: Path) -> Path:
    """The second file of an ONNX file: the weights, where the first has no room for them."""
    return target.with_name(f"{target.name}.data")


def disk_bytes(path: Path) -> int:
    """Bytes of the weight files of a folder, or of a file and what lies beside it."""
    if path.is_file():
        return path.stat().st_size + (beside(path).stat().st_size if beside(path).is_file() else 0)
    return sum(f.stat().st_size for f in path.iterdir() if f.suffix in (".safetensors", ".gguf"))


def _files(target: Path) -> list[Path]:
    """All that an output of FILES may be."""
    return [target, beside(target)] if target.suffix == ".onnx" else [target]


def check_free(target: Path, overwrite: bool = False, *sources: str | Path | None) -> None:
    """Refuses, before any work, a target that exists or cannot be made; with `overwrite`, one that halfbyte did not
    write, or in which one of the `sources` lies that are to be read. Raises InputError."""
    full = target.resolve()
    if taken := [p for p in _files(target) if p.exists() and not overwrite]:
        raise InputError(f"{taken[0]} exists already; choose another -o, or add --overwrite to replace it.")
    if folders := [p for p in _files(target)[1:] if p.is_dir()]:
        raise InputError(f"{folders[0]} is nothing that halfbyte wrote; remove it yourself if it can go.")
    if target.is_file() and target.suffix in FILES:
        if same := [s for s in sources if s is not None and Path(s).resolve() in _files(full)]:
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


def finished(target: Path, overwrite: bool) -> bool:
    """Whether there is nothing to resume: the output is there, and no other is on its way to replace it."""
    begun = target.resolve().with_name(f"{target.resolve().name}.partial") / CHECKPOINT
    return target.exists() and not (overwrite and begun.exists())


def begin(target: Path, overwrite: bool = False, resume: bool = False) -> Path:
    """The folder `target.partial`, which is not there yet, or with `resume` holds what an earlier try can be gone on
    from: what that had begun to write beside is removed, since a killed one may have left it in the middle. Raises
    InputError as `check_free` does, and for one that could be gone on from but neither is asked for."""
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
    for left in partial.iterdir() if partial.exists() else ():
        if not left.name.startswith(CHECKPOINT):  # or its ".new", see resume.py
            _remove(left)
    return partial


@contextmanager
def before(target: Path, overwrite: bool = False, resume: bool = False) -> Iterator[Path]:
    """Yields the CHECKPOINT of `target.partial`, for work that comes before what is written. What is refused leaves
    none behind, unless an earlier try did. Raises InputError as `begin` does."""
    partial = begin(target, overwrite, resume)
    with _swept(partial):
        yield partial / CHECKPOINT


@contextmanager
def _swept(partial: Path) -> Iterator[None]:
    """Removes an unfinished folder when the block raises, unless it holds a CHECKPOINT to go on from, and not from what
    was refused."""
    earlier = (partial / CHECKPOINT).exists()
    try:
        yield
    except BaseException as e:
        if not (partial / CHECKPOINT).exists() or (isinstance(e, InputError) and not earlier):
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def write_json(path: Path, value: Any) -> None:
    """A file of JSON that appears whole or not at all."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(value))
    new.rename(path)


def check_begun(work: Path, settings: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Raises InputError where what is under `work` was begun with other settings than these. before: those, as JSON has
    them."""
    for key, value in settings.items():
        was, now = before.get(key), json.loads(json.dumps(value))
        if was != now:
            told = f"{key} {was}, not {now}"
            raise InputError(
                f"--resume: {work} was begun with {told if len(told) < _SHOWN else f'another {key}'}; "
                "give the same command, or --overwrite in place of --resume to begin anew."
            )


@contextmanager
def whole(target: Path, overwrite: bool = False, resume: bool = False) -> Iterator[Path]:
    """Yields `target.partial`, an empty folder that becomes `target` when the block ends well.

    When the block raises, the unfinished folder is removed, unless it holds a CHECKPOINT to go on from, and not from
    what was refused; with `resume` the CHECKPOINT of an earlier try is left in place. Raises InputError if `target`
    exists and `overwrite` is not set.
    """
    partial = begin(target, overwrite, resume)
    target = target.resolve()
    partial.mkdir(parents=True, exist_ok=True)
    with _swept(partial):
        yield partial
    shutil.rmtree(partial / CHECKPOINT, ignore_errors=True)
    if target.exists():
        # the old result goes only once the new one is complete
        shutil.rmtree(target)
    partial.rename(target)


@contextmanager
def whole_file(target: Path, overwrite: bool = False, resume: bool = False) -> Iterator[Path]:
    """Yields the file of that name in a folder of its own, `target.partial`. When the block ends well the file becomes
    `target`, with a second one that may have been written `beside` it; when it raises, both are removed. A CHECKPOINT
    and `resume` are as in `whole`. Raises InputError as `check_free` does."""
    folder = begin(target, overwrite, resume)
    target = target.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / target.name
    try:
        yield partial
        second = [p for p in _files(partial)[1:] if p.exists()]
        for p in second:
            target.unlink(missing_ok=True)  # or it would be read with a second file that is not its own
            p.replace(target.with_name(p.name))
        partial.replace(target)
        if not second:
            for p in _files(target)[1:]:  # of what was there before
                p.unlink(missing_ok=True)
    except BaseException:
        for p in _files(partial):
            p.unlink(missing_ok=True)
        if not (folder / CHECKPOINT).exists():
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
