"""Static inputs: which scales calibration finds, and that a model keeps them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from halfbyte import InputError, data, export, kernels, models, observe, run
from halfbyte.containers.shards import Shards
from halfbyte.formats import parse
from halfbyte.kinds import KINDS
from halfbyte.layers import Linear, ops
from halfbyte.model import load
from halfbyte.observe import Seen
from halfbyte.scheme import scheme
from halfbyte.solvers import solver
from halfbyte.steps import Adapt, Freeze, Grid
from miniatures import calibrated, folder, logits, tokenizer

TEXT = [{"text": f"some words, number {i}, and more"} for i in range(4)]
FORMATS = ["int8-tensor", "uint8-tensor", "fp8-e4m3-tensor"]
HOWS = ["minmax", "percentile-99.9", "mse"]


def batches():
    rows = data.encode(data.records(TEXT), tokenizer(), 12)
    return [next(data.batches(rows, 1, seed=i, pad_token_id=0)) for i in range(4)]


def seen(*parts: torch.Tensor) -> Seen:
    out = Seen("x")
    for part in parts:
        out.add(part)
    return out


def error(x: torch.Tensor, f: str, how: str) -> float:
    return float((kernels.fake(x, f, seen(x).qparams(parse(f), how)) - x).square().mean())


@pytest.mark.parametrize("f", FORMATS)
def test_minmax_is_the_range_of_all_that_was_seen(f):
    parts = [torch.randn(3, 7, 64) * k - 1 for k in (1, 100, 1e-3)]
    found, wanted = seen(*parts).qparams(parse(f), "minmax"), kernels.qparams(torch.cat(parts), f, "absmax")
    assert torch.equal(found.scale, wanted.scale)
    assert found.scale.shape == (1,)
    assert wanted.zero is None or torch.equal(found.zero, wanted.zero)


def test_a_percentile_is_that_of_the_magnitudes_to_a_bin():
    x = torch.randn(100_000) * torch.logspace(-3, 0, 100_000)
    for percent in (50, 99, 99.9, 99.99, 100):
        edge = float(x.abs().kthvalue(round(x.numel() * percent / 100)).values)
        found = float(seen(*x.split(7777)).qparams(parse("int8-tensor"), f"percentile-{percent}").scale) * 127.5
        assert edge * (1 - 1e-6) <= found <= edge + float(x.abs().max()) / 4096


@pytest.mark.parametrize("f", ["int8-tensor", "uint8-tensor", "int4-tensor"])
def test_mse_clips_outliers_and_is_never_worse_than_the_range(f):
    x = torch.randn(50_000)
    plain, range_ = error(x, f, "mse"), error(x, f, "minmax")
    assert plain <= range_ * 1.001
    x[7] = 30
    assert error(x, f, "mse") < 0.95 * error(x, f, "minmax")
    assert error(x[x < 30], f, "mse") <= error(x[x < 30], f, "percentile-99.9") * 1.001


def test_a_histogram_counts_every_value_whatever_their_order():
    parts = [torch.randn(999) * k for k in (1e-30, 1e-4, 1, 3e5)]
    up, down = seen(*parts), seen(*parts[::-1])
    assert up.edge == down.edge == 2.0 ** math.ceil(math.log2(up.largest))
    assert int(up.counts.sum()) == int(down.counts.sum()) == 4 * 999
    wide = parts[3]
    bins = torch.histc(wide, observe.BINS, -up.edge, up.edge).long()
    bins[observe.BINS // 2 - 1 : observe.BINS // 2 + 1] = 0  # where all the small ones are
    rest = up.counts.clone()
    rest[observe.BINS // 2 - 1 : observe.BINS // 2 + 1] = 0
    assert torch.equal(rest, bins)


@pytest.mark.parametrize("how", HOWS)
def test_zeros_alone_have_a_scale(how):
    assert seen(torch.zeros(4, 8)).qparams(parse("int8-tensor"), how).scale == 1


@pytest.mark.parametrize("how", ["", "mean", "percentile", "percentile-0", "percentile-101", "percentile-x"])
def test_other_ways_are_refused_by_name(how):
    with pytest.raises(InputError, match=r"is no way to find scales of inputs; .*percentile-99\.99"):
        Freeze(scheme="W8A8_STATIC", calibration=TEXT, inputs=how)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused_by_the_ops_name(bad):
    with pytest.raises(InputError, match=r"inputs of x hold NaN or infinity"):
        seen(torch.ones(3), torch.tensor([1.0, bad]))


def test_an_op_that_is_never_reached_is_refused_by_name(tmp_path):
    model = models.load(folder(tmp_path / "m")).model
    model.other = Linear(model.lm_head.weight)
    with pytest.raises(InputError, match="never reaches other"):
        observe.observe(model, {"other": parse("int8-tensor")}, batches())


@pytest.mark.parametrize("how", HOWS)
def test_a_models_inputs_are_those_that_a_plain_forward_has(tmp_path, how):
    """Also where it rounded them before: each is seen as the model without static inputs has it."""
    model = models.load(folder(tmp_path / "m", "llama-untied", torch.bfloat16)).model
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"]
    by_name, fed = dict(ops(model)), {n: [] for n in names}
    handles = [by_name[n].register_forward_pre_hook(lambda m, args, n=n: fed[n].append(args[0])) for n in names]
    with torch.no_grad():
        for b in batches():
            model(**b.inputs)
    for h in handles:
        h.remove()
    f = parse("uint8-tensor")
    for _ in range(2):
        observe.observe(model, dict.fromkeys(names, f), batches(), how)
        for n in names:
            wanted = seen(*fed[n]).qparams(f, how)
            assert by_name[n].input == f
            assert by_name[n].input_scale.dtype == torch.bfloat16
            assert torch.equal(by_name[n].input_scale, wanted.scale.bfloat16())
            assert torch.equal(by_name[n].input_qparams.zero, wanted.zero)
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert by_name["model.layers.0.self_attn.k_proj"].input is None


# ---- whole methods


@pytest.mark.parametrize("how", ["minmax", "mse"])
def test_quantize_save_and_read(tmp_path, how):
    base = folder(tmp_path / "m", "llama-untied", words=True)
    made = calibrated(base, inputs=how)
    assert made.notes["input_search"] == how
    static = {n for n, op in ops(made.model) if getattr(op, "input", None)}
    assert len(static) == 14
    out = tmp_path / "out"
    out.mkdir()
    made.write(out, "out")
    again = run.load(out)
    assert torch.equal(logits(again.model), logits(made.model))
    full, by_token = logits(run.load(base).model), logits(load(base).quantize("W8A8").model)
    assert not torch.equal(logits(made.model), by_token)
    assert (logits(made.model) - full).norm() < 0.03 * full.norm()


def test_codes_that_are_there_stay_and_get_scales(tmp_path):
    """From W8A8 to W8A8_STATIC, and anew on other text."""
    base = folder(tmp_path / "m", "llama-untied", words=True)
    first = load(base).quantize("W8A8").save(tmp_path / "w8a8")
    made, before = calibrated(first), run.load(first)
    for (name, op), (_, other) in zip(ops(made.model), ops(before.model), strict=True):
        if isinstance(op, Linear) and name != "lm_head":
            assert torch.equal(op.weight.frozen().codes, other.weight.frozen().codes)
            assert (str(op.input), str(other.input)) == ("int8-tensor", "int8-token")
            assert op.input_qparams is not None
    scale = made.model.model.layers[0].mlp.down_proj.input_scale.clone()
    Freeze(scheme="W8A8_STATIC", calibration=TEXT[:1])(made)
    assert not torch.equal(made.model.model.layers[0].mlp.down_proj.input_scale, scale)


def test_exporting_a_folder_with_static_inputs(tmp_path):
    """Scales go with the codes, or both go."""
    base = folder(tmp_path / "m", "llama-untied", words=True)
    (tmp_path / "static").mkdir()
    made = calibrated(base)
    made.write(tmp_path / "static", "static")
    for to, format in (("compressed-tensors", None), ("compressed-tensors", "W8A8_STATIC"), ("hf", "F32")):
        kind, out = KINDS[to], tmp_path / f"{to}-{format}"
        export.export(
            tmp_path / "static", export.job(export.read(tmp_path / "static"), kind, format, True), kind, out, None
        )
        held = Shards.of_folder(out)
        assert sum(n.endswith("input_scale") for n in held) == (14 if to == "compressed-tensors" else 0)
        again = run.load(out)
        if to == "compressed-tensors":
            assert torch.equal(logits(again.model), logits(made.model))


def test_training_an_adapter_on_a_folder_with_static_inputs(tmp_path):
    base = folder(tmp_path / "m", "llama-untied", words=True)
    (tmp_path / "static").mkdir()
    calibrated(base).write(tmp_path / "static", "static")
    made = load(tmp_path / "static").train(TEXT, method="qlora", steps=2, batch_size=2, max_length=24)
    made.save(tmp_path / "adapter")
    again = run.load(tmp_path / "adapter")
    assert again.model.model.layers[0].mlp.down_proj.input == parse("int8-tensor")
    assert torch.equal(logits(again.model), logits(made.model))


def test_without_text_it_is_refused_before_the_work(tmp_path):
    with pytest.raises(InputError, match=r"W8A8_STATIC rounds inputs .*needs --calibration FILE"):
        Freeze(scheme="W8A8_STATIC", calibration="none")
    made = run.load(folder(tmp_path / "m", words=True))
    with pytest.raises(InputError, match="needs --calibration FILE"):
        run.freeze(made, scheme("W8A8_STATIC"), solver("rtn"))
    assert isinstance(made.model.model.layers[0].mlp.down_proj.weight.stored, nn.Parameter)


def test_training_through_it_is_refused_when_the_step_is_made():
    with pytest.raises(InputError, match=r"train through a scheme that rounds by token, such as W8A8"):
        Grid(scheme="W8A8_STATIC")


def test_an_adapter_whose_base_would_lose_its_scales_is_refused(tmp_path):
    made = calibrated(folder(tmp_path / "m", words=True))
    with pytest.raises(InputError, match="save the quantized model first"):
        Adapt()(made)
