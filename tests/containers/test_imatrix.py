"""Importance matrices: both of llama.cpp's layouts, and files that are none."""

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte import InputError
from halfbyte.containers import imatrix
from matrices import as_gguf, entries

SQUARES = {"blk.0.attn_q.weight": torch.linspace(0, 2, 64), "blk.0.ffn_down.weight": torch.linspace(1, 0, 96)}


def test_both_layouts_give_mean_squares(tmp_path):
    old = tmp_path / "imatrix.dat"
    old.write_bytes(entries(SQUARES))
    for path in (old, as_gguf(tmp_path / "imatrix.gguf", SQUARES)):
        found = imatrix.read(path)
        assert found.keys() == SQUARES.keys()
        for name, s in SQUARES.items():
            torch.testing.assert_close(found[name], s)


def test_experts_and_weights_that_saw_nothing_are_left_out(tmp_path):
    path = as_gguf(tmp_path / "e.gguf", SQUARES, experts=2)
    with pytest.raises(InputError, match="no weight"):
        imatrix.read(path)
    old = tmp_path / "imatrix.dat"
    old.write_bytes(entries({"seen": torch.ones(4)})[:-12] + b"")
    assert imatrix.read(old)["seen"].tolist() == [1] * 4


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "length|ends"),
        (b"\xff\xff\xff\x7f", "length"),
        (struct.pack("<ii", 1, -5), "length"),
        (struct.pack("<ii", 1, 1 << 30), "length"),
        (entries(SQUARES)[:100], "ends"),
        (entries({"a": torch.tensor([float("nan")])}), "mean squares"),
        (entries({"a": torch.tensor([-1.0])}), "mean squares"),
        (struct.pack("<i", 0), "no weight"),
    ],
    ids=["empty", "a huge count", "a negative name", "a huge name", "truncated", "nan", "negative", "no entries"],
)
def test_what_is_none_is_refused_with_its_name(tmp_path, data, says):
    path = tmp_path / "imatrix.dat"
    path.write_bytes(data)
    with pytest.raises(InputError, match=says) as e:
        imatrix.read(path)
    assert "imatrix.dat" in str(e.value)


def test_a_file_without_counts_or_that_is_missing(tmp_path):
    with pytest.raises(InputError, match="counts"):
        imatrix.read(as_gguf(tmp_path / "x.gguf", SQUARES, counts=False))
    with pytest.raises(InputError, match="cannot be read"):
        imatrix.read(tmp_path / "nothing")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutated_files_end_in_an_error_or_in_mean_squares(tmp_path_factory, data):
    whole = bytearray(entries(SQUARES))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at : at + 4] = data.draw(st.binary(min_size=0, max_size=8))
    path = tmp_path_factory.mktemp("fuzz") / "m.dat"
    path.write_bytes(bytes(whole))
    try:
        found = imatrix.read(path)
    except InputError:
        return
    assert all((s >= 0).all() for s in found.values())
