"""What will happen to every parameter: all are listed, and the sizes are what comes out."""

import pytest
import torch

from halfbyte import InputError, models, run
from halfbyte.containers.shards import Shards
from halfbyte.layers import swap
from halfbyte.plan import inventory, plan, summary, totals
from halfbyte.scheme import custom, scheme
from miniatures import MINIATURES, folder, make, quantized

SCHEMES = ["W8A16", "W8A8", "W4A16", "W4A16_ASYM", "int3-g32", "int8-tensor", "NF4", "NF4_DQ", "FP8", "q4_0"]
PLAIN = [n for n in MINIATURES if n not in ("mixtral", "qwen3-moe")]


@pytest.mark.parametrize("name", MINIATURES)
def test_every_parameter_is_listed_once(name):
    model = make(name)
    listed = {n: tuple(p.shape) for n, p in model.named_parameters()}
    turned = {f"{n}.weight" for n, m in model.named_modules() if type(m).__name__ == "Conv1D"}
    entries = inventory(swap(model))
    assert len({e.name for e in entries}) == len(entries)
    counted = {e.name: e.shape[::-1] if e.name in turned else e.shape for e in entries if not e.tied_to}
    assert counted == listed
    assert sum(e.parameters for e in entries if not e.tied_to) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_a_tied_weight_stands_under_both_names_and_counts_once(name):
    entries = inventory(swap(make(name)))
    (head,) = [e for e in entries if e.tied_to]
    assert head.name == "lm_head.weight"
    assert head.bytes_before == 0
    assert {e.name: e.bytes_before for e in entries}[head.tied_to] == 128 * 64 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("to", SCHEMES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_planned_bytes_are_those_that_quantizing_gives(tmp_path, name, to, dtype):
    path = folder(tmp_path / "m", name, dtype)
    planned = plan(models.load(path).model, scheme(to))
    after = {e.name: e for e in inventory(quantized(path, to).model)}
    assert {e.name: e.bytes_after for e in planned} == {n: e.bytes_before for n, e in after.items()}
    for e in planned:
        assert after[e.name].before == (e.after.name if e.after else str(dtype).removeprefix("torch."))
        assert after[e.name].input == e.input


@pytest.mark.parametrize("to", [None, "int4-g32", "uint4-g32", "W8A8", "NF4"])
def test_the_planned_bytes_are_those_on_disk(tmp_path, to):
    path = folder(tmp_path / "m", "llama-untied", torch.bfloat16)
    made = run.load(path) if to is None else quantized(path, to)
    (tmp_path / "out").mkdir()
    models.save(made.loaded, tmp_path / "out")
    shards = Shards.of_folder(tmp_path / "out")
    besides = ("weight_shape", "quant_map", "bitsandbytes__nf4")  # what the layout adds to describe itself
    stored = sum(shards.get(n).nbytes for n in shards if not n.endswith(besides))
    zeros = sum(shards.get(n).nbytes for n in shards if n.endswith("weight_zero_point"))
    _, held, _ = totals(inventory(made.model))
    assert held - (zeros if to == "uint4-g32" else 0) == stored  # a byte in memory, 4 bits on disk


@pytest.mark.parametrize("name", PLAIN)
def test_kept_parameters_say_why(name):
    entries = plan(swap(make(name)), scheme("W4A16"))
    assert all(e.why for e in entries if e.after is None)
    assert any(e.after for e in entries)
    assert all((e.after is not None) == (e.role in ("linear", "conv1d")) for e in entries)


def test_embeddings_of_a_class_of_their_own_are_embeddings():
    """OPT's positions: no op stands for them, so that they can be kept but not quantized."""
    model = swap(make("opt"))
    (positions,) = [e for e in plan(model, scheme("W4A16")) if "embed_positions" in e.name]
    assert (positions.role, positions.after) == ("embedding", None)
    with pytest.raises(InputError, match="embed_positions"):
        plan(model, custom([{"match": ".*", "weight": "int8-channel"}]))


def test_smaller_groups_are_said():
    entries = plan(swap(make("llama")), scheme("W4A16"))
    by_name = {e.name: (e.after.name, e.why) for e in entries if e.after}
    assert by_name["model.layers.0.mlp.down_proj.weight"] == ("int4-g128", "")
    assert by_name["model.layers.0.mlp.up_proj.weight"] == ("int4-g64", "groups of 64: 128 does not divide 64")


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_fused_experts_are_never_left_out_in_silence(name):
    model = swap(make(name))
    with pytest.raises(InputError, match=r"experts\.(gate_up|down)_proj"):
        plan(model, scheme("W4A16"))
    rules = [{"match": r".*\.(experts\..*|gate\.weight|gate)"}, {"match": "@embedding"}, {"match": "@head"},
             {"match": "@linear", "weight": "int4-g32"}]  # fmt: skip
    entries = plan(model, custom(rules))
    assert {e.name for e in entries if e.after is None and len(e.shape) > 2}
    assert all("self_attn" in e.name for e in entries if e.after)


def test_a_plan_needs_no_weights(tmp_path):
    path = folder(tmp_path / "m")
    bare, full = (plan(models.load(path, weights=w).model, scheme("W4A16")) for w in (False, True))
    assert [(e.name, e.after, e.bytes_after) for e in bare] == [(e.name, e.after, e.bytes_after) for e in full]


@pytest.mark.parametrize("to", ["int4-g32", "NF4", "W8A8"])
def test_a_quantized_folder_is_listed_by_its_formats_without_reading_weights(tmp_path, to):
    made = quantized(folder(tmp_path / "m"), to)
    (tmp_path / "out").mkdir()
    models.save(made.loaded, tmp_path / "out")
    bare = inventory(models.load(tmp_path / "out", weights=False).model)
    assert [(e.name, e.before, e.bytes_before) for e in bare] == [
        (e.name, e.before, e.bytes_before) for e in inventory(made.model)
    ]


def test_totals_and_summary_count_everything_once():
    entries = plan(swap(make("llama")), scheme("W4A16"))
    parameters, before, after = totals(entries)
    assert parameters == sum(p.numel() for p in make("llama").parameters())
    assert before == 4 * parameters
    rows = summary(entries)
    assert sum(r[1] for r in rows) == len([e for e in entries if not e.tied_to])
    assert (sum(r[3] for r in rows), sum(r[4] for r in rows)) == (before, after)


def test_a_codes_only_plan_changes_nothing(tmp_path):
    model = quantized(folder(tmp_path / "m"), "int4-g32").model
    entries = plan(model, custom([{"match": ".*"}]))
    assert all(e.bytes_before == e.bytes_after and e.after is None for e in entries)
