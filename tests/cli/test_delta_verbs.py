"""export --to delta, apply and verify: a tuned model sent as what differs from its base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import halfbyte as library
from halfbyte import delta


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def sent(tiny_llama, tiny_data, tmp_path_factory) -> dict[str, Path]:
    """A quantized miniature, the same with its scales tuned and what that gave in its ledger, and the delta."""
    where, text = tmp_path_factory.mktemp("sent"), str(tiny_data["text"])
    base, tuned = where / "base", where / "tuned"
    library.load(tiny_llama).quantize("W4A16").save(base)
    short = {"steps": 3, "batch_size": 2, "max_length": 64, "learning_rate": 1e-2}
    made = library.load(base).train(text, "scales", "W4A16", eval_data=text, **short)
    assert made.log is not None
    made.rows.append(("trained (scales)", {"loss": 1.0, "eval_loss": made.log.curve[-1]["eval_loss"]}))
    made.evaluate(text, str(base), "against base")
    made.save(tuned)
    delta.export(tuned, base, where / "tuned.delta")
    return {"base": base, "tuned": tuned, "delta": where / "tuned.delta"}


@pytest.fixture
def received(sent, tmp_path) -> Path:
    """What was rebuilt from the delta, to be changed."""
    delta.apply(sent["base"], sent["delta"], tmp_path / "received")
    return tmp_path / "received"


@pytest.fixture
def verified(halfbyte):
    """Verifies a folder: the exit status, what was found of each thing, and the last sentence."""

    def call(*argv):
        told = halfbyte("verify", *argv, "--json")
        return told.status, {f["what"]: f for f in told.json["findings"]}, told.err.splitlines()[-1]

    return call


def test_a_tuned_model_is_sent_rebuilt_and_verified(halfbyte, verified, sent, tiny_data, tmp_path):
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
    status, found, _ = verified(out, "--base", sent["base"], "--delta", file, "--data", tiny_data["text"])
    assert status == 0
    for figure in ("perplexity", "loss", "loss_difference", "kl_mean", "top1_agreement"):
        assert found[f"against base: {figure}"]["holds"] is True
    for what in ("trained (scales): eval_loss", "weights, by halfbyte.json", f"base, by {file}", f"9 files, by {file}"):
        assert found[what]["holds"] is True


def test_codes_that_moved(halfbyte, sent, tmp_path):
    """As after training through a grid: some codes by a step, in words of eight."""
    model, name = shutil.copytree(sent["base"], tmp_path / "model"), "model.safetensors"
    tensors = load_file(model / name)
    for t in (t for n, t in tensors.items() if n.endswith("weight_packed")):
        t ^= (torch.rand(t.shape) < 0.1).int() << 8
    save_file(tensors, model / name, metadata={"format": "pt"})
    made = halfbyte("export", model, "--base", sent["base"], "-o", tmp_path / "x.delta", "--json")
    assert made.status == 0, made.err
    assert halfbyte("apply", sent["base"], tmp_path / "x.delta", "-o", tmp_path / "out").status == 0
    assert contents(tmp_path / "out") == contents(model)


def test_what_is_left_out(halfbyte, refused, sent, tmp_path):
    """The floats of a model that was trained through a grid, which are most of its bytes."""
    model = shutil.copytree(sent["tuned"], tmp_path / "model")
    (model / "masters").mkdir()
    save_file({"w": torch.randn(500, 500)}, model / "masters" / "masters.safetensors")
    export = ("export", model, "--base", sent["base"], "--overwrite", "-o", tmp_path / "x.delta", "--json")
    said = halfbyte(*export)
    assert said.json["bytes"] > 500_000
    assert "--without masters" in said.err
    said = halfbyte(*export, "--without", "masters", "--without", "README.md")
    assert said.json["bytes"] < 20_000
    assert halfbyte("apply", sent["base"], tmp_path / "x.delta", "-o", tmp_path / "out").status == 0
    all_but = {n: b for n, b in contents(sent["tuned"]).items() if n != "README.md"}
    assert contents(tmp_path / "out") == all_but
    refused(*export, "--without", "master", words="--without master: ")


def test_what_is_there_is_replaced_only_when_asked(halfbyte, refused, sent, tmp_path):
    file, out = shutil.copy(sent["delta"], tmp_path), tmp_path / "out"
    export = ("export", sent["tuned"], "--base", sent["base"], "-o", file)
    refused(*export, words=("exists already", "--overwrite"))
    assert halfbyte(*export, "--overwrite").status == 0
    apply = ("apply", sent["base"], file, "-o", out)
    assert halfbyte(*apply).status == 0
    refused(*apply, words=("exists already", "--overwrite"))
    assert halfbyte(*apply, "--overwrite").status == 0
    assert contents(out) == contents(sent["tuned"])


def test_an_export_that_cannot_be(refused, sent, tmp_path):
    tuned, base, out = sent["tuned"], sent["base"], tmp_path / "x.delta"
    refused("export", tuned, "--to", "delta", "-o", out, words="--base BASE")
    refused("export", tuned, "--to", "delta", "--base", base, "-o", tmp_path / "x", words="name it x.delta")
    refused("export", tuned, "--base", base, "-o", out, "--format", "Q4_0", words="--format is not of --to delta")
    refused("export", tuned, "--to", "gguf", "--base", base, "-o", tmp_path / "x.gguf", words="--base is of --to delta")
    refused("export", tuned, "--base", tmp_path / "nowhere", "-o", out, words=("nowhere", "no such file or folder"))
    refused("export", tuned, "--base", base, "-o", tuned / "x.delta", words="in the folder that is sent")


def test_an_apply_that_cannot_be(refused, sent, tiny_llama, tmp_path):
    base, file, out = sent["base"], sent["delta"], tmp_path / "out"
    refused("apply", tiny_llama, file, "-o", out, words=("is of a base whose weights have the sha256", str(tiny_llama)))
    refused("apply", base, file, "-o", tmp_path / "out.gguf", words="makes a folder")
    refused("apply", base, base / "model.safetensors", "-o", out, words="no delta of halfbyte's")
    (tmp_path / "cut.delta").write_bytes(file.read_bytes()[:-1])
    refused("apply", base, tmp_path / "cut.delta", "-o", out, words="cut.delta is damaged")
    changed = shutil.copytree(base, tmp_path / "changed")
    (changed / "tokenizer.json").write_text("{}")
    refused("apply", changed, file, "-o", out, words="tokenizer.json")


def test_a_changed_file_does_not_verify(verified, sent, received):
    told = verified(received)
    assert told[0] == 0
    assert told[1]["weights, by halfbyte.json"]["holds"] is True
    name = received / "model.safetensors"
    name.write_bytes(name.read_bytes()[:-1] + b"\x55")
    status, found, said = verified(received, "--delta", sent["delta"])
    assert status == 1
    assert found["weights, by halfbyte.json"]["holds"] is False
    assert "model.safetensors has the sha256" in found["file"]["why"]
    assert "is not what it is said to be" in said


def test_another_base_does_not_verify(verified, sent, received, tiny_llama):
    for more in (("--delta", sent["delta"]), ()):
        status, found, said = verified(received, "--base", tiny_llama, *more)
        assert status == 1
        assert [f["holds"] for what, f in found.items() if what.startswith("base, by")] == [False]
        assert "base, by" in said
        assert found["against base: perplexity"]["holds"] is True
        assert found["against base: kl_mean"]["holds"] is None


@pytest.mark.parametrize("figure", ["perplexity", "kl_mean", "eval_loss", "bytes"])
def test_a_ledger_that_claims_too_much(verified, sent, received, tiny_data, figure):
    rows = json.loads((received / "ledger.json").read_text())
    changed = [row for row in rows if row.get(figure) is not None]
    changed[-1][figure] *= 2 if figure == "bytes" else 0.9
    (received / "ledger.json").write_text(json.dumps(rows))
    status, found, said = verified(received, "--base", sent["base"], "--data", tiny_data["text"])
    wrong = [f for f in found.values() if f["holds"] is False]
    assert status == 1
    assert [f["what"].split(": ")[-1] for f in wrong] == [figure]
    assert wrong[0]["claimed"] != wrong[0]["found"]
    assert figure in said


def test_what_cannot_be_measured_is_said(verified, sent, received, tiny_data, tmp_path):
    """Without its data, and without its reference, a row says nothing of itself."""
    notes = json.loads((received / "halfbyte.json").read_text())
    elsewhere = {k: v for k, v in notes.items() if k not in ("data", "eval_data")}
    (received / "halfbyte.json").write_text(json.dumps(elsewhere))
    status, found, _ = verified(received, "--base", sent["base"], "--data", tiny_data["messages"])
    assert status == 0
    for what in ("against base", "trained (scales): eval_loss"):
        assert found[what]["holds"] is None
        assert "--data FILE" in found[what]["why"]
    status, found, _ = verified(received, "--data", tiny_data["text"])
    assert status == 0
    assert found["against base: perplexity"]["holds"] is True
    assert found["against base: kl_mean"]["holds"] is None
    assert "is not the --base" in found["against base: kl_mean"]["why"]


def test_rows_of_an_earlier_stage_are_not_of_this_model(verified, tiny_llama, tiny_data, tmp_path):
    made = library.load(tiny_llama)
    made.evaluate(str(tiny_data["text"]), stage="before")
    made.quantize("W4A16")
    made.evaluate(str(tiny_data["text"]), stage="after")
    made.save(tmp_path / "made")
    status, found, _ = verified(tmp_path / "made", "--data", tiny_data["text"])
    assert status == 0
    assert "an earlier stage" in found["before"]["why"]
    assert found["after: perplexity"]["holds"] is True


def test_the_share_that_was_held_out_is_found_again(halfbyte, verified, sent, tiny_data, tmp_path):
    short = ("--steps", 2, "--batch-size", 2, "--max-length", 64, "--eval-split", 0.3)
    train = ("train", sent["base"], "--data", tiny_data["text"], "--method", "scales", "--to", "W4A16", *short)
    said = halfbyte(*train, "-o", tmp_path / "tuned")
    assert said.status == 0, said.err
    assert verified(tmp_path / "tuned")[1]["trained (scales): eval_loss"]["holds"] is True


@pytest.mark.parametrize("ledger", ["", "{}", "[1]", '[{"stage": 1}]', '[{"stage": "a", "loss": "low"}]', "[" * 100_000,
                                    '[{"stage": "a", "tokens": [1]}]', '[{"stage": "a", "data_sha256": []}]',
                                    f'[{{"stage": "a", "bits_per_weight": {"9" * 400}}}]'])  # fmt: skip
def test_a_ledger_that_is_none(refused, received, ledger):
    (received / "ledger.json").write_text(ledger)
    refused("verify", received, words="ledger.json")


def test_what_cannot_be_verified(refused, sent, tmp_path):
    refused("verify", tmp_path / "nowhere", words="no such file or folder")
    refused("verify", sent["tuned"], "--delta", tmp_path / "nowhere", words="cannot be read")
    refused("verify", sent["tuned"], "--data", tmp_path / "nowhere.jsonl", words="nowhere.jsonl")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    refused("verify", tmp_path / "x.gguf", words="is not a folder")


@pytest.fixture
def trained(tiny_llama, tiny_data, tmp_path):
    """A base of one's own, and an adapter folder on it that was measured against it."""
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    short = {"steps": 2, "batch_size": 2, "max_length": 64, "learning_rate": 1e-2, "r": 4}
    made = library.load(base).train(str(tiny_data["text"]), "lora", **short)
    made.evaluate(str(tiny_data["text"]), str(base), "against base")
    return base, made.save(tmp_path / "adapter")


def test_an_adapter_whose_base_was_moved_is_verified(halfbyte, verified, trained, tmp_path):
    base, adapter = trained
    (tmp_path / "elsewhere").mkdir()
    base.rename(tmp_path / "elsewhere" / "other")
    said = halfbyte("verify", adapter)
    assert said.status == 2
    assert "its base model is no longer at" in said.err
    status, found, _ = verified(adapter, "--base", tmp_path / "elsewhere" / "other")
    assert status == 0
    assert found["against base: kl_mean"]["holds"] is True
    assert found["base, by halfbyte.json"]["holds"] is True


def test_a_base_with_the_weights_a_second_time_is_the_same(verified, trained):
    base, adapter = trained
    shutil.copy(base / "model.safetensors", base / "consolidated.safetensors")
    status, found, _ = verified(adapter, "--base", base)
    assert status == 0
    assert found["base, by halfbyte.json"]["holds"] is True
    assert found["against base: kl_mean"]["holds"] is True
