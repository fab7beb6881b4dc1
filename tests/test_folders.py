"""Output folders appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from halfbyte.errors import InputError
from halfbyte.folders import CHECKPOINT, check_free, whole


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
        assert (partial / CHECKPOINT).is_dir()
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
