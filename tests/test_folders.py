"""Output folders appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from halfbyte.errors import InputError
from halfbyte.folders import CHECKPOINT, beside, check_free, disk_bytes, whole, whole_file


def _write(target, text, **options):
    with whole(target, **options) as partial:
        (partial / "halfbyte.json").write_text(text)


def test_appears_when_done(tmp_path):
    target = tmp_path / "deep" / "out"
    with whole(target) as partial:
        (partial / "a").write_text("1")
        assert not target.exists()
    assert [p.name for p in target.parent.iterdir()] == ["out"]


def _fail(target, error, **options):
    """Writes half a result, then fails."""
    with whole(target, **options) as partial:
        (partial / "halfbyte.json").write_text("half")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_stays_of_what_failed(tmp_path, error):
    with pytest.raises(error):
        _fail(tmp_path / "out", error)
    assert list(tmp_path.iterdir()) == []


def test_the_old_stays_until_the_new_is_whole(tmp_path):
    target = tmp_path / "out"
    _write(target, "old")
    with pytest.raises(InputError, match="--overwrite"):
        _write(target, "new")
    with whole(target, overwrite=True):
        assert (target / "halfbyte.json").read_text() == "old"
    _write(target, "old", overwrite=True)
    with pytest.raises(KeyboardInterrupt):
        _fail(target, KeyboardInterrupt, overwrite=True)
    assert (target / "halfbyte.json").read_text() == "old"
    _write(target, "new", overwrite=True)
    assert (target / "halfbyte.json").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_stale_partial_is_replaced(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "stale").write_text("x")
    _write(tmp_path / "out", "new")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["halfbyte.json"]
    (tmp_path / "two.partial").write_text("a file of that name")
    _write(tmp_path / "two", "new")
    assert not (tmp_path / "two.partial").exists()


def test_a_checkpoint_outlives_a_failure_and_only_that(tmp_path):
    (tmp_path / "out.partial" / CHECKPOINT).mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt):
        _fail(tmp_path / "out", KeyboardInterrupt, resume=True)
    assert (tmp_path / "out.partial" / CHECKPOINT).is_dir()
    with whole(tmp_path / "out", resume=True) as partial:
        assert [p.name for p in partial.iterdir()] == [CHECKPOINT]
    assert list((tmp_path / "out").iterdir()) == []


def test_what_a_killed_run_had_begun_to_write_is_not_gone_on_from(tmp_path):
    partial = tmp_path / "out.partial"
    (partial / CHECKPOINT).mkdir(parents=True)
    (partial / f"{CHECKPOINT}.new").mkdir()
    (partial / "masters").mkdir()
    (partial / "part-0.2").write_text("half of it")
    with whole(tmp_path / "out", resume=True) as there:
        assert {p.name for p in there.iterdir()} == {CHECKPOINT, f"{CHECKPOINT}.new"}
        (there / f"{CHECKPOINT}.new").rmdir()
        (there / "halfbyte.json").write_text("new")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["halfbyte.json"]


def test_dot_is_a_folder_like_any(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    _write(Path(), "new", overwrite=True)
    assert (tmp_path / "here" / "halfbyte.json").read_text() == "new"


def test_what_halfbyte_did_not_write_is_not_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    check_free(tmp_path / "out", True)  # empty: nothing is lost
    (tmp_path / "out" / "letters").write_text("dear")
    with pytest.raises(InputError, match="nothing that halfbyte wrote"):
        check_free(tmp_path / "out", True)
    (tmp_path / "out" / "ledger.json").write_text("[]")
    check_free(tmp_path / "out", True)
    with pytest.raises(InputError, match="is read from there"):
        check_free(tmp_path / "out", True, None, tmp_path / "out" / "letters")
    check_free(tmp_path / "out", True, tmp_path / "outer")


def test_a_checkpoint_is_not_thrown_away_unasked(tmp_path):
    checkpoint = tmp_path / "out.partial" / CHECKPOINT
    checkpoint.mkdir(parents=True)
    with pytest.raises(InputError, match="--resume"), whole(tmp_path / "out"):
        pass
    assert checkpoint.exists()
    with whole(tmp_path / "out", overwrite=True) as partial:
        assert not (partial / CHECKPOINT).exists()


# ---- outputs that are a file, or two


def _file(target, text, second=None, error=None, **options):
    with whole_file(target, **options) as partial:
        assert partial.name == target.name  # what it says of the second file is right once both are in place
        partial.write_text(text)
        if second is not None:
            beside(partial).write_text(second)
        if error is not None:
            raise error


def _held(folder):
    return {p.name: p.read_text() for p in folder.iterdir()}


def test_files_appear_together_or_not_at_all(tmp_path):
    target = tmp_path / "m.onnx"
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            _file(target, "a", "b", error)
        assert _held(tmp_path) == {}
    _file(target, "a", "b")
    assert _held(tmp_path) == {"m.onnx": "a", "m.onnx.data": "b"}
    with pytest.raises(KeyboardInterrupt):
        _file(target, "c", "d", KeyboardInterrupt, overwrite=True)
    assert _held(tmp_path) == {"m.onnx": "a", "m.onnx.data": "b"}
    _file(target, "c", "d", overwrite=True)
    assert _held(tmp_path) == {"m.onnx": "c", "m.onnx.data": "d"}
    _file(target, "e", overwrite=True)
    assert _held(tmp_path) == {"m.onnx": "e"}


def test_an_old_file_is_never_read_with_a_new_second_one(tmp_path, monkeypatch):
    """Should the second be the last thing that is put into place."""
    target, replace = tmp_path / "m.onnx", Path.replace
    _file(target, "a", "b")

    def stop(self, to):
        if self.suffix == ".onnx":
            raise KeyboardInterrupt
        return replace(self, to)

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        _file(target, "c", "d", overwrite=True)
    assert _held(tmp_path) == {"m.onnx.data": "d"}


def test_a_second_file_alone_is_not_replaced_unasked(tmp_path):
    target = tmp_path / "m.onnx"
    beside(target).write_text("dear")
    with pytest.raises(InputError, match=r"m\.onnx\.data exists already; .*--overwrite"):
        check_free(target)
    beside(target).replace(target)
    with pytest.raises(InputError, match="is what is read"):
        check_free(target, True, target)
    beside(target).mkdir()
    with pytest.raises(InputError, match=r"m\.onnx\.data is nothing that halfbyte wrote"):
        check_free(target, True)


def test_what_lies_beside_other_files_is_left_alone(tmp_path):
    (tmp_path / "m.gguf.data").write_text("dear")
    _file(tmp_path / "m.gguf", "a")
    _file(tmp_path / "m.gguf", "b", overwrite=True)
    assert _held(tmp_path) == {"m.gguf": "b", "m.gguf.data": "dear"}


def test_the_bytes_are_those_of_the_weight_files(tmp_path):
    for name, size in (("model.safetensors", 100), ("other.gguf", 10), ("config.json", 1), ("a.onnx", 7)):
        (tmp_path / name).write_bytes(bytes(size))
    assert disk_bytes(tmp_path) == 110
    assert disk_bytes(tmp_path / "model.safetensors") == 100
    assert disk_bytes(tmp_path / "a.onnx") == 7
    beside(tmp_path / "a.onnx").write_bytes(bytes(20))
    assert disk_bytes(tmp_path / "a.onnx") == 27
