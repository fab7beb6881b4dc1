"""The command line as a process of its own, and what an interrupt leaves."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

import halfbyte as library

HELP = """
import sys
from halfbyte.cli import main
try:
    main(sys.argv[1:])
except SystemExit as e:
    assert not e.code, e.code
print([m for m in ("torch", "transformers") if m in sys.modules], file=sys.stderr)
"""


def _python(*argv, **options):
    return subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True, timeout=120, **options)


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["quantize", "--help"], ["train", "--help"]])
def test_help_is_fast_and_loads_no_torch(argv):
    began = time.monotonic()
    said = _python("-W", "error", "-c", HELP, *argv)
    assert said.stderr.strip() == "[]", said.stderr
    assert said.stdout
    assert time.monotonic() - began < 5  # 0.2 s on an idle machine


def test_lazy_names_are_all_there():
    for name in library.__all__:
        assert getattr(library, name) is not None
        assert name in dir(library)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = library.nothing


def test_a_real_process(tiny_llama, tmp_path):
    code = ("-W", "error", "-c", "from halfbyte.cli import main; main()")
    said = _python(*code, "quantize", tiny_llama, "--to", "nf4-g64", "-o", tmp_path / "out", "--json")
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout)["scheme"] == "nf4-g64"
    again = _python(*code, "quantize", tiny_llama, "--to", "nf4-g64", "-o", tmp_path / "out")
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1
    said = _python(*code, "generate", tmp_path / "out", stdin=subprocess.DEVNULL)
    assert (said.returncode, said.stdout) == (2, "")
    assert "no terminal" in said.stderr


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
@pytest.mark.parametrize("place", ["halfbyte.train.Masters.step", "halfbyte.models.save", "halfbyte.run.write_card"])
def test_what_stops_in_the_middle_leaves_nothing(halfbyte, tiny_llama, tiny_data, tmp_path, monkeypatch, error, place):
    def stop(*args, **kwargs):
        raise error

    monkeypatch.setattr(place, stop)
    argv = ("train", tiny_llama, "--data", tiny_data["text"], "--method", "full", "--steps", 2, "-o", tmp_path / "out")
    if error is KeyboardInterrupt:
        said = halfbyte(*argv)
        assert said.status == 130
        assert said.err.endswith("halfbyte: stopped.\n")
    else:
        with pytest.raises(error):
            halfbyte(*argv)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_overwrite_keeps_the_old(halfbyte, tiny_llama, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert halfbyte("quantize", tiny_llama, "--to", "W8A16", "-o", out).status == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("halfbyte.run.write_card", stop)
    assert halfbyte("quantize", tiny_llama, "--to", "NF4", "-o", out, "--overwrite").status == 130
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.partial"]  # to go on from
    monkeypatch.undo()
    assert halfbyte("quantize", tiny_llama, "--to", "NF4", "-o", out, "--overwrite", "--resume").status == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    after = {p.name: p.read_bytes() for p in out.iterdir()}
    assert after["model.safetensors"] != before["model.safetensors"]
    assert halfbyte("quantize", tiny_llama, "--to", "NF4", "-o", out, "--overwrite", "--resume").status == 0
    assert {p.name: p.read_bytes() for p in out.iterdir()} == after


def test_training_that_diverges_says_so(halfbyte, tiny_llama, tiny_data, tmp_path):
    said = halfbyte(
        "train", tiny_llama, "--data", tiny_data["text"], "--method", "full", "--steps", 5, "--lr", "1e30",
        "-o", tmp_path / "out",
    )  # fmt: skip
    assert said.status == 1
    assert "the learning rate is too high" in said.err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_resume_of_a_finished_run_changes_nothing(halfbyte, tiny_llama, tiny_data, tmp_path):
    argv = ("train", tiny_llama, "--data", tiny_data["text"], "--steps", 2, "-o", tmp_path / "out", "--json")
    first = halfbyte(*argv).json
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    again = halfbyte(*argv, "--resume")
    assert again.status == 0
    assert (again.json["steps"], again.json["loss"]) == (2, first["loss"])
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before


def test_a_script_that_trains_ends_in_silence():
    train = "import halfbyte, torch; halfbyte.fake(torch.ones(8, 64).requires_grad_(), 'int4-g64').sum().backward()"
    said = _python("-c", train)
    assert (said.returncode, said.stdout, said.stderr) == (0, "", "")
