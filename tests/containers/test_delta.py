"""Deltas: a model rebuilt byte for byte, and files that are damaged or hostile."""

from __future__ import annotations

import hashlib
import json
import lzma
import random
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from halfbyte.containers import delta, lanes
from halfbyte.containers.delta import Delta, base_sha256, write
from halfbyte.containers.shards import write_shards
from halfbyte.errors import InputError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int8, torch.uint8, torch.int64, torch.bool,
          torch.float8_e4m3fn)  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def folder(path: Path, tensors: dict[str, torch.Tensor], **files: bytes) -> Path:
    """A folder of a model with one file of weights, and other files."""
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    for name, data in files.items():
        place = path / name.replace("__", "/")
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(data)
    return path


def sent(base: Path, model: Path, where: Path) -> tuple[int, Path]:
    """A model written as a delta and rebuilt: the delta's bytes, and the rebuilt folder."""
    write(model, base, where / "x.delta")
    (where / "out").mkdir()
    Delta(where / "x.delta").rebuild(base, where / "out")
    return (where / "x.delta").stat().st_size, where / "out"


tensors = st.builds(
    lambda dtype, shape, seed: (
        torch.randint(
            0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
        )
        .bitwise_and(1 if dtype == torch.bool else 255)
        .view(dtype)
        .reshape(shape)
    ),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 6), max_size=3).map(tuple),
    st.integers(0, 1 << 32),
)
models = st.dictionaries(st.sampled_from("abcdef"), tensors, max_size=5)


@given(models, models, st.booleans(), st.integers(0, 1 << 32))
def test_what_is_rebuilt_is_the_model_to_the_byte(tmp_path_factory, before, after, tuned, seed):
    """Tensors that are changed, added, removed, and of other shapes and dtypes under a name that was there."""
    where, rng = tmp_path_factory.mktemp("delta"), np.random.default_rng(seed)
    if tuned:  # the same model with some of its bytes moved
        after = {n: t.clone() for n, t in before.items()}
        for t in (t for t in after.values() if t.numel() and t.dtype != torch.bool):
            t.reshape(-1).view(torch.uint8).numpy()[rng.integers(t.nbytes)] += 1
    base = folder(where / "base", before, config=b"{}", same=b"as it was")
    model = folder(where / "model", after, config=b'{"a": 1}', same=b"as it was", deeper__new=rng.bytes(100))
    assert contents(sent(base, model, where)[1]) == contents(model)


def test_tensors_are_found_wherever_they_lie(tmp_path):
    """In other files, in another order, beside others."""
    made = {f"t{i}": torch.randn(64, 1024) for i in range(4)}
    base = folder(tmp_path / "base", made)
    (model := tmp_path / "model").mkdir()
    write_shards(model, [("new", torch.zeros(7)), *reversed(made.items())], max_shard=600_000)
    assert len(list(model.glob("*.safetensors"))) == 2
    size, out = sent(base, model, tmp_path)
    assert contents(out) == contents(model)
    assert size < 2000


def test_a_file_that_the_base_has_is_only_named(tmp_path):
    big = random.Random(0).randbytes(100_000)
    base = folder(tmp_path / "base", {"a": torch.ones(3)}, tokenizer=big)
    model = folder(tmp_path / "model", {"a": torch.zeros(3)}, tokenizer=big, empty=b"")
    size, out = sent(base, model, tmp_path)
    assert contents(out) == contents(model)
    assert size < 1000


def test_five_of_a_hundred_codes_that_moved_take_a_tenth_of_their_bytes(tmp_path):
    """Codes packed by eight into int32, as compressed-tensors has them, with scales that stay."""
    rng, n = np.random.default_rng(0), 1 << 20
    codes = rng.integers(1, 15, n)
    moved = codes + np.where(rng.random(n) < 0.05, rng.choice([-1, 1], n), 0)

    def model(name: str, c: np.ndarray) -> Path:
        packed = torch.from_numpy((c[::2] | c[1::2] << 4).astype(np.uint8)).view(torch.int32).reshape(256, -1)
        return folder(tmp_path / name, {"w.packed": packed, "w.scale": scale})

    scale = torch.rand(256, 32).half()
    base, tuned = model("base", codes), model("tuned", moved)
    size, out = sent(base, tuned, tmp_path)
    assert contents(out) == contents(tuned)
    assert size < 1.07 * n * 0.3364 / 8  # H(0.05) + 0.05 bits


def test_gguf_files(tmp_path):
    from halfbyte.containers import gguf

    def file(name: str, change: float) -> Path:
        t = torch.arange(64 * 256, dtype=torch.float32).reshape(64, 256)
        t[3, 5] += change
        gguf.write(tmp_path / name, {"general.architecture": "llama"}, {"t": ("f32", (64, 256))}, [("t", t)])
        return tmp_path / name

    base, model = file("base.gguf", 0), file("tuned.gguf", 1)
    write(model, base, tmp_path / "x.delta")
    Delta(tmp_path / "x.delta").rebuild(base, tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == model.read_bytes()
    assert (tmp_path / "x.delta").stat().st_size < 1000


def test_what_is_no_model(tmp_path):
    base = folder(tmp_path / "base", {"a": torch.ones(3)})
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("no")
    for model, against, word in (
        (base, tmp_path / "empty", "holds no weights"),
        (base, tmp_path / "nowhere", "neither a model's folder"),
        (tmp_path / "file.txt", base, "neither a model's folder"),
    ):
        with pytest.raises(InputError, match=word):
            write(model, against, tmp_path / "x.delta")
    (base / "checkpoint").mkdir()
    (base / "checkpoint" / "x").write_text("")
    with pytest.raises(InputError, match=r"'checkpoint/x' cannot be sent: .*unfinished work"):
        write(base, base, tmp_path / "x.delta")


# ---- what comes from anyone


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A base, a model, and the delta between the two."""
    where = tmp_path_factory.mktemp("pair")
    t = torch.arange(4000, dtype=torch.int32)
    base = folder(where / "base", {"a": t, "b": torch.ones(5)}, config=b"{}", words=b"as they were")
    model = folder(where / "model", {"a": t + (t % 20 == 0), "c": torch.ones(7)}, config=b"{1}", words=b"as they were")
    write(model, base, where / "x.delta")
    return base, model, where / "x.delta"


def rewritten(file: Path, change, to: Path) -> Delta:
    """A delta whose manifest was changed by who knows how to."""
    whole = file.read_bytes()
    _, at, length, size, _ = delta._HEAD.unpack(whole[: delta._HEAD.size])
    manifest = json.loads(lanes.unpack(whole[at : at + length], size))
    manifest = change(manifest) or manifest
    text = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    packed = lanes.pack(text)
    head = delta._HEAD.pack(delta._MAGIC, at, len(packed), len(text), hashlib.sha256(packed).digest())
    to.write_bytes(head + whole[delta._HEAD.size : at] + packed)
    return Delta(to)


def test_nothing_changed_is_read(pair, tmp_path):
    assert rewritten(pair[2], lambda m: None, tmp_path / "d").manifest == Delta(pair[2]).manifest


PATHS = ("../x", "/etc/x", "a/../../x", "a//x", "", ".", "..", "a/.", "a\\x", "c:x", "a\0", "x\n", "a" * 300, "/", "a/",
         "a/" * 600 + "x", "\ud800", "checkpoint/where.json", "checkpoint")  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_a_path_stays_in_its_folder(pair, tmp_path, path):
    with pytest.raises(InputError, match="damaged or no delta"):
        rewritten(pair[2], lambda m: m["files"][0].update(path=path), tmp_path / "d")
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def first_piece(value: list):
    return lambda m: m["files"][0].update(size=value[0], pieces=[value])


# "model.safetensors" is the second file, whose first piece is its header
MANIFESTS = {
    "no JSON": lambda m: b"{nothing",
    "deep": lambda m: b"[" * 200_000,
    "a list": lambda m: b"[]",
    "no files": lambda m: m.pop("files") and None,
    "a base that is no hash": lambda m: m.update(base="abc"),
    "hash in capitals": lambda m: m["files"][0].update(sha256="A" * 64),
    "two files in one place": lambda m: m["files"].append(m["files"][0]),
    "a file where a folder is": lambda m: m["files"].append({**m["files"][2], "path": "config/x"}),
    "a file that is no gguf": lambda m: m.update(folder=False),
    "folder is a number": lambda m: m.update(folder=1),
    "negative size": lambda m: m["files"][0].update(size=-1),
    "size is a text": lambda m: m["files"][0].update(size="3"),
    "size is true": lambda m: m["files"][0].update(size=True),
    "huge": lambda m: m["files"][0].update(size=1 << 64),
    "pieces are fewer": lambda m: m["files"][1].update(pieces=m["files"][1]["pieces"][:-1]),
    "packed is more": lambda m: m["files"][0]["pieces"][0].__setitem__(4, 10_000),
    "packed is negative": lambda m: m["files"][0]["pieces"][0].__setitem__(4, -1),
    "a block too large": first_piece([1 << 40, 8, "model.safetensors", 0, 5]),
    "new, and too large": first_piece([1 << 40, 1, None, 0, 5]),
    "an unknown code": first_piece([3, 7, None, 0, 5]),
    "nothing as it is": first_piece([3, 0, None, 0, 0]),
    "as it is, and packed": first_piece([3, 0, "words", 0, 5]),
    "new, of the base": first_piece([3, 1, "words", 0, 5]),
    "empty pieces": first_piece([0, 0, "words", 0, 0]),
    "piece of six": first_piece([3, 1, None, 0, 5, 6]),
    "piece of one": first_piece([3]),
    "negative offset": first_piece([3, 0, "words", -3, 0]),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_hostile_manifest_is_refused(pair, tmp_path, kind):
    with pytest.raises(InputError, match="damaged or no delta"):
        rewritten(pair[2], MANIFESTS[kind], tmp_path / "d")


def test_a_manifest_that_unpacks_to_more_than_it_says(pair, tmp_path):
    packed = lzma.compress(bytes(1 << 25), lzma.FORMAT_RAW, filters=lanes._TEXT)
    for size in (100, 1 << 25, 1 << 60):
        head = struct.pack("<8sQQQ", b"HBDELTA1", delta._HEAD.size, len(packed), size)
        (tmp_path / "d").write_bytes(head + hashlib.sha256(packed).digest() + packed)
        with pytest.raises(InputError, match="damaged or no delta"):
            Delta(tmp_path / "d")


def only(model_files: list):
    return lambda m: m.update(files=model_files)


def as_base(size: int, source: str, offset: int = 0) -> dict:
    return {"path": "x", "size": size, "sha256": "0" * 64, "pieces": [[size, 0, source, offset, 0]]}


@pytest.mark.parametrize(
    ("piece", "word"),
    [(as_base(3, "../model/config"), "has no '../model/config'"), (as_base(3, "nowhere"), "has no 'nowhere'"),
     (as_base(1 << 50, "words"), "takes 1125899906842624 from it"), (as_base(3, "words", 1 << 61), "from it")],
)  # fmt: skip
def test_a_piece_of_what_the_base_has_not(pair, tmp_path, piece, word):
    base, _, file = pair
    whole = file.read_bytes()
    magic, at, *rest = delta._HEAD.unpack(whole[: delta._HEAD.size])
    bare = tmp_path / "bare"  # without anything packed
    bare.write_bytes(delta._HEAD.pack(magic, delta._HEAD.size, *rest) + whole[at:])
    made = rewritten(bare, only([piece]), tmp_path / "d")
    with pytest.raises(InputError, match=word):
        made.rebuild(base, None)


def test_more_than_the_disk_has_room_for(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(InputError, match=r"makes 0\.0 MB, and the disk"):
        Delta(pair[2]).rebuild(pair[0], tmp_path)
    assert not list(tmp_path.iterdir())


def test_another_base_is_named_by_both_hashes(pair, tmp_path):
    other = folder(tmp_path / "other", {"a": torch.zeros(3)})
    with pytest.raises(InputError, match=f"{base_sha256(pair[0])[:12]}.*{base_sha256(other)[:12]}"):
        Delta(pair[2]).rebuild(other, None)


def test_a_base_that_changed_beside_its_weights(pair, tmp_path):
    base = shutil.copytree(pair[0], tmp_path / "base")
    (base / "words").write_bytes(b"as they are!")
    with pytest.raises(InputError, match="words comes out with the sha256"):
        Delta(pair[2]).rebuild(base, None)
    (base / "words").unlink()
    with pytest.raises(InputError, match="has no 'words'"):
        Delta(pair[2]).rebuild(base, None)


def test_every_truncation_is_noticed(pair, tmp_path):
    whole = pair[2].read_bytes()
    for n in range(len(whole)):
        (tmp_path / "d").write_bytes(whole[:n])
        with pytest.raises(InputError, match=str(tmp_path / "d")):
            Delta(tmp_path / "d")


def test_every_damaged_byte_is_noticed(pair, tmp_path):
    whole = pair[2].read_bytes()
    for at in range(len(whole)):
        (tmp_path / "d").write_bytes(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
        with pytest.raises(InputError):
            Delta(tmp_path / "d").rebuild(pair[0], None)


@given(st.binary(max_size=300), st.booleans())
def test_any_bytes(tmp_path_factory, data, magic):
    file = tmp_path_factory.mktemp("bytes") / "d"
    file.write_bytes((b"HBDELTA1" if magic else b"") + data)
    with pytest.raises(InputError, match=str(file)):
        Delta(file)


def test_a_folder_where_a_delta_should_be(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="cannot be read"):
            Delta(path)


def test_how_a_folder_differs_from_what_was_sent(pair, tmp_path):
    read, model = Delta(pair[2]), shutil.copytree(pair[1], tmp_path / "model")
    assert read.differences(model) == []
    (model / "config").write_bytes(b"{2}")
    (model / "words").unlink()
    (model / "more").write_bytes(b"")
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:-1])
    said = " ".join(read.differences(model))
    for word in ("config has the sha256", "words is missing.", "more was not sent.", f"{len(weights) - 1} bytes, not"):
        assert word in said
