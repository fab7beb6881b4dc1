"""The driver: which weights go to which solver, in which order, and what does not need one."""

import pytest
import torch

from halfbyte import InputError, calibrate, data, kernels, models, run
from halfbyte.formats import parse
from halfbyte.kernels import half
from halfbyte.layers import Codes, ops
from halfbyte.models import roles
from halfbyte.solvers import Solver, gptq, rtn, solver
from halfbyte.solvers.form import Form
from miniatures import folder, logits, tokenizer

INT4 = parse("int4-g32")


@pytest.fixture(autouse=True)
def _float32(monkeypatch):
    """What blocks compute is compared to the last digit here."""
    monkeypatch.setattr(half, "fast", lambda: False)


def batches(n: int = 2):
    rows = data.encode(data.records([{"text": f"some words, number {i}, and more"} for i in range(n)]), tokenizer(), 12)
    return [next(data.batches(rows, 1, seed=i, pad_token_id=0)) for i in range(n)]


def chosen(model, *kinds):
    return {n: INT4 for n, role in roles(model).items() if role in kinds}


def coded(model):
    return {n for n, op in ops(model) if isinstance(op.weight.stored, Codes)}


@pytest.mark.parametrize("name", ["llama", "llama-untied", "gpt2", "neox", "gemma3"])
def test_round_to_nearest_needs_no_data_and_rounds_each_weight_by_itself(tmp_path, name):
    model = models.load(folder(tmp_path / "m", name)).model
    wanted = chosen(model, "linear", "conv1d")
    before = {n: op.weight.value().clone() for n, op in ops(model)}
    calibrate.freeze(model, wanted, solver("rtn"))
    assert coded(model) == set(wanted)
    for n, op in ops(model):
        expected = kernels.quantize(before[n], INT4).dequantize() if n in wanted else before[n]
        assert torch.equal(op.weight.value(), expected)


def test_progress_is_told_by_block(tmp_path):
    model = models.load(folder(tmp_path / "m", "llama-untied")).model
    seen = []
    calibrate.freeze(model, chosen(model, "linear", "head"), solver("rtn"), on_block=lambda i, n: seen.append((i, n)))
    assert seen == [(1, 3), (2, 3), (3, 3)]  # two blocks, and what lies outside


def test_a_solver_that_needs_data_is_not_run_without(tmp_path):
    model = models.load(folder(tmp_path / "m")).model
    needy = Solver("needy", lambda *_: {}, True, "")
    for nothing in (None, []):
        with pytest.raises(InputError, match="--calibration"):
            calibrate.freeze(model, chosen(model, "linear"), needy, nothing)
    assert not coded(model)


@pytest.mark.parametrize("name", ["llama-untied", "gpt2", "neox", "opt", "gemma3", "qwen2"])
def test_each_block_is_solved_on_what_the_quantized_ones_before_it_give(tmp_path, name):
    model = models.load(folder(tmp_path / "m", name)).model
    calls = []

    def solve(block, inputs, targets, sites):
        calls.append((inputs, targets, list(sites)))
        return solver("rtn").solve(block, inputs, targets, sites)

    wanted = chosen(model, "linear", "conv1d")
    float_outputs, targets = hidden(model, 0), hidden(model, 1)
    calibrate.freeze(model, wanted, Solver("watch", solve, True, ""), batches())
    assert [n for _, _, names in calls for n in names] == list(wanted)
    assert len(calls) == 2
    assert [t.shape for t in calls[0][1]] == [call.x.shape for call in calls[1][0]]
    quantized_outputs = hidden(model, 0)
    for call, target, after in zip(calls[1][0], calls[0][1], quantized_outputs, strict=True):
        assert torch.equal(call.x, after)
        assert not torch.equal(call.x, target)
    for target, before in zip(calls[0][1] + calls[1][1], float_outputs + targets, strict=True):
        assert torch.equal(target, before)  # those of the float model, all blocks before it float too


def hidden(model, block: int):
    """What a block gives on the batches, in a plain forward."""
    out = []
    module = models.blocks(model)[block][1]
    handle = module.register_forward_hook(lambda m, args, y: out.append(y[0] if isinstance(y, tuple) else y))
    with torch.inference_mode():
        for b in batches():
            model(**b.inputs)
    handle.remove()
    return out


def test_weights_outside_the_blocks_are_solved_for_what_the_quantized_blocks_feed_them(tmp_path):
    model = models.load(folder(tmp_path / "m", "llama-untied")).model
    head = model.lm_head.weight.value().clone()
    asked = []

    def solve(block, inputs, targets, sites):
        asked.extend(sites)
        return solver("rtn").solve(block, inputs, targets, sites)

    calibrate.freeze(model, chosen(model, "linear", "head"), Solver("watch", solve, True, ""), batches())
    assert "lm_head" not in asked
    x = fed(model, "lm_head")  # by the quantized blocks
    expected = gptq.quantize(head, INT4, Form.of(x.T @ x / len(x))).dequantize()
    found = model.lm_head.weight.value()
    # sums in another order choose between scales that are as good
    assert ((found - expected).abs() > 1e-5).float().mean() < 0.02
    plain = rtn.quantize(head, INT4).dequantize()
    lost, expects, rounded = (((w - head) @ x.T).square().sum().item() for w in (found, expected, plain))
    assert lost == pytest.approx(expects, rel=0.01)
    assert lost < 0.8 * rounded


def fed(model, name):
    """(tokens, in): what an op is fed by the model as it is."""
    seen = []
    op = dict(ops(model))[name]
    handle = op.register_forward_pre_hook(lambda m, args: seen.append(args[0].reshape(-1, op.in_features)))
    with torch.inference_mode():
        for b in batches():
            model(**b.inputs)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "gemma3"])
@pytest.mark.parametrize("uses", ["squares", "gram"])
def test_a_solver_is_told_the_moments_of_the_inputs(tmp_path, name, uses):
    model = models.load(folder(tmp_path / "m", name)).model
    wanted = chosen(model, "linear", "conv1d")
    inputs = {n: fed(model, n) for n in wanted}
    told = {}

    def solve(block, _, targets, sites):
        assert not any(s.closes for s in sites.values())  # those in turn do
        told.update({n: s.moments for n, s in sites.items()})
        return {}  # nothing is quantized, so that every block is fed what the float model gives

    calibrate.freeze(model, wanted, Solver("watch", solve, True, "", uses), batches())
    assert set(told) == set(wanted)
    for n, x in ((n, inputs[n]) for n in told):
        torch.testing.assert_close(told[n].squares, x.square().mean(0), rtol=1e-4, atol=1e-6)
        if uses == "gram":
            torch.testing.assert_close(told[n].gram, x.T @ x / len(x), rtol=1e-3, atol=1e-5)
        else:
            assert told[n].gram is None


def test_rounding_takes_an_importance_from_text_or_from_a_table_and_does_without(tmp_path):
    wanted = chosen(models.load(folder(tmp_path / "m", "llama")).model, "linear")
    found = {}
    for how in ("nothing", "text", "table"):
        model = models.load(tmp_path / "m").model
        floats = {n: op.weight.value().clone() for n, op in ops(model)}
        squares = {n: fed(model, n).square().mean(0) for n in wanted}
        calibrate.freeze(
            model, wanted, solver("rtn"), batches() if how == "text" else None,
            squares=squares if how == "table" else None,
        )  # fmt: skip
        found[how] = {n: op.weight.value() for n, op in ops(model) if n in wanted}
        for n in wanted:
            error = (found[how][n] - floats[n]) * squares[n].sqrt()
            found[how, n] = error.square().sum()
    for n in wanted:
        torch.testing.assert_close(found["text"][n], found["table"][n])
        assert found["text", n] < found["nothing", n]


def test_a_tied_head_is_weighed_by_what_the_head_is_fed(tmp_path):
    model = models.load(folder(tmp_path / "m", "llama")).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    value, x = model.lm_head.weight.value().clone(), fed(model, "lm_head")
    calibrate.freeze(model, {"model.embed_tokens": INT4}, solver("rtn"), batches())
    expected = rtn.quantize(value, INT4, x.square().mean(0)).dequantize()
    torch.testing.assert_close(model.lm_head.weight.value(), expected)


def test_gptq_runs_on_a_whole_model_and_is_nearer_than_rounding(tmp_path):
    errors = {}
    folder(tmp_path / "m", "llama-untied")
    for name in ("rtn", "gptq"):
        model = models.load(tmp_path / "m").model
        before = fed(model, "lm_head")
        calibrate.freeze(model, chosen(model, "linear"), solver(name), batches())
        errors[name] = (fed(model, "lm_head") - before).square().mean()
    assert errors["gptq"] < 0.5 * errors["rtn"]


@pytest.mark.parametrize("by", ["gptq", "autoround"])
def test_codes_are_solved_for_anew(tmp_path, by):
    """As those of a folder or file that is quantized already."""
    model = models.load(folder(tmp_path / "m")).model
    wanted = chosen(model, "linear")
    calibrate.freeze(model, dict.fromkeys(wanted, parse("int8-channel")), solver("rtn"))
    calibrate.freeze(model, wanted, solver(by), batches())
    assert all(op.weight.format == INT4 for n, op in ops(model) if n in wanted)
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama"])
def test_a_model_in_float16_is_solved_for(tmp_path, monkeypatch, name):
    monkeypatch.setattr(half, "fast", lambda: True)
    model = models.load(folder(tmp_path / "m", name, torch.float16)).model
    wanted = chosen(model, "linear", "conv1d")
    calibrate.freeze(model, wanted, solver("gptq"), batches())
    assert coded(model) == set(wanted)


@pytest.mark.parametrize("by", ["rtn", "gptq", "autoround"])
def test_a_block_that_overflows_is_named(tmp_path, by):
    model = models.load(folder(tmp_path / "m")).model
    up = dict(ops(model))["model.layers.1.mlp.up_proj"].weight
    up.store(up.base().detach() * 1e38 * 1e3)
    up.store(torch.where(up.base().isinf(), 3e38, up.base().detach()))
    wanted = {n: parse("int4-g32") for n, role in roles(model).items() if role == "linear"}
    with pytest.raises(InputError, match=r"model\.layers\.1.*NaN or infinity"):
        calibrate.freeze(model, wanted, solver(by), batches())


def test_norms_that_hold_infinity_are_named(tmp_path):
    model = models.load(folder(tmp_path / "m")).model
    model.model.layers[1].input_layernorm.weight.data[3] = float("inf")
    with pytest.raises(InputError, match=r"model.layers.1.input_layernorm.weight holds NaN or infinity"):
        calibrate.freeze(model, chosen(model, "linear"), solver("rtn"))
    assert not coded(model)


def test_an_unknown_solver_is_refused_by_name():
    with pytest.raises(InputError, match=r"rntt.*rtn"):
        solver("rntt")


def test_calibrating_leaves_no_hooks_and_no_gradients(tmp_path):
    made = run.load(folder(tmp_path / "m"))
    before = logits(made.model)
    calibrate.freeze(made.model, {}, Solver("watch", lambda *_: {}, True, ""), batches())
    assert torch.equal(logits(made.model), before)
    assert not any(m._forward_pre_hooks for m in made.model.modules())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_targets_are_those_of_a_model_whose_inputs_are_not_rounded(tmp_path, name):
    model = models.load(folder(tmp_path / "m", name)).model
    seen = []

    def solve(block, inputs, targets, sites):
        seen.append(([call(block) for call in inputs], targets))
        return solver("rtn").solve(block, inputs, targets, sites)

    wanted = chosen(model, "linear", "conv1d")
    exact = hidden(model, 0), hidden(model, 1)
    by_name = dict(ops(model))
    for n in wanted:
        by_name[n].input = parse("int4-token")
    calibrate.freeze(model, wanted, Solver("watch", solve, True, ""), batches())
    for (outputs, targets), floats in zip(seen, exact, strict=True):
        for output, target, given in zip(outputs, targets, floats, strict=True):
            assert torch.equal(target, given)
            assert not torch.equal(output, target)
    assert all(by_name[n].input == parse("int4-token") for n in wanted)
