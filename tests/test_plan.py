"""What will happen to every parameter: all are listed, and the sizes are what comes out."""

import pytest
import torch
from torch import nn

from halfbyte import InputError, models, run
from halfbyte.containers.shards import Shards
from halfbyte.layers import swap
from halfbyte.models.names import Names
from halfbyte.plan import inventory, plan, summary, totals
from halfbyte.scheme import SCHEMES as PRESETS
from halfbyte.scheme import custom, scheme
from miniatures import EXPERTS, MINIATURES, OTHERS, folder, make, quantized

SCHEMES = ["W8A16", "W8A8", "W4A16", "W4A16_ASYM", "int3-g32", "int8-tensor", "NF4", "NF4_DQ", "FP8", "q4_0"]
ALL = [*MINIATURES, *OTHERS]


@pytest.mark.parametrize("name", [n for n in ALL if n not in (*EXPERTS, "whisper", "vit")])
def test_every_parameter_is_listed_once(name):
    model = make(name)
    listed = {n: tuple(p.shape) for n, p in model.named_parameters()}
    turned = {f"{n}.weight" for n, m in model.named_modules() if type(m).__name__ == "Conv1D"}
    entries = inventory(swap(model))
    assert len({e.name for e in entries}) == len(entries)
    counted = {e.name: e.shape[::-1] if e.name in turned else e.shape for e in entries if not e.tied_to}
    assert counted == listed
    assert sum(e.parameters for e in entries if not e.tied_to) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", [*EXPERTS, "whisper", "vit"])
def test_what_was_fused_or_has_more_dimensions_is_listed_too(name):
    model = make(name)
    listed = {n: p.numel() for n, p in model.named_parameters()}
    entries, names = inventory(swap(model)), Names(model)
    counted: dict[str, int] = {}
    for e in entries:
        of = names.fused(e.name)
        if not e.tied_to:
            counted[of[0] if of else e.name] = counted.get(of[0] if of else e.name, 0) + e.parameters
    assert counted == listed


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


@pytest.mark.parametrize("to", PRESETS)
@pytest.mark.parametrize("name", ALL)
def test_kept_parameters_say_why(name, to):
    entries = plan(swap(make(name)), scheme(to))
    assert all(e.why for e in entries if e.after is None)
    assert any(e.after for e in entries)
    assert all((e.after is not None) == (e.role in ("linear", "conv1d", "expert")) for e in entries)
    matrices = [e for e in entries if e.after is None and len(e.shape) > 1]
    assert {e.role for e in matrices} <= {"embedding", "head", "router", "position", "convolution"}


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


def test_the_size_of_groups_that_is_named_divides_all(tmp_path):
    module = nn.Sequential(nn.Linear(48, 100), nn.Linear(100, 8))
    swap(module)
    with pytest.raises(InputError, match=r"does not divide its 48 inputs; choose --group-size 4 or"):
        plan(module, scheme("W4A16"))
    assert all(e.after is None or e.after.group == 4 for e in plan(module, scheme("W4A16", group_size=4)))


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_quantized_or_named(name):
    model = swap(make(name))
    entries = plan(model, scheme("W4A16"))
    experts = [e for e in entries if ".experts." in e.name and len(e.shape) > 1]
    assert len(experts) == 2 * 4 * 3
    assert all(e.after for e in experts)
    kept = [{"match": "@embedding"}, {"match": "@head"}, {"match": "@router"}]
    rules = [*kept, {"match": "@linear", "weight": "int8-channel"}]
    with pytest.raises(InputError, match=r"experts\.0\.gate_proj \(expert\)"):
        plan(model, custom(rules))
    own = plan(model, custom([*rules, {"match": "@expert", "weight": "int4-g32"}]))
    assert {e.after.name for e in own if e.role == "expert" and e.after} == {"int4-g32"}
    assert {e.after.name for e in own if e.role == "linear" and e.after} == {"int8-channel"}


class Bilinear(nn.Module):
    """A matrix that no op stands for."""

    def __init__(self) -> None:
        super().__init__()
        self.form, self.out = nn.Bilinear(8, 8, 4), nn.Linear(32, 4)


def test_matrices_of_layers_that_are_no_ops_are_never_left_out_in_silence():
    model = swap(Bilinear())
    with pytest.raises(InputError, match=r"form\.weight"):
        plan(model, scheme("W8A16"))
    several = nn.ModuleDict({n: nn.ModuleList([Bilinear() for _ in range(3)]) for n in "abcd"})
    with pytest.raises(InputError, match=r"a\.\*\.form.*, b\.\*\.form.*, c\.\*\.form.*, d\.\*\.form"):  # every kind
        plan(swap(several), scheme("W8A16"))
    (kept,) = [e for e in plan(model, custom([{"match": "form.*"}, {"match": ".*", "weight": "int8-channel"}]))
               if e.name == "form.weight"]  # fmt: skip
    assert kept.after is None


def test_inputs_of_a_convolution_stay_as_they_are():
    rules = [{"match": "@convolution", "weight": "int8-channel", "input": "int8-token"}, {"match": ".*"}]
    (filters,) = [e for e in plan(swap(make("vit")), custom(rules)) if e.role == "convolution"]
    assert (str(filters.after), filters.input) == ("int8-channel", None)


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
