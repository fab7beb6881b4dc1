"""`halfbyte merge`: adapters whose merge keeps the codes, and into which base."""

from __future__ import annotations

import json

import pytest
import torch

from halfbyte import run
from halfbyte.layers import Codes, weights

SMALL = ("--steps", "2", "--batch-size", "2", "--max-length", "64", "--r", "4", "--lr", "1e-2")


def held(path):
    return {n: w.stored.q for n, w in weights(run.load(path).model).items() if isinstance(w.stored, Codes)}


@pytest.fixture
def trained(halfbyte, tiny_llama, tiny_data, tmp_path):
    def call(*more, model=tiny_llama, name="adapter"):
        said = halfbyte("train", model, "--data", tiny_data["text"], *SMALL, *more, "-o", tmp_path / name)
        assert said.status == 0, said.err
        return tmp_path / name

    return call


@pytest.mark.parametrize("to", [None, "q4_1"])
def test_qa_lora_keeps_its_codes_in_every_file_that_holds_them(halfbyte, refused, trained, tiny_llama, tmp_path, to):
    adapter = trained("--method", "qa-lora", *(("--to", to) if to else ()))
    before = held(adapter)
    for out in ("out", "out.onnx", "out.gguf"):
        if to and out == "out":
            refused("merge", adapter, "-o", tmp_path / out, words="name the output OUT.gguf or OUT.onnx")
            continue
        if not to and out.endswith("gguf"):  # float32, which its blocks do not hold
            continue
        more = ("--no-verify",) if out.endswith("gguf") else ()
        said = halfbyte("merge", adapter, "-o", tmp_path / out, "--json", *more)
        assert said.status == 0, said.err
        assert "the zero points of 14 weights took the adapter in" in said.err
        assert "rounding the zero points moved weights by" in said.err
        assert said.json["rounding"]["zero_points"] == len(before) == 14
        if out.endswith("onnx"):
            assert said.json["ledger"][1]["kl_mean"] < 1e-4
        else:
            after = held(tmp_path / out)
            assert all(torch.equal(after[n].codes, q.codes) for n, q in before.items())
        if out == "out":
            assert abs(said.json["kl_mean"]) < 1e-6
            assert "merged against unmerged" in said.err
            assert json.loads((tmp_path / "out" / "halfbyte.json").read_text())["merged"] == "trained"
    assert halfbyte("generate", adapter, "--prompt", "The fox", "--max-new-tokens", "3").status == 0


def test_what_no_folder_holds_is_known_before_both_bases_are_measured(refused, trained, tmp_path, monkeypatch):
    adapter = trained("--method", "qa-lora", "--to", "q4_1")
    monkeypatch.setattr("halfbyte.cli.merge._difference", None)
    refused("merge", adapter, "-o", tmp_path / "out", "--base", "both", words="name the output OUT.gguf or OUT.onnx")


def test_qa_lora_refuses_symmetric_formats(refused, tiny_llama, tiny_data, tmp_path):
    train = ("train", tiny_llama, "--data", tiny_data["text"], "--method", "qa-lora", "-o", tmp_path / "out")
    refused(*train, "--to", "W4A16", words=("--method qa-lora --to W4A16", "has no zero points"))


# ---- which base


@pytest.fixture
def codes(halfbyte, tiny_llama, tmp_path):
    said = halfbyte("quantize", tiny_llama, "--to", "int3-g32", "-o", tmp_path / "codes")
    assert said.status == 0, said.err
    return tmp_path / "codes"


def merged(halfbyte, adapter, out, *more):
    said = halfbyte("merge", adapter, "-o", out, "--json", *more)
    assert said.status == 0, said.err
    return said


@pytest.mark.parametrize("to", [(), ("--to", "int3-g32")])
def test_both_bases_are_measured_and_the_better_is_written(halfbyte, trained, codes, tiny_llama, tmp_path, to):
    adapter = trained("--method", "qlora", model=codes)
    said = merged(halfbyte, adapter, tmp_path / "out", "--base", "both", *to)
    tries = said.json["bases"]
    assert tries.keys() == {"trained", "original"}
    if not to:
        assert tries["trained"]["kl_mean"] < 1e-6 < tries["original"]["kl_mean"]
    better = min(tries, key=lambda b: tries[b]["loss"])
    assert said.json["base"] == better
    assert said.json["loss"] == pytest.approx(tries[better]["loss"], abs=1e-5)
    assert f"so what is written: --base {better}" in said.err
    assert "merged into what it was trained on: loss" in said.err
    assert f"merged into {tiny_llama}: loss" in said.err
    alone = merged(halfbyte, adapter, tmp_path / "alone", "--base", better, *to)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "alone" / "model.safetensors"
    ).read_bytes()
    assert "bases" not in alone.json
    stages = [r["stage"] for r in json.loads((tmp_path / "out" / "ledger.json").read_text())]
    assert stages == ["merged, base trained", "merged, base original", "merged, against unmerged"]


def test_an_adapter_trained_on_floats_goes_onto_codes(halfbyte, refused, trained, codes, tmp_path):
    adapter = trained()
    said = merged(halfbyte, adapter, tmp_path / "out", "--base-model", codes)
    assert said.json["base"] == "original"
    assert said.json["kl_mean"] > 1e-6
    assert merged(halfbyte, adapter, tmp_path / "both", "--base", "both", "--base-model", codes).json["bases"]
    for more, words in [
        (("--base", "original"), "was trained on floats; name the other base by --base-model"),
        (("--base", "both"), "was trained on floats; name the other base by --base-model"),
        (("--base", "trained", "--base-model", codes), "other weights than"),
        (("--base", "neither"), "--base neither: it is trained, original, both"),
        (("--base-model", tmp_path / "nowhere"), "no such file or folder"),
    ]:
        refused("merge", adapter, "-o", tmp_path / "no", *more, words=words)


def test_a_base_that_was_moved_is_named(halfbyte, trained, codes, tmp_path):
    adapter = trained("--method", "qlora", model=codes)
    codes.rename(tmp_path / "moved")
    said = merged(halfbyte, adapter, tmp_path / "out", "--base-model", tmp_path / "moved")
    assert said.json["base"] == "trained"
    assert said.json["kl_mean"] < 1e-6
    said = merged(halfbyte, adapter, tmp_path / "out.onnx", "--base-model", tmp_path / "moved")
    assert said.json["ledger"][1]["kl_mean"] < 1e-5
