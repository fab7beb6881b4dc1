"""A model as what differs from its base: one file, of which the model is rebuilt byte for byte.

    8 bytes        HBDELTA1
    3 x u64        where the manifest begins, its bytes, its bytes when it is unpacked (little-endian)
    32 bytes       sha256 of the packed manifest
    ...            what is packed, a piece after the other
    ...            the manifest: JSON, packed

The manifest names the base by the sha256 of its weight files, and of every file of the model its path, size, sha256
and pieces. A piece is bytes of the base as they are, or moved by a packed difference (`lanes`), or bytes of its own. It
says where they are and nothing of tensors: those are matched, by name, dtype and shape, by who writes it.

A delta may come from anyone. Sizes and places are checked before anything is made of them, and every rebuilt file
against its hash.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, BinaryIO, NamedTuple

from pydantic import Field, TypeAdapter, ValidationError

from halfbyte.containers import gguf, lanes, shards
from halfbyte.errors import InputError
from halfbyte.folders import CHECKPOINT

SUFFIX = ".delta"
_MAGIC, _HEAD = b"HBDELTA1", struct.Struct("<8sQQQ32s")
_LARGEST_MANIFEST = 1 << 24  # bytes, unpacked
_MOST_PACKED = 8 * lanes.BLOCK  # bytes of a piece: what is packed can be larger than what it stands for
_SAME, _NEW = 0, 1  # codes of a piece; any other is the width of a difference

Size = Annotated[int, Field(ge=0, lt=1 << 62)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
OnBytes = Callable[[int, int], None]


class Piece(NamedTuple):
    """`size` bytes of a file. code: _SAME, as the base has them; _NEW, packed by themselves; else the width of a
    difference. source: a file of the base, None for zeros; offset: where in it. packed: bytes in the delta."""

    size: Size
    code: int
    source: str | None = None
    offset: Size = 0
    packed: Size = 0


@dataclass(frozen=True)
class File:
    """A file of the model, or a file that is one. path: within the folder, parts joined by "/"."""

    path: str
    size: Size
    sha256: Sha256
    pieces: list[Piece] = field(repr=False)


@dataclass(frozen=True)
class Manifest:
    """base: sha256 of the base's weight files. folder: whether the model is one, or the file that is its only one."""

    base: Sha256
    folder: bool
    files: list[File]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(f.size for f in self.files)


_MANIFEST = TypeAdapter(Manifest)


# --- what a model is made of


def files_of(model: Path) -> dict[str, Path]:
    """Path within a model's folder -> file, in order; a .gguf file is a model of one file, whatever it is called.
    Raises InputError for what is no model."""
    if model.is_file() and model.suffix == ".gguf":
        return {"model.gguf": model}
    if not model.is_dir():
        raise InputError(f"{model} is neither a model's folder nor a .gguf file.")
    return {p.relative_to(model).as_posix(): p for p in sorted(model.rglob("*")) if p.is_file()}


def weight_files(files: dict[str, Path]) -> dict[str, Path]:
    """Those of `files_of` that hold the weights of the model itself."""
    return {n: p for n, p in sorted(files.items()) if "/" not in n and n.endswith((".safetensors", ".gguf"))}


def base_sha256(base: Path) -> str:
    """What a delta knows its base by. Raises InputError for a folder without weights."""
    if not (weights := weight_files(files_of(base))):
        raise InputError(f"{base} holds no weights in .safetensors or .gguf files.")
    return shards.sha256_of(weights.values())


class _Part(NamedTuple):
    """A tensor's bytes, or those between tensors. key: what makes it the same in another file."""

    key: tuple[Any, ...]
    begin: int
    end: int
    tensor: bool = True


def _parts(file: Path) -> list[_Part]:
    """A file from its first byte to its last. Raises InputError for a damaged one."""
    tensors: list[_Part] = []
    if file.suffix == ".safetensors":
        tensors = [_Part((n, d, s), b, e) for n, (d, s, b, e) in shards.header(file).items()]
    elif file.suffix == ".gguf":
        infos = gguf.File(file).infos
        tensors = [_Part((n, i.type, i.shape), i.offset, i.offset + i.nbytes) for n, i in infos.items()]
    out, at = [], 0
    for part in (*sorted(tensors, key=lambda p: (p.begin, p.end)), _Part((), size := file.stat().st_size, size)):
        if part.begin > at:
            out.append(_Part((at, part.begin), at, part.begin, tensor=False))
        if part.end > part.begin:
            out.append(part)
        at = max(at, part.end)
    return out


# --- writing


def write(
    model: Path, base: Path, output: Path, on_bytes: OnBytes = lambda done, total: None, without: Sequence[str] = ()
) -> Manifest:  # fmt: skip
    """Writes what makes `model` of `base`; both are folders or .gguf files. on_bytes: told the bytes of the model that
    are done, and all. without: files, or folders of them, that are not sent. Raises InputError for what is no model,
    holds a file that cannot be sent, or nothing of what is to be left out."""
    files, theirs = files_of(model), files_of(base)
    for name in without:
        if not (left := [p for p in files if p == name or p.startswith(f"{name.rstrip('/')}/")]):
            raise InputError(f"--without {name}: {model} has no such file or folder.")
        files = {p: f for p, f in files.items() if p not in left}
    if bad := next(((p, why) for p in files if (why := _unsafe(p))), None):
        raise InputError(f"{model}: the file {bad[0]!r} cannot be sent: {bad[1]}.")
    digest = base_sha256(base)
    weights = weight_files(theirs)
    known = {part.key: (n, part.begin) for n, file in weights.items() for part in _parts(file)}
    total, done, sent = sum(f.stat().st_size for f in files.values()), 0, []
    with open(output, "wb") as out:
        out.write(bytes(_HEAD.size))
        for path, file in files.items():
            size, sha256 = file.stat().st_size, _sha256(file)
            same = path in theirs and theirs[path].stat().st_size == size and _sha256(theirs[path]) == sha256
            whole = [Piece(size, _SAME, path)] if size else []
            pieces = whole if same else _merged(_pieces(file, known, theirs, out))
            sent.append(File(path, size, sha256, pieces))
            on_bytes(done := done + size, total)
        manifest = Manifest(digest, model.is_dir(), sent)
        text = json.dumps(asdict(manifest), separators=(",", ":")).encode()
        if len(text) > _LARGEST_MANIFEST:
            raise InputError(f"{model} has too many files and tensors for a delta.")
        packed, at = lanes.pack(text), out.tell()
        out.write(packed)
        out.seek(0)
        out.write(_HEAD.pack(_MAGIC, at, len(packed), len(text), hashlib.sha256(packed).digest()))
    return manifest


def _pieces(
    file: Path, known: dict[tuple, tuple[str, int]], base: dict[str, Path], out: BinaryIO
) -> Iterator[Piece]:  # fmt: skip
    """Of a file that the base does not have, as it is written."""
    with open(file, "rb") as f:
        for part in _parts(file):
            source, offset = known.get(part.key, (None, 0))
            for begin in range(0, part.end - part.begin, lanes.BLOCK):
                data = f.read(min(lanes.BLOCK, part.end - part.begin - begin))
                theirs = None if source is None else _read(base[source], offset + begin, len(data))
                if theirs == data:
                    yield Piece(len(data), _SAME, source, offset + begin)
                    continue
                code, packed = _packed(theirs, data) if part.tensor else (_NEW, lanes.pack(data))
                out.write(packed)
                from_base = source is not None and code != _NEW
                yield Piece(len(data), code, *((source, offset + begin) if from_base else (None, 0)), len(packed))


def _packed(theirs: bytes | None, data: bytes) -> tuple[int, bytes]:
    """A tensor's block in the fewest bytes: what it differs by from the base's, or from zeros, or itself."""
    found = [lanes.difference(theirs or bytes(len(data)), data)]
    if theirs is None or len(found[0][1]) >= len(data):
        found.append((_NEW, lanes.pack(data)))
    return min(found, key=lambda f: len(f[1]))


def _merged(pieces: Iterator[Piece]) -> list[Piece]:
    """What the base has as it is, in pieces as long as can be."""
    out: list[Piece] = []
    for p in pieces:
        last = out[-1] if out else None
        if last and last.code == p.code == _SAME and (p.source, p.offset) == (last.source, last.offset + last.size):
            out[-1] = last._replace(size=last.size + p.size)
        else:
            out.append(p)
    return out


# --- reading


class Delta:
    """A delta's manifest, checked, and how its model is rebuilt. Raises InputError that names the file for one that is
    missing, damaged or none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as f:
                self.manifest = self._manifest(f, path.stat().st_size)
        except OSError as e:
            raise InputError(f"{path} cannot be read: {e.strerror}.") from None

    def _fail(self, what: str) -> InputError:
        return InputError(f"{self.path} is damaged or no delta of halfbyte's: {what}.")

    def _manifest(self, f: BinaryIO, size: int) -> Manifest:
        head = f.read(_HEAD.size)
        if len(head) < _HEAD.size or not head.startswith(_MAGIC):
            raise self._fail(f"it does not begin with {_MAGIC.decode()}" if head else "it is empty")
        _, at, length, unpacked, sha256 = _HEAD.unpack(head)
        if at < _HEAD.size or at + length != size or unpacked > _LARGEST_MANIFEST:
            raise self._fail(f"its manifest is said to end at {at + length}, and the file ends at {size}")
        f.seek(at)
        packed = f.read(length)
        if hashlib.sha256(packed).digest() != sha256:
            raise self._fail("its manifest has another sha256")
        try:
            manifest = _MANIFEST.validate_json(lanes.unpack(packed, unpacked), strict=True)
        except InputError as e:
            raise self._fail(f"its manifest: {str(e).rstrip('.')}") from None
        except ValidationError as e:
            first = e.errors()[0]
            raise self._fail(f"its manifest at {'.'.join(map(str, first['loc']))[:80]!r}: {first['msg']}") from None
        self._check(manifest, at - _HEAD.size)
        return manifest

    def _check(self, m: Manifest, packed: int) -> None:
        """What types do not say."""
        paths = [f.path for f in m.files]
        if bad := next(((p, why) for p in paths if (why := _unsafe(p))), None):
            raise self._fail(f"the file {bad[0][:80]!r}: {bad[1]}")
        folders = {str(parent) for p in paths for parent in PurePosixPath(p).parents}
        if len(set(paths)) < len(paths) or folders.intersection(paths):
            raise self._fail("two of its files are in one place")
        if not m.folder and paths != ["model.gguf"]:
            raise self._fail("it is of no folder, and of no .gguf file")
        for f in m.files:
            if sum(p.size for p in f.pieces) != f.size:
                raise self._fail(f"the pieces of {f.path[:80]!r} are not its {f.size} bytes")
            if bad := next((p for p in f.pieces if not _possible(p)), None):
                raise self._fail(f"{f.path[:80]!r} has a piece that cannot be, of {bad.size} bytes by {bad.code}")
        if sum(p.packed for f in m.files for p in f.pieces) != packed:
            raise self._fail(f"its pieces are not its {packed} packed bytes")

    def rebuild(self, base: Path, target: Path | None, on_bytes: OnBytes = lambda done, total: None) -> None:
        """Writes the model into an existing folder, or as a file where it is one; to None it is only made and checked.
        Raises InputError for another base than the delta's, a disk without room, and a file that does not come out
        with its hash."""
        m, theirs = self.manifest, files_of(base)
        if (found := base_sha256(base)) != m.base:
            raise InputError(
                f"{self.path} is of a base whose weights have the sha256 {m.base[:12]}..., and those of {base} have "
                f"{found[:12]}...; find the base that it was made against."
            )
        self._check_base(base, theirs)
        if target is not None and (free := shutil.disk_usage(target.parent).free) < m.size:
            raise InputError(f"{self.path} makes {m.size / 1e6:.1f} MB, and the disk of {target} has {free / 1e6:.1f}.")
        done = 0
        with open(self.path, "rb") as packed:
            packed.seek(_HEAD.size)
            for f in m.files:
                digest = hashlib.sha256()
                with _opened(target, f.path if m.folder else "") as out:
                    for block in self._blocks(f, theirs, packed):
                        out.write(block)
                        digest.update(block)
                        on_bytes(done := done + len(block), m.size)
                if digest.hexdigest() != f.sha256:
                    raise InputError(
                        f"{f.path} comes out with the sha256 {digest.hexdigest()[:12]}..., not {f.sha256[:12]}...: "
                        f"{self.path} is damaged, or {base} has changed beside its weights."
                    )

    def _check_base(self, base: Path, theirs: dict[str, Path]) -> None:
        """Raises InputError where the base lacks bytes that are taken from it."""
        needed: dict[str, int] = {}
        for p in (p for f in self.manifest.files for p in f.pieces):
            if p.source is not None:
                needed[p.source] = max(needed.get(p.source, 0), p.offset + p.size)
        for name, size in needed.items():
            if name not in theirs:
                raise InputError(f"{base} has no {name[:80]!r}, which {self.path} takes from it.")
            if (here := theirs[name].stat().st_size) < size:
                raise InputError(f"{theirs[name]} has {here} bytes, and {self.path} takes {size} from it.")

    def _blocks(self, f: File, theirs: dict[str, Path], packed: BinaryIO) -> Iterator[bytes]:
        for p in f.pieces:
            if p.code == _SAME:
                assert p.source is not None
                for at in range(0, p.size, lanes.BLOCK):
                    yield _read(theirs[p.source], p.offset + at, min(lanes.BLOCK, p.size - at))
                continue
            data = packed.read(p.packed)
            try:
                if p.code == _NEW:
                    yield lanes.unpack(data, p.size)
                else:
                    before = bytes(p.size) if p.source is None else _read(theirs[p.source], p.offset, p.size)
                    yield lanes.restore(before, p.code, data)
            except InputError as e:
                raise self._fail(f"a piece of {f.path!r}: {str(e).rstrip('.')}") from None

    def differences(self, model: Path) -> list[str]:
        """How a model's files differ from those that were sent, a sentence each."""
        here, out = files_of(model), []
        for f in self.manifest.files:
            if f.path not in here:
                out.append(f"{f.path} is missing.")
            elif (size := here[f.path].stat().st_size) != f.size:
                out.append(f"{f.path} has {size} bytes, not the {f.size} that were sent.")
            elif (found := _sha256(here[f.path])) != f.sha256:
                out.append(f"{f.path} has the sha256 {found[:12]}..., not the {f.sha256[:12]}... that was sent.")
        return out + [f"{n} was not sent." for n in here if n not in {f.path for f in self.manifest.files}]


def _opened(target: Path | None, path: str) -> BinaryIO:
    """A file to write, in a folder or without a path the target itself; without a target nowhere."""
    if target is None:
        return open(os.devnull, "wb")
    (target / path).parent.mkdir(parents=True, exist_ok=True)
    return open(target / path, "wb")


def _possible(p: Piece) -> bool:
    if p.code == _SAME:
        return p.size > 0 and p.source is not None and not p.packed
    known = p.code in lanes.WIDTHS or (p.code == _NEW and p.source is None)
    return known and 0 < p.size <= lanes.BLOCK and p.packed <= _MOST_PACKED


def _read(file: Path, offset: int, size: int) -> bytes:
    """Raises InputError where there are fewer bytes."""
    with open(file, "rb") as f:
        f.seek(offset)
        data = f.read(size)
    if len(data) < size:
        raise InputError(f"{file} ends before byte {offset + size}.")
    return data


def _sha256(file: Path) -> str:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _unsafe(path: str) -> str | None:
    """Why a path is not one within a folder, in words, on any system; None if it is."""
    parts = path.split("/")
    try:
        long = len(path.encode()) > 1000 or max(len(p.encode()) for p in parts) > 250
    except UnicodeEncodeError:
        return "its name is no text"
    if long or any(c < " " for c in path):
        return "its name is too long, or holds characters that no name does"
    if any(p in ("", ".", "..") for p in parts) or "\\" in path or ":" in path:
        return "it leads out of its folder"
    return f"{CHECKPOINT} is where unfinished work lies" if parts[0] == CHECKPOINT else None
