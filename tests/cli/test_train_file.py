"""`halfbyte train -o OUT.gguf`: a result whose format only a file holds is trained through it and written as it."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from halfbyte.containers import gguf
from halfbyte.errors import BudgetExceeded
from halfbyte.model import load
from halfbyte.train import Masters
from miniatures import bpe, folder, logits

SMALL = ("--steps", "3", "--batch-size", "2", "--max-length", "32", "--lr", "1e-3")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """As wide as a super-block of the K types."""
    path = tmp_path_factory.mktemp("wide") / "model"
    path.mkdir()
    return folder(path, dtype=torch.bfloat16, words=bpe(), hidden_size=256, intermediate_size=256, num_hidden_layers=1)


@pytest.fixture
def train(halfbyte, wide, tiny_data):
    def call(method, to, out, *more):
        to = () if to is None else ("--to", to)
        given = ("--data", tiny_data["text"], "--method", method, *to, *SMALL, "-o", out)
        return halfbyte("train", wide, *given, *more)

    return call


@pytest.mark.parametrize(
    ("method", "to", "init", "held", "stay"),
    [
        ("qat", "Q4_K_M", None, {"q4_k", "q6_k"}, ""),
        ("qat", "Q4_K_M", "rtn", {"q4_k", "q6_k"}, "the scales of 8 weights (q4_k, q6_k) are codes themselves"),
        ("qat", "Q5_0", None, {"q5_0"}, ""),
        ("scales", "Q4_0", None, {"q4_0", "q6_k"}, "the scales of 1 weights (q6_k) are codes themselves"),
        ("full", None, None, {"bf16"}, ""),
    ],
)
def test_the_file_is_what_was_trained(train, tmp_path, wide, tiny_data, method, to, init, held, stay):
    out = tmp_path / "q.gguf"
    begun = () if init is None else ("--init", init)
    said = train(method, to, out, "--no-verify", "--json", *begun)
    assert said.status == 0, said.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["q.curve.jsonl", "q.gguf", "q.ledger.json"]
    assert said.json["bytes"] == out.stat().st_size
    assert said.json["read_back"] is False
    assert said.json["ledger"] == json.loads((tmp_path / "q.ledger.json").read_text())
    assert said.json["ledger"][0]["stage"] == f"trained ({method})"
    assert ("masters/ for them" in said.err) == (method == "qat")
    assert stay in said.err
    assert ("are codes themselves" in said.err) == bool(stay)
    assert held <= {t.type for t in gguf.File(out).infos.values()}
    own = {"steps": 3, "batch_size": 2, "max_length": 32, "learning_rate": 1e-3}
    trained = load(wide).train(str(tiny_data["text"]), method=method, to=to, init=init, **own)
    assert torch.equal(logits(load(out, "bfloat16").model), logits(trained.model))


def test_an_interrupted_training_to_a_file_resumes_to_the_same_bytes(train, tmp_path, monkeypatch):
    assert train("qat", "Q4_K_M", tmp_path / "whole.gguf", "--no-verify", "--save-steps", "1").status == 0
    step, taken = Masters.step, []

    def killed(self, *args):
        taken.append(1)
        if len(taken) == 3:
            raise KeyboardInterrupt
        return step(self, *args)

    argv = ("qat", "Q4_K_M", tmp_path / "cut.gguf", "--no-verify", "--save-steps", "1")
    with monkeypatch.context() as patch:
        patch.setattr(Masters, "step", killed)
        assert train(*argv).status == 130
    assert sorted(p.name for p in tmp_path.glob("cut*")) == ["cut.gguf.partial"]
    assert train(*argv).status == 2
    said = train(*argv, "--resume", "--json")
    assert said.status == 0, said.err
    assert said.json["steps"] == 3
    assert (tmp_path / "cut.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert not list(tmp_path.glob("*.partial"))
    again = train(*argv, "--resume", "--json")
    assert (again.status, again.json["loss"]) == (0, said.json["loss"])


@pytest.mark.parametrize(
    ("method", "to", "name", "words"),
    [
        ("lora", None, "x.gguf", "an adapter is a folder of PEFT's"),
        ("qat-lora", "Q4_K_M", "x.gguf", "an adapter is a folder of PEFT's"),
        ("qat", "W8A8", "x.gguf", "ggml has no block for int8-channel"),
        ("qat", "Q4_K_M", "x.onnx", "cannot be written as x.onnx"),
        ("qat", "Q4_K_M", "x", "name the output OUT.gguf"),
        ("qat", "W4A16", "x.delta", "by `halfbyte export --to delta`"),
        ("scales", "Q4_K_M", "x.gguf", "its scales are quantized themselves"),
    ],
)
def test_what_the_output_cannot_hold_is_refused_before_the_work(train, tmp_path, monkeypatch, method, to, name, words):
    monkeypatch.setattr("halfbyte.run.freeze", lambda *a, **k: pytest.fail("the work had begun"))
    monkeypatch.setattr("halfbyte.steps.training.train", lambda *a, **k: pytest.fail("the work had begun"))
    said = train(method, to, tmp_path / name)
    assert said.status == 2
    assert words in said.err
    assert not list(tmp_path.iterdir())


def test_what_a_reader_computes_otherwise_is_told_and_what_was_trained_is_kept(train, tmp_path, monkeypatch):
    def prove(*args):
        raise BudgetExceeded("llama.cpp computes something else than halfbyte does")

    monkeypatch.setattr("halfbyte.export._prove", prove)
    monkeypatch.setattr("halfbyte.kinds.gguf.missing", lambda: None)
    said = train("qat", "Q4_K_M", tmp_path / "q.gguf")
    assert said.status == 3
    assert "something else than halfbyte does; " in said.err
    assert "q.gguf was kept" in said.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["q.curve.jsonl", "q.gguf", "q.ledger.json"]


def test_an_adapter_through_a_mix_is_merged_into_a_file_as_it_was_trained(halfbyte, train, tmp_path):
    said = train("qat-lora", "Q4_K_M", tmp_path / "adapter", "--r", "4")
    assert said.status == 0, said.err
    assert "merge the adapter into OUT.gguf" in said.err
    trained = logits(load(tmp_path / "adapter").model)
    said = halfbyte("merge", tmp_path / "adapter", "-o", tmp_path / "out")
    assert said.status == 2
    assert "name the output OUT.gguf" in said.err
    said = halfbyte("merge", tmp_path / "adapter", "-o", tmp_path / "out.gguf", "--no-verify")
    assert said.status == 0, said.err
    assert torch.equal(logits(load(tmp_path / "out.gguf", "bfloat16").model), trained)


def test_a_recipe_writes_a_file(halfbyte, wide, tmp_path, tiny_data, monkeypatch):
    monkeypatch.setattr("halfbyte.kinds.gguf.missing", lambda: "it is not here")  # a miniature may be too far
    given = {"model": str(wide), "method": "qat", "to": "Q4_K_M",
             "train": {"data": str(tiny_data["text"]), "steps": 1, "max_length": 16}}  # fmt: skip
    for name, status in (("out.gguf", 0), ("out", 2)):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**given, "output": str(tmp_path / name)}))
        said = halfbyte("run", tmp_path / "recipe.yaml")
        assert said.status == status, said.err
        assert (tmp_path / name).exists() == (status == 0)
    assert "train" not in said.err  # refused before it
    assert load(tmp_path / "out.gguf").model is not None
