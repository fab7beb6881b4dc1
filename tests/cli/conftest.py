"""How the command line is called in these tests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from halfbyte.cli import main


@dataclass
class Said:
    """What a command left: its exit status, and what it wrote to which stream."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object of --json. Fails if anything else is on standard output."""
        assert self.out.endswith("\n")
        assert self.out.count("\n") == 1, self.out
        return json.loads(self.out)


@pytest.fixture
def halfbyte(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Runs a command line in this process."""

    def call(*argv: Any) -> Said:
        status: Any = 0
        capsys.readouterr()
        try:
            main([str(a) for a in argv])
        except SystemExit as e:
            status = e.code or 0
        return Said(status, *capsys.readouterr())

    return call


@pytest.fixture
def copied(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's folder, to be broken."""
    return shutil.copytree(tiny_llama, tmp_path_factory.mktemp("copy") / "model")


@pytest.fixture
def untokenized(copied: Path) -> Path:
    """The tiny model without its tokenizer."""
    for file in copied.glob("*token*"):
        file.unlink()
    (copied / "chat_template.jinja").unlink()
    return copied


@pytest.fixture
def refused(halfbyte: Callable[..., Said], tmp_path: Path) -> Callable[..., str]:
    """Runs a command line that writes tmp_path/out (or another output) and must be refused: exit status 2, one
    sentence that holds all of `words`, nothing on standard output, and no new file anywhere beside it."""

    def call(*argv: Any, words: tuple[str, ...] | str = ()) -> str:
        before = sorted(tmp_path.rglob("*"))
        said = halfbyte(*argv)
        assert said.status == 2, said
        assert said.out == ""
        sentence = said.err.splitlines()[-1]
        assert sentence.startswith("halfbyte: "), said.err
        assert "Traceback" not in said.err
        assert "\n" not in sentence
        assert sentence.endswith((".", ")")), sentence
        for word in (words,) if isinstance(words, str) else words:
            assert word in sentence, sentence
        assert sorted(tmp_path.rglob("*")) == before
        return said.err

    return call
