"""A model whose blocks' codes go to files of their own; one whose weights come from disk a block at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from halfbyte.containers.shards import Shards, read_json
from halfbyte.errors import InputError
from halfbyte.folders import check_begun, write_json
from halfbyte.formats import Format
from halfbyte.layers import ops
from halfbyte.models.checkpoint import Checkpoint, Source
from halfbyte.models.loading import Loaded
from halfbyte.models.structure import blocks
from halfbyte.qtensor import QParams, QTensor, check_parts

SETTINGS = "settings.json"


class Solved:
    """A source in which some weights are codes by now."""

    def __init__(self, base: Source) -> None:
        self.base = base
        self.codes: dict[str, tuple[Shards, QTensor]] = {}  # by op's name: where they lie, and what they look like

    def __contains__(self, name: str) -> bool:
        return name in self.base

    def get(self, name: str, shape: tuple[int, ...], turned: bool = False) -> Tensor | QTensor:
        found = self.codes.get(name.removesuffix(".weight"))
        return self.base.get(name, shape, turned) if found is None else read(*found, name.removesuffix(".weight"))

    def input(self, name: str) -> tuple[Format | None, QParams | None]:
        return self.base.input(name)


def read(shards: Shards, like: QTensor, name: str) -> QTensor:
    """An op's codes from a file that `Kept` wrote. Raises InputError for parts that do not fit."""
    parts = {n: shards.get(f"{name}:{n}") for n in like.tensors()}
    return check_parts(like.with_tensors(parts))


class Kept:
    """The codes of a model's blocks, a file a block, so that a killed run goes on from there.

    settings: what the codes depend on. Raises InputError if the folder was begun with other ones. `found` and `keep`
    are as in halfbyte.calibrate.Store.
    """

    def __init__(self, loaded: Loaded, folder: Path, settings: Mapping[str, Any]) -> None:
        self.loaded, self.folder = loaded, folder
        _begin(folder, settings)

    def found(self, prefix: str, formats: Mapping[str, Format]) -> dict[str, QTensor] | None:
        file = self.file(prefix)
        if not file.exists() or not formats:
            return None
        shards, by_name, out = Shards([file]), dict(ops(self.loaded.model)), {}
        for name, f in formats.items():
            shape = tuple(by_name[name].weight.shape)
            parts = {n.partition(":")[2]: shards.get(n) for n in shards if n.partition(":")[0] == name}
            if not parts:
                raise InputError(
                    f"{file} lacks the codes of {name}: give --overwrite in place of --resume to begin anew."
                )
            out[name] = check_parts(QTensor.of_leaves(f, shape, self.loaded.config.dtype, parts))
        return out

    def keep(self, prefix: str, codes: Mapping[str, QTensor]) -> None:
        new = self.file(prefix).with_suffix(".new")
        if parts := {f"{name}:{n}": t.contiguous() for name, q in codes.items() for n, t in q.tensors().items()}:
            save_file(parts, str(new))
            new.rename(self.file(prefix))

    def file(self, prefix: str) -> Path:
        return self.folder / f"{prefix or 'outside'}.safetensors"


class Blockwise:
    """Where the weights of a model are that was loaded with weights=False: on disk, but for the block at work. Its
    codes are kept, and read from there."""

    def __init__(self, kept: Kept) -> None:
        self.loaded, self.kept = kept.loaded, kept
        loaded = kept.loaded
        assert loaded.checkpoint is not None
        self.solved = Solved(loaded.checkpoint.source)
        loaded.checkpoint = self.checkpoint = Checkpoint(self.solved)
        self._prefixes = [prefix for prefix, _ in blocks(loaded.model)]
        for name, _ in list(loaded.model.named_parameters()):  # norms and such, which are small
            if not self._block_of(name) and not name.endswith(".stored"):
                self.checkpoint.materialize(loaded.model, loaded.config.dtype, name)

    def bring(self, prefix: str) -> None:
        for name in [prefix] if prefix else self._outside():
            self.checkpoint.materialize(self.loaded.model, self.loaded.config.dtype, name)

    @contextmanager
    def passing(self) -> Iterator[None]:
        model, brought = self.loaded.model, []

        def come(name: str, *_: Any) -> None:
            self.checkpoint.materialize(model, self.loaded.config.dtype, name)
            brought.append(name)

        by_name = dict(ops(model))
        absent = [n for n in self._outside() if by_name[n].weight.device.type == "meta"]
        handles = [by_name[n].register_forward_pre_hook(partial(come, n)) for n in absent]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for name in brought:
                self.checkpoint.release(model, name)

    def found(self, prefix: str, formats: Mapping[str, Format]) -> dict[str, QTensor] | None:
        codes = self.kept.found(prefix, formats)
        self._read_from(prefix, codes or {})
        return codes

    def keep(self, prefix: str, codes: Mapping[str, QTensor]) -> None:
        self.kept.keep(prefix, codes)
        self._read_from(prefix, codes)

    def _read_from(self, prefix: str, codes: Mapping[str, QTensor]) -> None:
        if codes:
            shards = Shards([self.kept.file(prefix)])
            self.solved.codes |= {name: (shards, q.to("meta")) for name, q in codes.items()}

    def let_go(self, prefix: str) -> None:
        for name in [prefix] if prefix else self._outside():
            self.checkpoint.release(self.loaded.model, name)

    def _block_of(self, name: str) -> str | None:
        return next((p for p in self._prefixes if name.startswith(f"{p}.")), None)

    def _outside(self) -> list[str]:
        return [name for name, _ in ops(self.loaded.model) if not self._block_of(name)]


def identity(path: Path) -> list[list[Any]]:
    """What tells the weights of a folder or file from others without reading them: names, sizes, times of writing."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def _begin(folder: Path, settings: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / SETTINGS
    if not file.exists():
        write_json(file, dict(settings))
        return
    check_begun(folder.parent, settings, read_json(file))
