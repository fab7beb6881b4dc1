"""Transforms as steps of a run and as flags: what they gain where inputs stand out, what is noted, what is refused."""

import json

import pytest
import torch

from halfbyte import InputError, data, observe, run
from halfbyte.layers import ops
from halfbyte.models import edges
from halfbyte.recipe import parse_recipe
from halfbyte.steps import Adapt, Freeze, Grid, Transform
from miniatures import folder, logits, tokenizer

TEXT = [{"text": f"some words, number {i}, and a few more of them"} for i in range(4)]
READERS = ("input_layernorm", "post_attention_layernorm")


@pytest.fixture
def outliers(tmp_path):
    """A miniature some of whose channels are far larger than the others wherever layers are fed."""
    path = folder(tmp_path / "outliers", "llama-untied", words=True)
    made = run.load(path)
    with torch.no_grad():
        for layer in made.model.model.layers:
            for name in READERS:
                getattr(layer, name).weight[::16] *= 30
            for op, n in ((layer.mlp.up_proj, 128), (layer.self_attn.v_proj, 32)):
                op.weight.stored[:n:16] *= 30
    made.write(path, "outliers")
    return path


def off(path, scheme, *steps, **settings):
    """How far the outputs of blocks are from the float model's, once quantized; relative."""
    floats, made = run.load(path), run.load(path)
    for step in steps:
        step(made)
    Freeze(scheme=scheme, **settings)(made)
    before, after = (m.model(torch.arange(3, 67).reshape(2, 32)).logits.detach() for m in (floats, made))
    return ((after - before).square().mean() / before.square().mean()).item()


@pytest.mark.parametrize(
    ("by", "scheme"),
    [
        ("awq", "int4-g32"),
        ("awq", "int3-g32"),
        ("smooth", "W8A8"),
        *((by, "W8A8_STATIC") for by in ("smooth", "hadamard")),
    ],
)
def test_where_inputs_stand_out_less_is_lost(outliers, by, scheme):
    text = {} if by == "hadamard" else {"scheme": scheme, "calibration": TEXT}
    freeze = {"calibration": TEXT, "inputs": "minmax"} if scheme == "W8A8_STATIC" else {}
    plain = off(outliers, scheme, **freeze)
    assert off(outliers, scheme, Transform(name=by, **text), **freeze) < 0.6 * plain


def test_what_layers_are_fed_is_their_largest_and_a_sample(outliers):
    made = run.load(outliers)
    rows = data.encode(data.records(TEXT), tokenizer(), 16)
    batches = [next(data.batches(rows, 1, seed=i, pad_token_id=0)) for i in range(3)]
    names = [e.readers[0] for block in edges(made.model).blocks for e in block]
    seen = {n: [] for n in names}
    handles = [
        op.register_forward_pre_hook(lambda m, args, n=n: seen[n].append(args[0].reshape(-1, m.in_features)))
        for n, op in ops(made.model) if n in names
    ]  # fmt: skip
    found = observe.fed(made.model, names, batches)
    for h in handles:
        h.remove()
    assert set(found) == set(names)
    for n, f in found.items():
        x = torch.cat(seen[n])
        assert torch.equal(f.largest, x.abs().amax(0))
        assert len(f.rows) == len(x)  # fewer than would be kept
        assert torch.equal(f.rows.sort(0).values, x.sort(0).values)
    assert not any(m._forward_pre_hooks for m in made.model.modules())
    with torch.no_grad():
        made.model.model.layers[1].mlp.up_proj.weight.stored[3] = torch.inf
    with pytest.raises(InputError, match=r"layers.1.mlp.down_proj.*NaN or infinity"):
        observe.fed(made.model, names, batches)


def test_a_rotation_leaves_no_channel_standing_out_in_the_stream_or_in_a_head(outliers):
    rows = data.encode(data.records(TEXT), tokenizer(), 16)
    batches = [next(data.batches(rows, 1, seed=i, pad_token_id=0)) for i in range(3)]
    spread = {}
    for turned in (False, True):
        made = run.load(outliers)
        if turned:
            Transform(name="hadamard")(made)
        names = [e.readers[0] for e in edges(made.model).blocks[1]][:3]  # the norms' and attention's
        spread[turned] = [
            f.largest.max() / f.largest.median() for f in observe.fed(made.model, names, batches).values()
        ]
    assert all(after < 4 < before for before, after in zip(spread[False], spread[True], strict=True))


def test_a_recipe_transforms_in_order_and_notes_it(tmp_path):
    base = folder(tmp_path / "base", words=True)
    steps = [
        {"transform": {"name": "hadamard", "untie": True, "seed": 3}},
        {"transform": {"name": "smooth", "scheme": "W8A8", "calibration": TEXT, "samples": 2}},
        {"freeze": {"scheme": "W8A8"}},
    ]
    parse_recipe({"model": str(base), "output": str(tmp_path / "out"), "steps": steps}).run()
    first, second = json.loads((tmp_path / "out" / "halfbyte.json").read_text())["transforms"]
    made = run.load(base).model.lm_head.weight
    assert first == {"name": "hadamard", "added_bytes": 4 * made.shape.numel(), "width": 64}
    assert second["name"] == "smooth"
    assert second["scaled"] > 0
    assert 0 <= second["alpha"] < 1
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_codes_are_dequantized_first(tmp_path):
    base = folder(tmp_path / "base", "llama-untied")
    made = run.load(base)
    Freeze(scheme="W8A16", group_size=32)(made)
    before = logits(made.model)
    Transform(name="hadamard")(made)
    assert made.notes["dequantized"] == ["int8-g32"]
    assert (logits(made.model) - before).abs().max() < 2e-5


def test_weights_that_are_on_disk_are_not_read_again_over_the_changed_ones(tmp_path):
    base = folder(tmp_path / "base", "llama-untied")
    made = run.load(base, weights=False)
    Transform(name="hadamard")(made)
    Freeze(scheme="W8A16", group_size=32, work=tmp_path / "work")(made)
    assert (logits(made.model) - logits(run.load(base).model)).abs().max() < 0.02


def test_what_cannot_be_done_is_refused_when_the_step_is_made_or_before_weights_are_read(tmp_path):
    with pytest.raises(InputError, match=r"awk.*awq, smooth, hadamard"):
        Transform(name="awk")
    for name in ("awq", "smooth"):
        with pytest.raises(InputError, match="scheme"):
            Transform(name=name)
        with pytest.raises(InputError, match="needs text"):
            Transform(name=name, scheme="W4A16", calibration="none")
    with pytest.raises(InputError, match="no scheme"):
        Transform(name="awq", scheme="W4A17")
    folder(tmp_path / "tied")
    with pytest.raises(InputError, match="--untie"):
        Transform(name="hadamard").check(run.load(tmp_path / "tied", weights=False))
    folder(tmp_path / "gemma", "gemma3")
    with pytest.raises(InputError, match="norms"):
        Transform(name="hadamard", untie=True).check(run.load(tmp_path / "gemma", weights=False))
    for step in (Adapt(r=2), Grid(scheme="W4A16")):
        made = run.load(tmp_path / "tied")
        step(made)
        with pytest.raises(InputError, match="merge"):
            Transform(name="hadamard", untie=True)(made)
