"""A model sent as what differs from its base, and rebuilt by who has that base. `containers/delta.py` has the file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from halfbyte import models
from halfbyte.containers.delta import SUFFIX, Delta, Manifest, write
from halfbyte.errors import InputError
from halfbyte.folders import check_free, whole, whole_file

OnBytes = Callable[[int, int], None]


def export(
    model: str | Path, base: str | Path, output: str | Path, overwrite: bool = False, verify: bool = True,
    on_bytes: OnBytes = lambda done, total: None, without: Sequence[str] = (),
) -> Manifest:  # fmt: skip
    """Writes OUT.delta, from which every byte of `model` is rebuilt where `base` is: both are folders, hub ids or
    .gguf files. verify: whether it is rebuilt and held against the hashes before it is kept. without: files or
    folders of the model that are not sent, such as "masters". Raises InputError for an
    output of another name or that exists, and for what is no model."""
    output = Path(output)
    if output.suffix != SUFFIX:
        raise InputError(f"--to delta writes a file: name it {output.name}{SUFFIX}, not {output}.")
    check_free(output, overwrite, model, base)
    ours, theirs = models.resolve(model), models.resolve(base)
    if output.resolve().is_relative_to(ours.resolve()):
        raise InputError(f"{output} would lie in the folder that is sent; choose another -o.")
    with whole_file(output, overwrite) as partial:
        manifest = write(ours, theirs, partial, on_bytes, without)
        if verify:
            Delta(partial).rebuild(theirs, None)
    return manifest


def apply(
    base: str | Path, delta: str | Path, output: str | Path, overwrite: bool = False,
    on_bytes: OnBytes = lambda done, total: None,
) -> Manifest:  # fmt: skip
    """Rebuilds a model byte for byte, as a folder or a .gguf file, whole or not at all. Raises InputError for another
    base than the delta was made against, and for a delta that is damaged or hostile."""
    output = Path(output)
    check_free(output, overwrite, base, delta)
    read = Delta(Path(delta))
    if read.manifest.folder == (output.suffix == ".gguf"):
        kind = "a folder" if read.manifest.folder else "a .gguf file"
        raise InputError(f"{delta} makes {kind}, which {output} is no name of; choose another -o.")
    with (whole if read.manifest.folder else whole_file)(output, overwrite) as partial:
        read.rebuild(models.resolve(base), partial, on_bytes)
    return read.manifest
