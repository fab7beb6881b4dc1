"""halfbyte quantize --transform: into folders and files, said and refused."""

import json

import pytest
import torch
import transformers

from halfbyte import run
from halfbyte.layers import ops
from miniatures import IDS


@pytest.fixture
def text(tiny_data):
    return tiny_data["text"]


def notes(path):
    return json.loads((path / "halfbyte.json").read_text())


@pytest.mark.parametrize(
    ("to", "more"),
    [
        ("W4A16", ["--transform", "awq"]),
        ("W8A8", ["--transform", "smooth"]),
        ("W8A8_STATIC", ["--transform", "hadamard", "--untie", "--transform", "smooth"]),
    ],
)
def test_into_a_folder(halfbyte, tiny_llama, text, tmp_path, to, more):
    out = tmp_path / "out"
    said = halfbyte(
        "quantize", tiny_llama, "--to", to, *more, "--calibration", text, "--samples", 4, "-o", out, "--json"
    )
    assert said.status == 0, said.err
    names = [more[i + 1] for i, flag in enumerate(more) if flag == "--transform"]
    assert [n["name"] for n in notes(out)["transforms"]] == names
    assert ("weight of its own" in said.err) == ("--untie" in more)
    if "smooth" in names and to == "W8A8_STATIC":
        assert notes(out)["input_search"] == "minmax"
    before, after = (run.load(p).model(IDS).logits.detach() for p in (tiny_llama, out))
    assert (after - before).abs().max() < 0.2 * before.abs().max()


def test_into_a_file_that_its_own_program_need_not_know_of(halfbyte, tiny_llama, text, tmp_path):
    out = tmp_path / "out.gguf"
    args = ("--transform", "hadamard", "--untie", "--transform", "awq", "--calibration", text, "--samples", 4)
    said = halfbyte("quantize", tiny_llama, "--to", "Q4_0", *args, "--no-verify", "-o", out)
    assert said.status == 0, said.err
    there = run.load(out)
    assert there.model.lm_head.weight is not there.model.model.embed_tokens.weight
    assert all(op.weight.format.name == "q4_0" for n, op in ops(there.model) if "layers" in n)
    before, after = run.load(tiny_llama).model(IDS).logits.detach(), there.model(IDS).logits.detach()
    assert (after - before).abs().max() < 0.5 * before.abs().max()


def test_plan_tells_what_a_weight_of_its_own_adds(halfbyte, refused, tiny_llama):
    plan = ("plan", tiny_llama, "--to", "W4A16", "--transform", "hadamard")
    refused(*plan, "--json", words="--untie")
    refused("plan", tiny_llama, "--to", "W4A16", "--untie", words="--transform hadamard")
    said = halfbyte(*plan, "--untie")
    assert said.status == 0, said.err
    assert "the head gets a weight of its own" in said.out
    head = run.load(tiny_llama).model.lm_head.weight.base()
    assert json.loads(halfbyte(*plan, "--untie", "--json").out)["added_bytes"] == head.nbytes
    assert json.loads(halfbyte(*plan[:4], "--json").out)["added_bytes"] == 0


def test_a_transformed_folder_is_read_by_plain_transformers(halfbyte, tiny_llama, tmp_path):
    out = tmp_path / "out"
    said = halfbyte("quantize", tiny_llama, "--to", "W8A16", "--transform", "hadamard", "--untie", "-o", out)
    assert said.status == 0, said.err
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        difference = theirs(IDS).logits - run.load(tiny_llama).model(IDS).logits
    assert difference.abs().max() < 0.02


def test_what_does_not_go_together_is_said_or_refused(halfbyte, refused, tiny_llama, text, tmp_path):
    quantize = ("quantize", tiny_llama, "--to", "W4A16", "-o", tmp_path / "out")
    refused(*quantize, "--transform", "rotate", words=("rotate", "hadamard"))
    refused(*quantize, "--transform", "awq", "--calibration", "none", words="--calibration none")
    refused(*quantize, "--transform", "hadamard", words="--untie")
    refused(*quantize, "--untie", words="--transform hadamard")
    refused(*quantize, "--transform", "awq", "--imatrix", text, words=("--imatrix", "--transform"))
    refused(
        "quantize", tiny_llama, "--to", "Q4_0", "--transform", "hadamard", "-o", tmp_path / "o.gguf", words="--untie"
    )
    said = halfbyte(*quantize, "--transform", "smooth", "--calibration", text, "--samples", 2)
    assert said.status == 0, said.err
    assert "round inputs: W4A16 does not" in said.err


def test_what_is_trained_is_made_ready_first(halfbyte, refused, tiny_llama, tiny_data, tmp_path):
    train = ("train", tiny_llama, "--data", tiny_data["text"], "--steps", 2, "--batch-size", 2, "--max-length", 64)
    refused(*train, "--method", "lora", "--transform", "smooth", "-o", tmp_path / "l", words="--method qat")
    refused(*train, "--method", "qat", "--to", "W8A8", "--transform", "hadamard", "-o", tmp_path / "h", words="--untie")
    out = tmp_path / "out"
    said = halfbyte(*train, "--method", "qat", "--to", "W8A8", "--transform", "smooth", "-o", out)
    assert said.status == 0, said.err
    assert "before: what stands out in inputs is moved into the weights" in said.err
    assert [n["name"] for n in notes(out)["transforms"]] == ["smooth"]
    assert halfbyte("evaluate", out, "--data", tiny_data["text"]).status == 0
