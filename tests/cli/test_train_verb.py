"""Settings of `halfbyte train` that change what is written."""

from __future__ import annotations

import inspect
import json

import pytest
from safetensors.torch import load_file

from halfbyte.cli.train import command
from halfbyte.steps import Train

SMALL = ("--steps", "2", "--batch-size", "2", "--max-length", "64", "--r", "4", "--lr", "1e-2")


@pytest.mark.parametrize("flags", [[], ["--use-dora"]])
def test_use_dora(halfbyte, tiny_llama, tiny_data, tmp_path, flags):
    out = tmp_path / "adapter"
    said = halfbyte("train", tiny_llama, "--data", tiny_data["text"], *SMALL, *flags, "-o", out, "--json")
    assert said.status == 0, said.err
    assert json.loads((out / "adapter_config.json").read_text())["use_dora"] is bool(flags)
    norms = {n: t for n, t in load_file(out / "adapter_model.safetensors").items() if n.endswith("magnitude_vector")}
    assert bool(norms) == bool(flags)
    assert said.json["trainable"] == sum(t.numel() for t in load_file(out / "adapter_model.safetensors").values())
    merged = halfbyte("merge", out, "-o", tmp_path / "merged", "--json")
    assert merged.status == 0, merged.err
    assert merged.json["kl_mean"] < 1e-6


def test_every_flag_is_read():
    """Those of the Train step are handed on by name: one that is misspelt, or whose field is gone, would do nothing."""
    own = {
        "context", "model", "output", "method", "to", "group_size", "lr", "teacher", "init", "seed", "adapter", "dtype",
        "revision", "resume", "overwrite", "no_verify", "json", "target_modules", "transform", "untie",
    }  # fmt: skip
    adapters = {"r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights"}
    assert set(inspect.signature(command).parameters) - own - adapters == set(Train.model_fields) - {
        "learning_rate", "on_step", "on_start",
    }  # fmt: skip
