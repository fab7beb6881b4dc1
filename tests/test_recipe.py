"""Recipes: what a file may say, and that mistakes are told before any work."""

from __future__ import annotations

import pytest

import halfbyte
from halfbyte.methods import METHODS, method_steps
from halfbyte.recipe import parse_recipe, read_recipe
from halfbyte.steps import Adapt, Dequantize, Freeze, Grid, Merge, Train


def test_methods_are_lists_of_steps():
    def names(method, to=None, init=None):
        return [type(s) for s in method_steps(method, to, {"data": "x"}, init=init)]

    assert names("full") == [Dequantize, Train]
    assert names("lora") == [Adapt, Train]
    assert names("qlora") == [Freeze, Adapt, Train]
    assert names("qa-lora") == [Freeze, Adapt, Train]
    assert names("qat", "W4A16") == [Dequantize, Grid, Train, Freeze]
    assert names("qat-lora", "W4A16") == [Grid, Adapt, Train]
    assert names("qat-lora", "W4A16", "rtn") == [Dequantize, Freeze, Adapt, Train, Merge, Freeze]
    assert names("scales", "W4A16") == [Freeze, Train]
    assert set(METHODS) == {"full", "lora", "qlora", "qa-lora", "qat", "qat-lora", "scales"}


def test_settings_find_their_step():
    freeze, adapt, train = method_steps("qlora", None, {"data": "x", "r": 4, "steps": 7})
    assert (freeze.scheme, adapt.model_extra, train.steps) == ("NF4", {"r": 4}, 7)


def test_a_recipe_of_steps():
    made = parse_recipe({"model": "m", "steps": ["adapt", {"train": {"data": "d", "steps": 3}}, {"merge": None}]})
    assert [type(s).__name__ for s in made.steps] == ["Adapt", "Train", "Merge"]
    assert (made.output, made.seed, made.steps[1].steps) == (None, 0, 3)


GOOD = {"model": "m", "steps": ["adapt"]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"modle": 1}, "unknown key 'modle'; known are model, output"),
        ({"method": "lora"}, "either steps or a method"),
        ({"steps": []}, "has no steps"),
        ({"steps": None}, "has no steps"),
        ({"steps": {"train": {}}}, "steps: it should be a valid list"),
        ({"steps": ["tarin"]}, r"steps\[0\]: there is no step 'tarin'; those are adapt, dequantize"),
        ({"steps": ["merge", {"train": {"dta": "x"}}]}, r"steps\[1\]: train: data: it is missing"),
        ({"steps": [{"train": {"data": "x", "stepz": 1}}]}, "train: stepz: there is no such key"),
        ({"steps": [{"train": {"data": "x", "steps": "many"}}]}, "train: steps: it should be a valid integer"),
        ({"steps": [{"train": ["data"]}]}, "the settings of train are a mapping"),
        ({"steps": [{"a": 1, "b": 2}]}, "one name with its settings"),
        ({"steps": [7]}, "a step is a name"),
        ({"steps": [{"freeze": {"scheme": "W4A17"}}]}, "freeze: 'W4A17' is no scheme; did you mean W4A16"),
        ({"steps": [{"freeze": {"scheme": [{"weight": "int8"}]}}]}, "a rule of a scheme has the keys"),
        ({"steps": [{"freeze": {"solver": "magic"}}]}, "no such solver"),
        ({"steps": [{"grid": {}}]}, "grid: scheme: it is missing"),
        ({"seed": "abc"}, "seed: it should be a valid integer"),
        ({"model": 5}, "model: it should be a valid string"),
        ({"output": ["x"]}, "output: it should be a valid string"),
    ],
)
def test_mistakes(change, words):
    with pytest.raises(halfbyte.InputError, match=f"^here: .*{words}"):
        parse_recipe({**GOOD, **change}, "here: ")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "sft"}, "it is full, lora"),
        ({"method": "qat"}, "needs --to"),
        ({"method": "lora", "to": "W4A16"}, "takes no --to.*merge --to W4A16"),
        ({"method": "qat", "to": "W4A17"}, "to: 'W4A17' is no scheme"),
        ({"method": "full", "adapt": {"r": 4}}, "does not take r"),
        ({"method": "full", "train": "data.jsonl"}, "train: it should be a valid dictionary"),
        ({"method": "full", "train": {"data": "x", "batch_size": 0}}, "batch_size: it should be greater"),
    ],
)
def test_mistakes_in_a_method(change, words):
    with pytest.raises(halfbyte.InputError, match=f"^here: .*{words}"):
        parse_recipe({"model": "m", "train": {"data": "x"}, **change}, "here: ")


@pytest.mark.parametrize("raw", [None, [], "lora", {"steps": ["merge"]}])
def test_what_is_no_recipe(raw):
    with pytest.raises(halfbyte.InputError, match="a recipe is a mapping"):
        parse_recipe(raw)


@pytest.mark.parametrize("text", [b"a: [", b"\xff\xfe", b"\x00", b"a: b: c", b"!!python/object/apply:os.abort []"])
def test_broken_yaml(tmp_path, text):
    (tmp_path / "r.yaml").write_bytes(text)
    with pytest.raises(halfbyte.InputError, match=r"r\.yaml is not valid YAML"):
        read_recipe(tmp_path / "r.yaml")


def test_a_missing_recipe(tmp_path):
    with pytest.raises(halfbyte.InputError, match="no such recipe"):
        read_recipe(tmp_path / "r.yaml")


def test_what_would_fail_late_fails_first(tiny_llama, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr("halfbyte.steps.training.train", lambda *a, **k: pytest.fail("the work had begun"))
    train = {"train": {"data": str(tiny_data["text"]), "steps": 1}}
    base = {"model": str(tiny_llama), "output": str(tmp_path / "out")}
    late = {"evaluate": {"data": str(tmp_path / "nowhere.jsonl")}}
    with pytest.raises(halfbyte.InputError, match=r"nowhere\.jsonl does not exist"):
        parse_recipe({**base, "steps": [train, late]}).run()
    with pytest.raises(halfbyte.InputError, match="no layout for q4_0"):
        parse_recipe({**base, "steps": [train, {"freeze": {"scheme": "q4_0"}}]}).run()
    assert list(tmp_path.iterdir()) == []


def test_the_library_tells_mistakes_the_same_way(tiny_llama):
    model = halfbyte.load(tiny_llama)
    with pytest.raises(halfbyte.InputError, match="did you mean W4A16"):
        model.quantize("W4A17")
    with pytest.raises(halfbyte.InputError, match="batch_size"):
        model.train([{"text": "x"}], batch_size=0)
