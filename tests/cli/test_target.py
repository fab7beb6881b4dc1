"""Quantizing to a size or a loss instead of a scheme."""

from __future__ import annotations

import json

import pytest

from halfbyte import run
from halfbyte.folders import disk_bytes
from halfbyte.layers import ops


@pytest.fixture
def text(tiny_data):
    return ("--calibration", tiny_data["text"], "--max-length", 64)


@pytest.mark.parametrize("out", ["out", "out.gguf"])
def test_a_size_is_kept_to(halfbyte, tiny_llama, text, tmp_path, out):
    target, size = tmp_path / out, "120KB" if out == "out" else "80KB"
    said = halfbyte(
        "quantize", tiny_llama, "-o", target, "--target-size", size, *text, "--dtype", "bfloat16", "--no-verify",
        "--json",
    )  # fmt: skip
    assert said.status == 0, said.err
    limit = int(size[:-2]) * 1000
    assert 0.9 * limit < said.json["bytes"] == disk_bytes(target) <= limit
    assert "predicted KL" in said.err
    held = {n: op.weight.format for n, op in ops(run.load(target).model)}
    chosen = {c["name"]: c["format"] for c in said.json["choice"]}
    assert {n: held[n].name for n in chosen} == chosen
    assert len(set(chosen.values())) > 1
    assert ("model.embed_tokens" in chosen) == (out == "out.gguf")
    assert sum(c["predicted_kl"] for c in said.json["choice"]) == pytest.approx(said.json["predicted_kl"])
    assert ("stays as it is" in said.err) == (out == "out")


@pytest.mark.parametrize("out", ["out", "out.gguf"])
def test_bits_are_kept_to_and_formats_can_be_named(halfbyte, tiny_llama, text, tmp_path, out):
    target = tmp_path / out
    names = "int3-g64,int8-g64" if out == "out" else "q4_0,q8_0"
    most = 12 if out == "out" else 6.5
    said = halfbyte(
        "quantize", tiny_llama, "-o", target, "--target-bits", most, "--formats", names, "--solver", "rtn", *text,
        "--no-verify", "--json",
    )  # fmt: skip
    assert said.status == 0, said.err
    assert most - 0.8 < run.load(target).bits_per_weight() <= most
    assert {c["format"] for c in said.json["choice"]} == set(names.split(","))
    assert said.json["solver"] == "rtn"


@pytest.mark.parametrize("out", ["out", "out.gguf"])
def test_a_limit_of_kl_is_met(halfbyte, tiny_llama, tiny_data, text, tmp_path, out):
    target = tmp_path / out
    said = halfbyte(
        "quantize", tiny_llama, "-o", target, "--max-kl", 0.0005, "--data", tiny_data["text"], *text, "--no-verify",
        "--json",
    )  # fmt: skip
    assert said.status == 0, said.err
    tries = said.json["tries"]
    met = [t for t in tries if t["kl_mean"] <= 0.0005]
    assert min(t["bytes"] for t in met) >= said.json["bytes"]
    assert said.err.count("MB: KL ") == len(tries)
    row = halfbyte("evaluate", target, "--data", tiny_data["text"], "--against", tiny_llama, "--context", 64, "--json")
    assert row.status == 0, row.err
    assert row.json["kl_mean"] <= 0.0006


def test_a_limit_that_cannot_be_met_exits_3_with_the_nearest(halfbyte, tiny_llama, text, tmp_path):
    target = tmp_path / "out"
    said = halfbyte("quantize", tiny_llama, "-o", target, "--max-kl", "1e-12", "--solver", "rtn", *text, "--json")
    assert said.status == 3, said.err
    assert "was not met" in said.err.splitlines()[-1]
    assert "nearest was kept" in said.err.splitlines()[-1]
    assert said.json["tries"]
    assert json.loads((target / "halfbyte.json").read_text())["calibrated"] is True
    assert run.load(target).bits_per_weight() > 8


def test_exactly_one_target(refused, tiny_llama, tmp_path):
    quantize = ("quantize", tiny_llama, "-o", tmp_path / "out")
    refused(*quantize, words=("--to", "--target-bits", "--target-size", "--max-kl"))
    refused(*quantize, "--target-bits", 4, "--target-size", "1MB", words=("--target-bits and --target-size", "one"))
    refused(*quantize, "--to", "W4A16", "--max-kl", 1, words="--to and --max-kl")
    refused(*quantize, "--to", "W4A16", "--formats", "q8_0", words="--formats")
    refused(*quantize, "--to", "W4A16", "--data", "x", words="--data")


def test_targets_that_cannot_be(refused, tiny_llama, text, tmp_path):
    quantize = ("quantize", tiny_llama, "-o", tmp_path / "out", *text)
    refused(*quantize, "--target-size", "1KB", words=("smallest", "MB", "--target-size 1KB"))
    refused(*quantize, "--target-bits", "1.5", words=("least", "bits a weight", "model.embed_tokens", "OUT.gguf"))
    refused(*quantize, "--target-size", "90", words=("90MB", "unit"))
    for flag in ("--target-bits", "--max-kl"):
        for value in ("0", "-1", "nan", "inf"):
            refused(*quantize, f"{flag}={value}", words=(flag, "above 0"))
    refused(*quantize, "--target-bits", 4, "--data", "x", words="--max-kl")


def test_options_that_do_not_go_with_a_target(refused, tiny_llama, text, tmp_path):
    quantize = ("quantize", tiny_llama, "-o", tmp_path / "out", "--target-bits", 12)
    refused(*quantize, "--group-size", 32, words="--group-size")
    refused(*quantize, "--transform", "hadamard", words="--transform")
    refused(*quantize, "--imatrix", tmp_path / "i", words="--imatrix")
    refused(*quantize, "--calibration", "none", words="--calibration none")
    refused(*quantize, "--calibration", tmp_path / "nothing", words="nothing")
    refused(*quantize, "--formats", "q4_9", *text, words=("q4_9", "q4_0"))
    refused(*quantize, "--formats", "q4_0,int8-g64", *text, words="no folder layout")
    refused(*quantize, "--solver", "best", *text, words="--solver best")
    onnx = ("quantize", tiny_llama, "-o", tmp_path / "out.onnx", "--target-bits", 12)
    refused(*onnx, *text, words=".onnx")
    refused("quantize", tiny_llama, "-o", tmp_path / "out", "--max-kl", 1, "--data", tmp_path / "no", *text, words="no")


def test_the_smallest_that_is_named_can_be_had(halfbyte, refused, tiny_llama, text, tmp_path):
    for out in ("out", "out.gguf"):
        quantize = ("quantize", tiny_llama, "-o", tmp_path / out, "--solver", "rtn", "--no-verify", *text)
        least = refused(*quantize, "--target-size", "1KB", words="smallest").split("takes ")[1].split(" MB")[0]
        said = halfbyte(*quantize, "--target-size", f"{least}MB")
        assert said.status == 0, said.err
