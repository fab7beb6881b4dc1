"""Which weight gets which format: rules, presets, groups that fit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte import FORMATS, InputError
from halfbyte.formats import parse
from halfbyte.scheme import MIXES, SCHEMES, Rule, Scheme, custom, scheme, to_scheme

KEPT = ["embedding", "head", "router", "position", "convolution"]


def weight(s: Scheme, name: str = "model.layers.0.q_proj", role: str = "linear", shape=(64, 576)):
    return s.decide(name, role, shape).weight


@pytest.mark.parametrize("name", SCHEMES)
def test_presets_keep_what_they_name_and_say_why(name):
    s = SCHEMES[name]
    for role in KEPT:
        rule = s.decide("x", role, (64, 512))
        assert rule.weight is None
        assert rule.why.startswith(role)
    for role in ("linear", "conv1d", "expert"):
        assert weight(s, role=role, shape=(64, 512)) is not None


def test_static_inputs_are_told_from_those_rounded_by_token():
    assert [name for name, s in {**SCHEMES, **MIXES}.items() if s.static] == ["W8A8_STATIC"]
    rule = SCHEMES["W8A8_STATIC"].decide("x", "linear", (64, 512))
    assert (str(rule.weight), str(rule.input)) == ("int8-channel", "int8-tensor")
    own = [{"match": "@linear", "weight": "int8-channel", "input": "uint8-tensor"}]
    assert custom(own).static
    assert custom(custom(own).notation()).static
    assert not custom([{**own[0], "input": "int8-token"}]).static


@pytest.mark.parametrize("name", FORMATS)
def test_a_formats_name_is_a_scheme(name):
    s = scheme(name)
    assert weight(s, shape=(64, 512)) == FORMATS[name]
    assert weight(s, role="embedding", shape=(64, 512)) is None


@pytest.mark.parametrize("name", ["W4A16", "w4a16", "W4a16"])
def test_presets_in_any_case(name):
    assert scheme(name) is SCHEMES["W4A16"]
    assert scheme("w4a16-asym") is SCHEMES["W4A16_ASYM"]


@pytest.mark.parametrize(("inputs", "group"), [(512, 128), (576, 64), (96, 32), (128, 128), (64, 64)])
def test_a_presets_group_becomes_smaller_where_it_does_not_divide_and_says_so(inputs, group):
    rule = scheme("W4A16").decide("x", "linear", (64, inputs))
    assert rule.weight == parse(f"int4-g{group}")
    assert (rule.why == f"groups of {group}: 128 does not divide {inputs}") == (group != 128)


def test_a_layer_that_no_smaller_group_divides_is_an_error():
    with pytest.raises(InputError, match=r"x: a group of 128 does not divide its 100 inputs; .*--group-size 100"):
        weight(scheme("W4A16"), "x", shape=(64, 100))


@given(st.integers(1, 300), st.integers(1, 1200))
def test_a_group_that_was_asked_for_is_never_changed(group, inputs):
    s = scheme("W4A16", group_size=group)
    if inputs % group == 0:
        assert weight(s, shape=(4, inputs)).group == group
    else:
        with pytest.raises(InputError, match=f"a group of {group} does not divide its {inputs} inputs"):
            weight(s, shape=(4, inputs))


@pytest.mark.parametrize("name", SCHEMES)
def test_where_no_folder_must_hold_it_a_convolution_is_as_a_linear_layer(name):
    s = SCHEMES[name].everywhere()
    found, linear = (s.decide("x", role, (64, 512)) for role in ("convolution", "linear"))
    assert (found.weight, found.input) == (linear.weight, linear.input)
    assert weight(s, role="head", shape=(64, 512)) is None


@pytest.mark.parametrize(("name", "by_row"), [("W8A16", "int8-channel"), ("W4A16_ASYM", "uint4-channel")])
def test_where_no_folder_must_hold_it_rows_that_no_group_divides_have_a_scale_each(name, by_row):
    rule = SCHEMES[name].everywhere().decide("x", "convolution", (64, 27))
    assert (rule.weight, rule.why) == (parse(by_row), "by channel: 128 does not divide 27")
    with pytest.raises(InputError, match="does not divide"):
        scheme("int4-g32").everywhere().decide("x", "linear", (64, 27))  # a format that was asked for


@pytest.mark.parametrize("name", ["int4-g128", "int8-g64"])
def test_a_format_that_was_asked_for_by_name_is_never_changed(name):
    with pytest.raises(InputError, match="does not divide"):
        weight(scheme(name), shape=(4, 96))


@pytest.mark.parametrize("name", ["W8A8", "int8-channel", "int8-tensor"])
def test_a_scheme_without_groups_has_none_to_change(name):
    with pytest.raises(InputError, match="--group-size 64"):
        scheme(name, 64)


def test_group_sizes_that_are_part_of_a_format_do_not_change():
    with pytest.raises(InputError, match="q4_0"):
        scheme("q4_0", 64)
    assert weight(scheme("nf4-g64", 32)) == parse("nf4-g32")
    assert weight(scheme("int4-g128", 128), shape=(4, 256)) == parse("int4-g128")  # the one it has is no error


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("W4A1", "W4A16"), ("W8A17", "W8A16"), ("nf5", "NF4"), ("int4-g64x", "int4-g64"), ("fp9", "FP8")],
)
def test_an_unknown_scheme_is_answered_with_the_nearest(wrong, near):
    with pytest.raises(InputError, match=f"did you mean {near}"):
        scheme(wrong)


# ---- schemes of one's own

RULES = [
    {"match": "lm_head", "weight": "int8-channel", "why": "it is large"},
    {"match": "@embedding"},
    {"match": r".*\.down_proj", "weight": "int4-g32", "input": "int8-token"},
    {"match": "@linear", "weight": "int2-g32"},
]


def test_the_first_rule_that_matches_wins():
    s = custom(RULES)
    assert weight(s, "lm_head", "head") == parse("int8-channel")
    assert weight(s, "model.layers.3.mlp.down_proj") == parse("int4-g32")
    assert s.decide("a.down_proj", "linear", (4, 64)).input == parse("int8-token")
    assert weight(s, "model.layers.3.mlp.up_proj") == parse("int2-g32")
    assert weight(s, "model.embed_tokens", "embedding") is None
    assert s.decide("lm_head", "head", (4, 64)).why == "it is large"


def test_a_pattern_is_for_the_whole_name():
    assert weight(custom([{"match": "up", "weight": "int4-g32"}, {"match": ".*"}]), "mlp.up") is None


def test_what_no_rule_names_is_an_error():
    with pytest.raises(InputError, match=r"says nothing of mlp\.gate \(router\)"):
        custom(RULES).decide("mlp.gate", "router", (4, 64))


@pytest.mark.parametrize(
    "rules",
    [
        {"match": "x"},
        None,
        3,
        ["x"],
        [{"weight": "int4-g32"}],
        [{"match": "x", "wieght": "int4-g32"}],
        [{"match": "x", "weight": "int4-g32x"}],
        [{"match": "("}],
        [{"match": 3}],
        [{"match": "@lineer", "weight": "int4-g32"}],
        [{"match": "x", "weight": 4}],
    ],
)
def test_broken_rules_are_refused(rules):
    with pytest.raises(InputError):
        custom(rules)


@pytest.mark.parametrize(
    "s", [*SCHEMES.values(), custom(RULES), scheme("W4A16", 32), scheme("int4-g32")], ids=lambda s: s.name
)
def test_the_notation_makes_the_same_scheme(s):
    told = s.notation()
    again = scheme(told) if isinstance(told, str) else custom(told)
    for name, role in (("lm_head", "head"), ("a.down_proj", "linear"), ("a.up_proj", "linear"), ("e", "embedding")):
        ours, theirs = s.decide(name, role, (64, 128)), again.decide(name, role, (64, 128))
        assert (ours.weight, ours.input) == (theirs.weight, theirs.input)


def test_a_rule_matches_by_role_or_by_name():
    assert Rule("@head", None).matches("x", "head")
    assert not Rule("@head", None).matches("@head", "linear")
    assert Rule(r"a\.b", None).matches("a.b", "linear")


def test_a_scheme_by_name_by_object_and_by_rules():
    assert to_scheme("W4A16") is scheme("W4A16")
    assert to_scheme(scheme("W4A16")) is scheme("W4A16")
    assert to_scheme([{"match": ".*", "weight": "int4-g64"}], 32).rules[0].weight.group == 32
    with pytest.raises(InputError):
        to_scheme(4)
