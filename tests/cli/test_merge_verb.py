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


def test_qa_lora_refuses_symmetric_formats(refused, tiny_llama, tiny_data, tmp_path):
    train = ("train", tiny_llama, "--data", tiny_data["text"], "--method", "qa-lora", "-o", tmp_path / "out")
    refused(*train, "--to", "W4A16", words=("--method qa-lora --to W4A16", "has no zero points"))
