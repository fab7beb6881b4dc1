"""export --to delta, apply and verify: a tuned model sent as what differs from its base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import halfbyte as library
from halfbyte import delta

STEP = ("--steps", "3", "--batch-size", "2", "--max-length", "64", "--lr", "1e-2")


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def sent(tiny_llama, tiny_data, tmp_path_factory) -> dict[str, Path]:
    """A quantized miniature, the same with its scales tuned and its loss measured, and the delta between the two."""
    where = tmp_path_factory.mktemp("sent")
    base, tuned = where / "base", where / "tuned"
    library.load(tiny_llama).quantize("W4A16").save(base)
    made = library.load(base).train(
        str(tiny_data["text"]), "scales", "W4A16", eval_data=str(tiny_data["text"]), steps=3, batch_size=2, max_length=64,
        learning_rate=1e-2,
    )  # fmt: skip
    made.rows.append(("trained (scales)", {"loss": 1.0, "eval_loss": made.log.curve[-1]["eval_loss"]}))
    made.evaluate(str(tiny_data["text"]), str(base), "tuned, against base")
    made.save(tuned)
    delta.export(tuned, base, where / "tuned.delta")
    return {"base": base, "tuned": tuned, "delta": where / "tuned.delta"}


def test_a_tuned_model_is_sent_rebuilt_and_verified(halfbyte, sent, tiny_data, tmp_path):
    file, out = tmp_path / "mine.delta", tmp_path / "out"
    made = halfbyte("export", sent["tuned"], "--to", "delta", "--base", sent["base"], "-o", file, "--json")
    assert made.status == 0, made.err
    size = sum(len(v) for v in contents(sent["tuned"]).values())
    assert (made.json["model_bytes"], made.json["bytes"]) == (size, file.stat().st_size)
    assert made.json["bytes"] < 0.1 * size
    built = halfbyte("apply", sent["base"], file, "-o", out, "--json")
    assert built.status == 0, built.err
    assert contents(out) == contents(sent["tuned"])
    assert built.json["files"] == made.json["files"]
    told = halfbyte("verify", out, "--base", sent["base"], "--delta", file, "--data", tiny_data["text"], "--json")
    assert told.status == 0, told.err
    assert told.json["holds"] is True
    found = {f["what"]: f for f in told.json["findings"]}
    print(told.err)
    for figure in ("perplexity", "kl_mean", "top1_agreement"):
        assert found[f"tuned, against base: {figure}"]["holds"] is True
    assert found["trained (scales): eval_loss"]["holds"] is True
    assert found[f"base, by {file}"]["holds"] is True
