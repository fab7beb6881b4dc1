"""Every verb, on a tiny model, to its good end."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte as library
from halfbyte.containers import shards

METHODS = {"full": [], "lora": [], "qlora": [], "qat": ["--to", "W4A16"], "qat-lora": ["--to", "W4A16"],
           "scales": ["--to", "W4A16"]}  # fmt: skip
SMALL = ("--steps", "2", "--batch-size", "2", "--max-length", "64")
LEDGER = {
    "perplexity", "perplexity_error", "loss", "loss_difference", "loss_difference_low", "loss_difference_high",
    "kl_mean", "kl_error", "kl_p99", "top1_agreement", "accuracy", "tokens", "context", "bytes", "bits_per_weight",
}  # fmt: skip


def _trained(halfbyte: Callable[..., Any], model: Path, data: Path, out: Path, method: str, *more: Any) -> Any:
    said = halfbyte(
        "train", model, "--data", data, "--method", method, *METHODS[method], *SMALL, "-o", out, "--json", *more
    )
    assert said.status == 0, said.err
    return said


def test_quantize_w8a16(halfbyte, tiny_llama, tmp_path):
    said = halfbyte("quantize", tiny_llama, "--to", "W8A16", "-o", tmp_path / "out", "--json")
    assert said.status == 0, said.err
    assert said.json.keys() == {
        "output", "scheme", "solver", "parameters", "bytes_before", "bytes", "bits_per_weight"
    }  # fmt: skip
    assert said.json["bytes"] < said.json["bytes_before"]
    assert "embedding: a look-up" in said.err
    assert not (tmp_path / "out.partial").exists()
    assert json.loads((tmp_path / "out" / "ledger.json").read_text())[0]["stage"] == "quantized"
    for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md", "generation_config.json"):
        assert (tmp_path / "out" / name).is_file()


def test_quantize_w4a16_says_that_groups_became_smaller(halfbyte, tiny_llama, tmp_path):
    said = halfbyte("quantize", tiny_llama, "--to", "w4a16", "-o", tmp_path / "out")
    assert said.status == 0, said.err
    assert said.out == ""
    assert "groups of 64: 128 does not divide 64" in said.err
    assert "int4-g128" in said.err  # of the layer with 128 inputs


def test_quantize_needs_no_tokenizer_and_replaces_only_when_told(halfbyte, refused, untokenized, tmp_path):
    out = tmp_path / "out"
    assert halfbyte("quantize", untokenized, "--to", "int4-g32", "-o", out).status == 0
    refused("quantize", untokenized, "--to", "W8A16", "-o", out, words="--overwrite")
    assert halfbyte("quantize", untokenized, "--to", "W8A16", "-o", out, "--overwrite").status == 0
    assert json.loads((out / "halfbyte.json").read_text())["stored"] == "W8A16"


@pytest.mark.parametrize("search", [None, "minmax"])
def test_quantize_with_static_inputs_then_export(halfbyte, tiny_llama, tiny_data, tmp_path, search):
    more = ("--input-search", search) if search else ()
    to = ("--to", "w8a8-static", "--calibration", tiny_data["text"], *more)
    said = halfbyte("quantize", tiny_llama, *to, "-o", tmp_path / "out")
    assert said.status == 0, said.err
    assert "is not used" not in said.err
    assert json.loads((tmp_path / "out" / "halfbyte.json").read_text())["input_search"] == (search or "mse")
    for out in ("from-folder.onnx", "at-once.onnx"):
        source = (tmp_path / "out",) if out == "from-folder.onnx" else (tiny_llama,)
        verb = ("export", *source) if out == "from-folder.onnx" else ("quantize", *source, *to)
        said = halfbyte(*verb, "-o", tmp_path / out, "--json")
        assert said.status == 0, said.err
        assert said.json["ledger"][0]["kl_mean"] < 1e-5
    assert (tmp_path / "from-folder.onnx").read_bytes() == (tmp_path / "at-once.onnx").read_bytes()


def test_a_search_for_scales_of_inputs_that_are_not_static_is_said_to_be_unused(halfbyte, tiny_llama, tmp_path):
    said = halfbyte("quantize", tiny_llama, "--to", "W8A8", "--input-search", "mse", "-o", tmp_path / "out")
    assert said.status == 0, said.err
    assert "--input-search is not used: W8A8 has no scales of inputs to find." in said.err


@pytest.mark.parametrize("method", METHODS)
def test_train_and_what_follows(halfbyte, tiny_llama, tiny_data, tmp_path, method):
    out = tmp_path / "out"
    said = _trained(halfbyte, tiny_llama, tiny_data["text"], out, method, "--eval-split", "0.2")
    row = said.json
    assert {"steps", "loss", "tokens_per_second", "seconds", "trainable", "peak_memory", "eval_loss"} <= row.keys()
    assert row["steps"] == 2
    assert row["tokens_per_second"] > 0
    assert "2 steps" in said.err
    curve = [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]
    assert [r["step"] for r in curve] == [1, 2]
    assert (out / "tokenizer.json").is_file()
    assert json.loads((out / "ledger.json").read_text())[-1]["stage"] == f"trained ({method})"
    assert (out / "adapter_config.json").is_file() == (method in ("lora", "qlora", "qat-lora"))
    after = halfbyte("evaluate", out, "--data", tiny_data["text"], "--json")
    assert after.status == 0, after.err
    assert after.json["perplexity"] > 1


@pytest.mark.parametrize("shape", ["messages", "completion", "label"])
def test_train_on_each_shape(halfbyte, tiny_llama, tiny_data, tmp_path, shape):
    said = _trained(halfbyte, tiny_llama, tiny_data[shape], tmp_path / "out", "lora")
    assert f"rows of {shape}" in said.err
    row = halfbyte("evaluate", tmp_path / "out", "--data", tiny_data[shape], "--json").json
    assert (row["accuracy"] is not None) == (shape == "label")


@pytest.mark.parametrize("method", ["lora", "qlora", "qat-lora"])
@pytest.mark.parametrize("to", [None, "W8A16"])
def test_merge(halfbyte, tiny_llama, tiny_data, tmp_path, method, to):
    _trained(halfbyte, tiny_llama, tiny_data["text"], tmp_path / "adapter", method)
    said = halfbyte("merge", tmp_path / "adapter", "-o", tmp_path / "out", "--json", *(("--to", to) if to else ()))
    assert said.status == 0, said.err
    assert "merged against unmerged" in said.err
    stages = [r["stage"] for r in json.loads((tmp_path / "out" / "ledger.json").read_text())]
    assert stages == ["merged, against unmerged"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ("quantization_config" in config) == (to is not None or method == "qat-lora")
    if to is None:
        assert said.json["kl_mean"] < 1e-6
    assert halfbyte("generate", tmp_path / "out", "--prompt", "The fox", "--max-new-tokens", "3").status == 0


def test_merge_into_the_original(halfbyte, tiny_llama, tiny_data, tmp_path):
    _trained(halfbyte, tiny_llama, tiny_data["text"], tmp_path / "adapter", "qlora")
    said = halfbyte("merge", tmp_path / "adapter", "-o", tmp_path / "out", "--base", "original", "--json")
    assert said.status == 0, said.err
    assert said.json["kl_mean"] > 0  # it was trained on what NF4 made of the base


def test_training_goes_on_from_an_adapter(halfbyte, tiny_llama, tiny_data, tmp_path):
    _trained(halfbyte, tiny_llama, tiny_data["text"], tmp_path / "first", "lora")
    assert halfbyte("plan", tmp_path / "first", "--to", "W8A16").status == 0  # of its base
    assert halfbyte("inspect", tmp_path / "first").status == 0
    said = _trained(
        halfbyte, tiny_llama, tiny_data["text"], tmp_path / "second", "lora", "--adapter", tmp_path / "first"
    )
    assert said.json["trainable"] > 0


def test_evaluate_has_the_keys_that_are_promised(halfbyte, tiny_llama, tiny_data, tmp_path):
    halfbyte("quantize", tiny_llama, "--to", "int2-g32", "-o", tmp_path / "q")
    said = halfbyte("evaluate", tmp_path / "q", "--data", tiny_data["text"], "--against", tiny_llama, "--json",
                    "--context", 64)  # fmt: skip
    assert said.status == 0, said.err
    row = said.json
    assert row.keys() >= LEDGER
    assert row.keys() - LEDGER == {
        "accuracy_error", "against", "against_sha256", "conventions", "data", "data_sha256", "kl_p99_error", "model",
        "top1_error", "windows"
    }  # fmt: skip
    assert [k for k in LEDGER if row[k] is None] == ["accuracy"]
    assert row["kl_mean"] > 0
    assert row["context"] == 64
    assert row["loss_difference_low"] <= row["loss_difference"] <= row["loss_difference_high"]
    assert row["bytes"] == (tmp_path / "q" / "model.safetensors").stat().st_size
    alone = halfbyte("evaluate", tmp_path / "q", "--data", tiny_data["text"], "--json").json
    assert alone["kl_mean"] is None


def test_budgets(halfbyte, tiny_llama, tiny_data):
    base = ("evaluate", tiny_llama, "--data", tiny_data["text"])
    assert halfbyte(*base, "--max-loss", 100, "--max-kl", "1e-6", "--against", tiny_llama).status == 0
    said = halfbyte(*base, "--max-loss", 0.5, "--json")
    assert said.status == 3
    assert said.json["loss"] > 0.5  # the figures are printed all the same
    assert "is above --max-loss 0.5." in said.err.splitlines()[-1]


def test_generate(halfbyte, tiny_llama):
    base = ("generate", tiny_llama, "--prompt", "The fox", "--max-new-tokens", 5)
    said = halfbyte(*base, "--json")
    assert said.status == 0, said.err
    assert said.json.keys() == {"text", "tokens", "tokens_per_second"}
    assert 1 <= said.json["tokens"] <= 5
    assert said.json["tokens_per_second"] > 0
    plain = halfbyte(*base)
    assert plain.out == said.json["text"] + "\n"  # nothing but the text; the speed is on standard error
    assert "a second" in plain.err
    hot = [halfbyte(*base, "--temperature", 1.0, "--seed", s).out for s in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]
    assert halfbyte(*base, "--chat").status == 0


def test_generate_by_the_adapter_that_is_named(halfbyte, refused, tiny_llama, tiny_data, tmp_path):
    train = ("train", tiny_llama, "--data", tiny_data["text"], "--lr", "1e-2", "--max-length", "64")
    for name, steps in (("one", "2"), ("two", "20")):
        said = halfbyte(*train, "--steps", steps, "-o", tmp_path / name)
        assert said.status == 0, said.err
    say = ("--prompt", "The fox", "--max-new-tokens", 8)
    alone = {n: halfbyte("generate", tmp_path / n, *say).out for n in ("one", "two")}
    assert alone["one"] != alone["two"]
    both = ("generate", tiny_llama, *say, "--adapter", f"first={tmp_path / 'one'}", "--adapter", tmp_path / "two")
    assert halfbyte(*both).out == alone["one"]
    assert halfbyte(*both, "--use", "first").out == alone["one"]
    assert halfbyte(*both, "--use", "two").out == alone["two"]
    on_one = ("generate", tmp_path / "one", *say, "--adapter", f"x={tmp_path / 'two'}")
    assert halfbyte(*on_one).out == halfbyte(*on_one, "--use", "x").out == alone["two"]
    refused(*both, "--use", "third", words="--adapter gives first, two")
    refused(*both, "--adapter", f"first={tmp_path / 'two'}", words="one named 'first' already")
    refused("generate", tiny_llama, *say, "--use", "first", words="--adapter NAME=DIR")
    refused("generate", tiny_llama, *say, "--adapter", f"a.b={tmp_path / 'two'}", words="cannot be named 'a.b'")


class Terminal:
    """A standard input with a person at it."""

    def __init__(self, *lines: str) -> None:
        self.lines = list(lines)

    def isatty(self) -> bool:
        return True

    def readline(self) -> str:
        return self.lines.pop(0) if self.lines else ""


@pytest.mark.parametrize("end", [(), ("\n",)])
def test_chat_on_a_terminal(halfbyte, tiny_llama, monkeypatch, end):
    monkeypatch.setattr(sys, "stdin", Terminal("hello\n", "and on\n", *end))
    said = halfbyte("generate", tiny_llama, "--max-new-tokens", 3)
    assert said.status == 0, said.err
    assert said.out.count("you: ") == 3
    assert "An empty line ends the chat." in said.err


def test_inspect(halfbyte, tiny_llama, tmp_path):
    halfbyte("quantize", tiny_llama, "--to", "W4A16", "-o", tmp_path / "q")
    said = halfbyte("inspect", tmp_path / "q", "--json")
    assert said.status == 0, said.err
    rows = {r["name"]: r for r in said.json["parameters"]}
    assert rows["lm_head.weight"]["tied_to"] == "model.embed_tokens.weight"
    assert rows["model.layers.0.mlp.down_proj.weight"]["format"] == "int4-g128"
    assert rows["model.layers.0.mlp.down_proj.weight"]["shape"] == [64, 128]
    assert all(r.keys() == {"name", "shape", "format", "bytes", "tied_to"} for r in rows.values())
    assert said.json["bytes"] == sum(r["bytes"] for r in rows.values())
    plain = halfbyte("inspect", tmp_path / "q")
    assert "int4-g64" in plain.out
    assert "bits a weight" in plain.out


def test_plan_does_nothing(halfbyte, tiny_llama, tmp_path):
    said = halfbyte("plan", tiny_llama, "--to", "int8-channel", "--json")
    assert said.status == 0, said.err
    after = {r["name"]: r["after"] for r in said.json["parameters"]}
    assert after["model.layers.0.self_attn.q_proj.weight"] == "int8-channel"
    assert after["model.norm.weight"] == "float32"
    assert halfbyte("plan", tiny_llama, "--to", "int8-channel").status == 0
    assert list(tmp_path.iterdir()) == []


STEPS = """
model: {model}
output: {out}
steps:
  - freeze: {{scheme: NF4}}
  - adapt: {{r: 4}}
  - train: {{data: {data}, steps: 2, batch_size: 2, max_length: 64}}
  - merge
  - evaluate: {{data: {data}, against: {model}}}
"""
METHOD = """
model: {model}
output: {out}
seed: 1
method: qat-lora
to: W4A16
train: {{data: {data}, steps: 2, batch_size: 2, max_length: 64, learning_rate: 1e-3}}
adapt: {{r: 4}}
"""


@pytest.mark.parametrize("text", [STEPS, METHOD], ids=["steps", "method"])
def test_run_a_recipe(halfbyte, tiny_llama, tiny_data, tmp_path, text):
    out = tmp_path / "out"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text.format(model=tiny_llama, out=out, data=tiny_data["text"]))
    said = halfbyte("run", recipe, "--json")
    assert said.status == 0, said.err
    assert said.json["training"]["steps"] == 2
    assert out.is_dir()
    assert len(said.json["ledger"]) == (text is STEPS)
    assert "step 1/" in said.err
    assert halfbyte("run", recipe).status == 2
    assert halfbyte("run", recipe, "--overwrite").status == 0


def test_doctor(halfbyte):
    said = halfbyte("doctor", "--json")
    assert said.status == 0
    assert said.json["halfbyte"] == library.__version__
    assert said.json["packages"]["torch"] == torch.__version__
    assert "all that halfbyte needs is installed" in halfbyte("doctor").out


def test_every_command_says_one_line_of_json_with_real_numbers(halfbyte, tiny_llama, tmp_path):
    (tmp_path / "one.txt").write_text("The fox jumps.")  # one window: an error cannot be known, and is null
    said = halfbyte("evaluate", tiny_llama, "--data", tmp_path / "one.txt", "--json")
    assert said.json["perplexity_error"] is None
    assert "NaN" not in said.out


@pytest.mark.parametrize(
    ("method", "start"),
    [("lora", None), ("full", None), ("qat", None), ("lora", "pissa_niter_2"), ("qlora", "loftq"), ("lora", "eva")],
)
def test_an_interrupted_run_resumes_to_the_same_bytes(
    halfbyte, tiny_llama, tiny_data, tmp_path, monkeypatch, method, start
):
    from halfbyte.train import Masters

    def argv(out):
        dropout = ["--lora-dropout", "0.2"] if method == "lora" else []
        dropout += ["--to", "int4-g32"] if method == "qat" else []
        dropout += [] if start is None else ["--init-lora-weights", start, "--r", "4"]
        return ["train", tiny_llama, "--data", tiny_data["text"], "--method", method, "--steps", "6", "--save-steps",
                "2", "--batch-size", "2", "--max-length", "32", "-o", tmp_path / out, *dropout]  # fmt: skip

    assert halfbyte(*argv("whole")).status == 0
    taken, step = [], Masters.step

    def killed(self, *args):
        taken.append(1)
        if len(taken) == 5:
            raise KeyboardInterrupt
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Masters, "step", killed)
        assert halfbyte(*argv("cut")).status == 130
    assert not (tmp_path / "cut").exists()
    assert halfbyte(*argv("cut")).status == 2  # not thrown away unasked
    if start == "pissa_niter_2":  # what A and B moved from would be another
        assert halfbyte(*argv("cut"), "--resume", "--init-lora-weights", "pissa").status == 2
    if method == "qat":  # the same floats, seen through another grid
        assert halfbyte(*argv("cut"), "--resume", "--to", "int8-channel").status == 2
    resumed = halfbyte(*argv("cut"), "--resume")
    assert resumed.status == 0
    assert "step 6/6" in resumed.err
    weights = "model.safetensors" if method in ("full", "qat") else "adapter_model.safetensors"
    assert (tmp_path / "cut" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    assert not (tmp_path / "cut" / "checkpoint").exists()
    assert len((tmp_path / "cut" / "curve.jsonl").read_text().splitlines()) == 6


def test_quantize_and_export_to_gguf(halfbyte, tiny_llama, tmp_path):
    """Without its reader's verdict, which costs a program that takes minutes to build."""
    said = halfbyte("quantize", tiny_llama, "--to", "Q4_K_M", "-o", tmp_path / "q.gguf", "--no-verify", "--json")
    assert said.status == 0, said.err
    assert said.json["read_back"] is False
    assert "not read back: --no-verify" in said.err
    assert "64 does not divide" not in said.err
    assert "256 does not divide 64 inputs" in said.err
    said = halfbyte(
        "export", tmp_path / "q.gguf", "--to", "gguf", "-o", tmp_path / "again.gguf", "--no-verify", "--json"
    )
    assert said.status == 0, said.err
    assert "weights are carried over" in said.err
    assert said.json["bytes"] == (tmp_path / "again.gguf").stat().st_size
    said = halfbyte("export", tiny_llama, "-o", tmp_path / "f.gguf", "--format", "f16", "--no-verify")
    assert (said.status, said.out) == (0, ""), said.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.gguf", "f.gguf", "q.gguf"]


def test_a_gguf_file_is_a_model_for_every_verb(halfbyte, tiny_llama, tiny_data, tmp_path):
    """Trained on its own codes, merged to floats or to a file, evaluated."""
    model = tmp_path / "q.gguf"
    assert halfbyte("quantize", tiny_llama, "--to", "Q4_1", "-o", model, "--no-verify").status == 0
    said = _trained(halfbyte, model, tiny_data["text"], tmp_path / "adapter", "qlora")
    assert "15 weights stay the codes that they are" in said.err
    said = _trained(halfbyte, model, tiny_data["text"], tmp_path / "whole", "full")
    assert "the weights held as q4_1, q8_0 are bfloat16 from here on" in said.err
    assert halfbyte("merge", tmp_path / "adapter", "-o", tmp_path / "merged").status == 0
    said = halfbyte("merge", tmp_path / "adapter", "--to", "Q8_0", "-o", tmp_path / "merged.gguf", "--no-verify")
    assert said.status == 0, said.err
    said = halfbyte("evaluate", tmp_path / "merged.gguf", "--data", tiny_data["text"], "--against", tmp_path / "merged",
                    "--context", "64", "--json")  # fmt: skip
    assert said.status == 0, said.err
    assert said.json["kl_mean"] < 1e-3


def test_plan_tells_the_memory_and_the_disk(halfbyte, tiny_llama, tiny_data):
    found = {}
    for solver, rows in (("rtn", 8), ("gptq", 8), ("gptq", 800), ("autoround", 8)):
        plan = ("plan", tiny_llama, "--to", "int4-g32", "--solver", solver, "--samples", rows)
        found[solver, rows] = halfbyte(*plan, "--json").json
        assert f"by {solver}" in halfbyte(*plan).out
    memory = {k: v["peak_memory"] for k, v in found.items()}
    assert memory["rtn", 8] < memory["gptq", 8] < min(memory["gptq", 800], memory["autoround", 8])
    assert all(v["bytes"] < v["disk"] < 3 * v["bytes"] for v in found.values())
    assert "16 rows that the model writes itself" in halfbyte(*plan[:5], "gptq").out
    text = ("--calibration", tiny_data["text"], "--samples", 9)
    assert f"9 rows of {tiny_data['text']}" in halfbyte(*plan[:5], "gptq", *text).out
    turned = halfbyte(*plan[:5], "rtn", "--transform", "awq", "--json").json  # the whole model is there
    assert turned["peak_memory"] > memory["rtn", 8] + turned["bytes_before"] / 2


def test_the_disk_that_a_plan_tells_is_what_is_taken(halfbyte, tiny_llama, tmp_path, monkeypatch):
    taken, copied = [], shards.shutil.copyfileobj

    def copy(*args):
        copied(*args)
        parts = [f for f in (tmp_path / "out.partial").rglob("*") if f.suffix == ".safetensors" or "part-" in f.name]
        taken.append(sum(f.stat().st_size for f in parts))

    monkeypatch.setattr(shards.shutil, "copyfileobj", copy)
    assert halfbyte("quantize", tiny_llama, "--to", "int4-g32", "-o", tmp_path / "out").status == 0
    told = halfbyte("plan", tiny_llama, "--to", "int4-g32", "--json").json["disk"]
    assert 0.7 * told < max(taken) < told + 20_000  # of headers, which plan leaves out


def test_plan_names_who_can_read_the_result(halfbyte, tiny_llama):
    said = halfbyte("plan", tiny_llama, "--to", "int4-g32")
    assert said.status == 0, said.err
    line = next(x for x in said.out.splitlines() if "can be written as" in x)
    assert set(line.split(": ")[1].split(", ")) == {"onnx", "compressed-tensors", "gptq", "mlx"}
    assert "  can be written as: onnx, compressed-tensors\n" in halfbyte("plan", tiny_llama, "--to", "W8A8").out
    rows = halfbyte("plan", tiny_llama, "--to", "Q4_0", "--json").json["parameters"]
    by_name = {r["name"]: r["readers"] for r in rows}
    assert by_name["model.layers.0.self_attn.q_proj.weight"] == ["gguf", "ollama", "onnx"]
    assert by_name["model.norm.weight"] == []
