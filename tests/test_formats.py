"""The table of formats and the grammar of their names."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfbyte import kernels
from halfbyte.errors import InputError
from halfbyte.formats import FORMATS, Format, Formats, Integers, Table, parse


def test_every_row_is_found_by_its_own_name():
    for name in FORMATS:
        assert FORMATS[name].name == name
        assert str(FORMATS[name]) == name
        assert name in FORMATS
    assert len(FORMATS) == len(list(FORMATS))


@given(
    st.integers(2, 8),
    st.sampled_from(["int", "uint"]),
    st.sampled_from(["", "-sym", "-asym"]),
    st.integers(1, 999),
)
def test_the_grammar_of_integers(bits, base, suffix, group):
    f = parse(f"{base}{bits}-g{group}{suffix}")
    symmetric = suffix == "-sym" or (suffix == "" and base == "int")
    assert f.grid == Integers(bits, signed=symmetric)
    assert f.zero == (None if symmetric else "integer")
    assert (f.group, f.bits) == (group, bits)


def test_a_format_object_is_its_own_parse():
    f = FORMATS["int4-g64"]
    assert parse(f) is f
    assert parse("int4-token").group == "channel"


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("nf4-g64dq", "nf4-g64-dq"),
        ("int4_g64", "int4-g64"),
        ("q4_K", "q4_k"),
        ("fp8-e4m3-chanel", "fp8-e4m3-channel"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(wrong, near):
    with pytest.raises(InputError, match=f"did you mean '{near}'"):
        FORMATS[wrong]
    assert wrong not in FORMATS


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "int9-g64",
        "int1-g64",
        "int4-g0",
        "int4",
        "nf4-channel",
        "nf4-g64-sym",
        "int4-g64-dq",
        "fp4-bnb-g64-dq",
    ],
)
def test_what_the_grammar_does_not_have(wrong):
    with pytest.raises(InputError, match="is not a format"):
        FORMATS[wrong]


def test_no_name_at_all():
    assert 4 not in FORMATS


@pytest.mark.parametrize(
    ("name", "shape", "groups"),
    [
        ("int4-g32", (3, 64), (3, 2)),
        ("int4-g32", (64,), (2,)),
        ("int4-g32", (2, 3, 64), (2, 3, 2)),
        ("int8-channel", (2, 3, 5), (2, 3, 1)),
        ("int8-tensor", (2, 3), (1,)),
        ("nf4-g64", (5, 63), (5,)),
        ("nf4-g64", (0, 63), (0,)),
        ("int4-g32", (0, 64), (0, 2)),
    ],
)
def test_the_shape_of_scales(name, shape, groups):
    assert FORMATS[name].groups(shape) == groups


def test_a_group_that_does_not_divide_is_named_with_the_inputs():
    with pytest.raises(InputError, match=r"group of 128 does not divide the 576 inputs"):
        kernels.quantize(torch.zeros(2, 576), "int4-g128")
    with pytest.raises(InputError, match="not a scalar"):
        kernels.quantize(torch.tensor(1.0), "int4-g128")


def test_with_group():
    assert FORMATS["int4-g64"].with_group(32) == FORMATS["int4-g32"]
    assert FORMATS["nf4-g64-dq"].with_group(128).name == "nf4-g128-dq"
    for fixed in ("q4_0", "int8-channel"):
        with pytest.raises(InputError, match="no group size"):
            FORMATS[fixed].with_group(64)


def test_registering():
    table = Formats([])
    f = Format("thirds", Table((-1.0, -1 / 3, 1 / 3, 1.0)), 8)
    assert table.register(f) is f
    assert table.register(f) is table["thirds"]
    with pytest.raises(InputError, match="already"):
        table.register(Format("thirds", Integers(2), 8))


@pytest.mark.parametrize("name", ["nf4-g64", "fp4-bnb-g64", "fp4-e2m1-g32", "mxfp4", "nvfp4"])
def test_a_table_has_its_values_in_order(name):
    grid = FORMATS[name].grid
    assert isinstance(grid, Table)
    values = grid.codebook[grid.order]
    assert (values.diff() >= 0).all()
    assert grid.bits == 4
    assert 0.0 in grid.values
    assert ((values[1:] + values[:-1]) / 2 == grid.bounds).all()
