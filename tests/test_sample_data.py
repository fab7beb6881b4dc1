"""The sample files: nothing held out was trained on, and every Python makes the same of the same sources."""

from __future__ import annotations

import sys

import pytest

from halfbyte import sample_data
from halfbyte.data import read_records
from halfbyte.errors import InputError


@pytest.fixture(scope="module")
def docstrings():
    return sample_data.docstring_task()


def passages(text, length):
    words = text.split()
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def test_no_passage_of_the_held_out_domain_is_trained_on():
    parts = sample_data.domain_text()
    trained = set().union(*(passages(r["text"], 16) for r in parts["train"]))
    assert not [r["text"][:40] for r in parts["heldout"] if passages(r["text"], 16) & trained]
    characters = {side: sum(len(r["text"]) for r in parts[side]) for side in parts}
    assert characters["train"] > 200_000
    assert 0.05 < characters["heldout"] / sum(characters.values()) < 0.13


def test_docstrings_and_functions_come_once(docstrings):
    everything = [*docstrings["train"], *docstrings["heldout"]]
    assert len({r["completion"] for r in everything}) == len({r["prompt"] for r in everything}) == len(everything)
    assert len(docstrings["train"]) > 2000
    assert 0.03 < len(docstrings["heldout"]) / len(everything) < 0.25


def test_a_prompt_is_the_function_without_its_docstring(docstrings):
    for record in [*docstrings["train"], *docstrings["heldout"]]:
        source, instruction = record["prompt"][: -len(sample_data.INSTRUCTION)], sample_data.INSTRUCTION
        assert record["prompt"].endswith(instruction)
        compile(source, record["completion"], "exec")
        assert record["completion"] not in source
        assert 20 <= len(record["completion"]) <= 400


def test_what_makes_a_record():
    source = '''
import os

@decorated
async def f(x):
    """What f does,
    in two lines.
    """

    # twice
    return 2 * x

class C:
    def method(self):
        """Does something with self."""
        return self

    def bare(self):
        """There is no code to describe."""

def one_line(): """Too dense to take apart."""; return 1

def short():
    """Too short."""
    return 1

def undocumented():
    return os
\f
def after_a_form_feed():
    """Is taken apart at the right lines."""
    return 2
'''
    assert list(sample_data._documented_functions(source)) == [
        {
            "prompt": "@decorated\nasync def f(x):\n    # twice\n    return 2 * x\n# The docstring:\n",
            "completion": "What f does,\nin two lines.",
        },
        {
            "prompt": "def method(self):\n    return self\n# The docstring:\n",
            "completion": "Does something with self.",
        },
        {
            "prompt": "def after_a_form_feed():\n    return 2\n# The docstring:\n",
            "completion": "Is taken apart at the right lines.",
        },
    ]


def test_sides_are_decided_by_name():
    assert sample_data._family("_pydecimal") == sample_data._family("decimal")
    assert 0 <= sample_data._hashed(0, "json") < 1
    assert sample_data._hashed(0, "json") != sample_data._hashed(1, "json")
    assert sample_data.domain_text() == sample_data.domain_text()
    assert sample_data.domain_text(seed=1)["heldout"] != sample_data.domain_text()["heldout"]


def test_write_makes_readable_files(tmp_path, capsys):
    paths = sample_data.write(tmp_path / "new" / "folder")
    assert [p.name for p in paths] == [
        "domain-train.jsonl",
        "domain-heldout.jsonl",
        "docstrings-train.jsonl",
        "docstrings-heldout.jsonl",
    ]
    assert [read_records(p)[0].kind for p in paths] == ["text", "text", "completion", "completion"]
    first = [p.read_bytes() for p in paths]
    assert [p.read_bytes() for p in sample_data.write(tmp_path)] == first
    assert capsys.readouterr() == ("", "")


def test_a_python_without_its_library_is_an_input_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sample_data.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(InputError, match="no sources"):
        sample_data.docstring_task()
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(InputError, match="no pydoc_data"):
        sample_data.domain_text()
