"""Every architecture, whole: all matrices are quantized or named, and what is saved is what was computed."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import CompressedTensorsConfig

from halfbyte import models, run
from halfbyte.layers import Codes, Linear, ops, swap, weights
from halfbyte.models import roles, tied
from halfbyte.plan import plan
from halfbyte.scheme import scheme, to_scheme
from halfbyte.solvers import solver
from miniatures import EXPERTS, MINIATURES, OTHERS, folder, logits, make, theirs

ALL = [*MINIATURES, *OTHERS]
SCHEMES = [("W8A16", None), ("W4A16", 32)]
KEPT = {"embedding", "head", "router", "position", "convolution"}  # what the presets name

# These classes' own _init_weights trips over packed weights beside a tied head; transformers reads them as floats
WHOLE = ("falcon", "t5")


def quantized(path, to, group=None):
    made = run.load(path)
    run.freeze(made, scheme(to, group), solver("rtn"))
    return made


def made_and_saved(tmp_path, name, to, group):
    # the layout that GPT-2's Conv1D has a place in, GPTQ's, is one of float16
    dtype = torch.float16 if name == "gpt2" else torch.float32
    made = quantized(folder(tmp_path / "m", name, dtype), to, group)
    (tmp_path / "out").mkdir()
    models.save(made.loaded, tmp_path / "out")
    return made, tmp_path / "out"


def held(w):
    """What a weight is made of; a group that is a whole row goes by either name."""
    f = w.format
    return f and (f.grid, f.zero, f.groups(tuple(w.shape)))


@pytest.mark.parametrize(("to", "group"), SCHEMES)
@pytest.mark.parametrize("name", ALL)
@pytest.mark.usefixtures("torch_products")
def test_every_matrix_takes_part_and_what_is_saved_is_what_was_computed(tmp_path, name, to, group):
    made, out = made_and_saved(tmp_path, name, to, group)
    role = roles(made.model)
    floats = {n for n, op in ops(made.model) if not isinstance(op.weight.stored, Codes)}
    assert {role[n] for n in floats} <= KEPT
    assert all(n in floats or role[n] in ("linear", "conv1d", "expert") for n in role)
    reasons = {e.name: e.why for e in plan(made.model, scheme(to, group)) if e.after is None and len(e.shape) > 1}
    assert {f"{n}.weight" for n in floats} <= reasons.keys()
    assert all(reasons.values())

    computed = logits(made.model)
    again = models.load(out).model
    assert torch.equal(logits(again), computed)
    assert tied(again) == tied(made.model)
    assert {n: held(w) for n, w in weights(again).items()} == {n: held(w) for n, w in weights(made.model).items()}
    if name in ("gpt2", "gpt-oss"):  # GPTQModel, and vLLM, read these
        return
    whole = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if name in WHOLE else {}
    assert torch.equal(logits(theirs(out, name, **whole)), computed)


@pytest.mark.parametrize("name", [n for n in ALL if n not in ("gpt2", "opt", *EXPERTS)])
@pytest.mark.usefixtures("torch_products")
def test_inputs_are_rounded_in_every_architecture(tmp_path, name):
    made, out = made_and_saved(tmp_path, name, "W8A8", None)
    assert {op.input is not None for _, op in ops(made.model) if isinstance(op.weight.stored, Codes)} == {True}
    assert torch.equal(logits(models.load(out).model), logits(made.model))
    assert torch.equal(logits(theirs(out, name)), logits(made.model))


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.usefixtures("torch_products")
def test_experts_whose_inputs_are_rounded(tmp_path, name):
    made, out = made_and_saved(tmp_path, name, "W8A8", None)
    assert torch.equal(logits(models.load(out).model), logits(made.model))


ON_DISK = {
    "mixtral": ("model.layers.1.block_sparse_moe.experts.3.", ("w1", "w3", "w2")),
    "qwen3-moe": ("model.layers.1.mlp.experts.3.", ("gate_proj", "up_proj", "down_proj")),
    "gpt-oss": ("model.layers.1.mlp.experts.3.", ("gate_proj", "up_proj", "down_proj")),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_an_expert_is_a_module_of_its_own_on_disk(tmp_path, name):
    """By the names that the field has for them, of the shapes that vLLM's loaders take."""
    _, out = made_and_saved(tmp_path, name, "W4A16", 32)
    tensors, (prefix, matrices) = load_file(out / "model.safetensors"), ON_DISK[name]
    for matrix in matrices:
        words = tensors[f"{prefix}{matrix}.weight_packed"]
        rows, cols = tensors[f"{prefix}{matrix}.weight_shape"].tolist()
        assert words.shape == (rows, cols // 8)
        assert tensors[f"{prefix}{matrix}.weight_scale"].shape == (rows, cols // 32)
        assert (f"{prefix}{matrix}.bias" in tensors) == (name == "gpt-oss")
    assert not [n for n in tensors if n.endswith(("gate_up_proj", "experts.down_proj"))]
    left = sum(t.numel() for n, t in tensors.items() if ".experts." in n and n.endswith(".weight"))
    assert left == 0  # nothing of them in floats
    kept = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert "lm_head" in kept


def test_groups_that_differ_are_told_by_both_names(tmp_path):
    """A module of Mixtral's has another name in memory than on disk; whoever reads the folder goes by one of them."""
    _, out = made_and_saved(tmp_path, "mixtral", "W4A16", None)
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]
    assert len(groups) == 2  # 128 divides one matrix's inputs, and 64 the others'
    for module in ("model.layers.0.mlp.experts.2.down_proj", "model.layers.0.block_sparse_moe.experts.2.w2"):
        met = [g for g in groups.values() if any(re.match(t.removeprefix("re:"), module) for t in g["targets"])]
        assert [g["weights"]["group_size"] for g in met] == [128]


@pytest.mark.parametrize("name", EXPERTS)
def test_float_experts_beside_codes_stay_fused(tmp_path, name):
    """Where a folder says compressed-tensors, transformers takes separate experts for codes."""
    made = run.load(folder(tmp_path / "m", name))
    rules = [{"match": "@linear", "weight": "int4-g32"}, {"match": ".*"}]
    run.freeze(made, to_scheme(rules), solver("rtn"))
    (tmp_path / "out").mkdir()
    models.save(made.loaded, tmp_path / "out")
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("m", "out"))
    fused = [n for n in after if n.endswith(("gate_up_proj", "experts.down_proj"))]
    assert len(fused) == 4
    if name == "gpt-oss":
        assert all(torch.equal(before[n], after[n]) for n in fused)
    again, first = (weights(models.load(tmp_path / d).model) for d in ("out", "m"))
    assert all(torch.equal(w.base(), again[n].base()) for n, w in first.items() if ".experts." in n)


@pytest.mark.parametrize("name", ALL)
def test_blocks_hold_most_linear_layers(name):
    """What lies outside of all stacks is heads, embeddings and the way in."""
    model = swap(make(name))
    inside = {prefix for stack in models.stacks(model) for prefix, _ in stack}
    outside = [n for n, op in ops(model) if isinstance(op, Linear) and not any(n.startswith(f"{p}.") for p in inside)]
    assert {roles(model)[n] for n in outside} <= {"head", "embedding"}
