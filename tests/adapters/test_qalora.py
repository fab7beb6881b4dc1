"""QA-LoRA: what it computes, and that zero points take it in while codes and scales stay."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from halfbyte import FORMATS, InputError, kernels, run
from halfbyte.adapters import attach, attached, lora
from halfbyte.adapters.qalora import QaLora, group_size
from halfbyte.layers import Codes, Linear, Weight, ops, weights
from halfbyte.methods import method_steps
from halfbyte.model import load
from halfbyte.qtensor import QTensor, added, shifted
from halfbyte.steps import Adapt, Merge
from miniatures import folder, logits, quantized

TEXT = [{"text": "a small text that is learnt by heart, twice over and once again"}] * 4
SHORT = {"data": TEXT, "steps": 3, "batch_size": 2, "max_length": 24, "learning_rate": 1e-2}
FLOAT_ZEROS = ["uint4-g32-affine", "uint2-g32-affine", "uint8-channel-affine", "q4_1", "q5_1"]
INTEGER_ZEROS = ["uint4-g32", "uint3-channel", "uint8-g64"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def codes(to: str, dtype: torch.dtype = torch.float32, out: int = 24, n: int = 64) -> QTensor:
    return kernels.quantize(0.1 * torch.randn(out, n).to(dtype) + 0.02, FORMATS[to])


def linear(q: QTensor, size: int, **settings) -> Linear:
    """A layer with a QA-LoRA that was trained, in eval."""
    op = Linear(Weight(Codes(q)))
    op.weight.adapters["default"] = made = QaLora(op.weight, size, **settings)
    nn.init.normal_(made.lora_B, std=0.05)
    return op.eval()


def wide(q: QTensor) -> torch.Tensor:
    """What codes stand for, in float64."""
    scale = q.qparams.scale.double().repeat_interleave(q.shape[1] // q.qparams.scale.shape[1], 1)
    zero = added(q).double().repeat_interleave(q.shape[1] // added(q).shape[1], 1)
    return scale * q.codes.double() + zero


# ---- what it computes


@pytest.mark.parametrize("dtype", DTYPES)
def test_at_first_the_model_computes_its_base_exactly(tmp_path, dtype):
    made = quantized(folder(tmp_path / "m", dtype=dtype), "uint4-g32-affine")
    before = logits(made.model)
    Adapt(r=8, use_qalora=True)(made)
    assert all(isinstance(a, QaLora) and a.qalora_group_size == 32 for a in attached(made.model).values())
    assert torch.equal(logits(made.model), before)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("size", [1, 16, 64])
def test_delta_and_factors_are_what_the_pooled_path_adds(size, use_rslora):
    op, x = linear(codes("uint4-g32-affine"), size, r=3, use_rslora=use_rslora), torch.randn(2, 5, 64)
    made = op.weight.adapters["default"]
    a, b = made.factors()
    added = made(x, torch.zeros(2, 5, 24))
    torch.testing.assert_close(added, x @ made.delta().T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made.delta(), made.scaling * b @ a)
    assert tuple(made.lora_A.shape) == (3, 64 // size)
    if size > 1:
        groups = made.delta().unflatten(1, (-1, size))
        assert torch.equal(groups, groups[..., :1].expand_as(groups))


def test_the_scale():
    """PEFT multiplies means by the number of groups: in / g^2 in all."""
    op = linear(codes("uint4-g32-affine"), 32, r=4, lora_alpha=8)
    made = op.weight.adapters["default"]
    torch.testing.assert_close(made.shift(), 2 * made.lora_B @ made.lora_A * 64 / 32**2)


@pytest.mark.parametrize("size", [0, -32, 24, 128, 16.0, "16", True, None])
def test_a_size_that_does_not_divide_the_inputs_is_refused(size):
    with pytest.raises(InputError, match="does not divide the 64 inputs"):
        QaLora(Weight(Codes(codes("q4_1"))), size)


def test_dropout_acts_in_training_alone():
    op, x = linear(codes("q4_1"), 32, lora_dropout=0.5), torch.randn(3, 64)
    assert torch.equal(op(x), op(x))
    assert not torch.equal(op.train()(x), op(x))


# ---- merged into zero points


@pytest.mark.parametrize("to", [*FLOAT_ZEROS, *INTEGER_ZEROS])
@pytest.mark.parametrize("dtype", DTYPES)
@given(st.integers(0, 1000), st.sampled_from([1, 2]), st.integers(1, 8))
def test_zero_points_take_it_in_up_to_their_dtype(to, dtype, seed, times, r):
    torch.manual_seed(seed)
    q = codes(to, dtype)
    group = 64 if q.format.group == "channel" else q.format.group
    op = linear(q, min(64, times * group), r=r)
    w = op.weight
    wanted = wide(q) + w.adapters["default"].delta().double()
    off = w.merge()
    assert isinstance(w.stored, Codes)
    assert not w.adapters
    new = w.stored.q
    assert torch.equal(new.codes, q.codes)
    assert torch.equal(new.parts["scale"], q.parts["scale"])
    assert new.parts["scale"].dtype == q.parts["scale"].dtype
    held = torch.float16 if to.startswith("q") else dtype
    assert new.parts["zero"].dtype == held
    # half of the dtype's last digit, and float32's own rounding of the sum
    most = added(new).abs().double() * torch.finfo(held).eps / 2 + 1e-6 * added(q).abs() + torch.finfo(held).tiny
    distance = (wide(new) - wanted).abs()
    assert bool((distance <= most.repeat_interleave(64 // most.shape[1], 1)).all())
    torch.testing.assert_close(off.double().max(), distance.max(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("to", ["uint4-g32-affine", "uint4-g32"])
def test_in_float32_outputs_are_those_of_the_unmerged_layer(to):
    op, x = linear(codes(to), 32), torch.randn(7, 64)
    before = op(x)
    op.weight.merge()
    torch.testing.assert_close(op(x), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("to", [*FLOAT_ZEROS, *INTEGER_ZEROS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_seen_beside_codes_is_what_zero_points_will_hold(to, dtype):
    """Also of numbers so small that the dtype loses most of them."""
    q = codes(to, dtype)
    op = linear(q, 64, r=4)
    with torch.no_grad():
        op.weight.adapters["default"].lora_B *= 0.05 * torch.finfo(dtype).eps / torch.finfo(torch.bfloat16).eps
    made, x = op.weight.adapters["default"], torch.randn(9, 64).to(dtype)
    zero = torch.zeros(9, 24, dtype=dtype)
    with torch.no_grad():
        beside, plain, shifts = made(x, zero, op), made(x, zero), made.shift()
    before, wanted = wide(q), wide(shifted(q, shifts))
    exact = x.double() @ (wanted - before).T
    error = (beside.double() - exact).norm() / exact.norm()
    assert error < 3 * torch.finfo(dtype).eps
    if dtype == torch.bfloat16:
        assert (plain.double() - exact).norm() > 10 * error * exact.norm()  # what is lost is much of it
    op.weight.merge()
    assert torch.equal(wide(op.weight.stored.q), wanted)


def test_the_gradient_goes_straight_through_what_zero_points_lose():
    op, x, dy = linear(codes("uint4-g32-affine", torch.bfloat16), 32), torch.randn(5, 64), torch.randn(5, 24)
    made = op.weight.adapters["default"]
    with_op = torch.autograd.grad((made(x, torch.zeros(5, 24), op) * dy).sum(), [made.lora_A, made.lora_B])
    alone = torch.autograd.grad((made(x, torch.zeros(5, 24)) * dy).sum(), [made.lora_A, made.lora_B])
    for a, b in zip(with_op, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_zero_points_hold_is_found_anew_when_the_adapter_or_its_base_changes():
    q = codes("uint4-g32-affine", torch.bfloat16)
    op, x = linear(q, 32), torch.randn(5, 64).bfloat16()
    made = op.weight.adapters["default"]
    with torch.no_grad():
        first = op(x)
        made.lora_B.mul_(2)
        second = op(x)
        assert not torch.equal(first, second)
        op.weight.store(shifted(q, torch.full((24, 2), 0.5)))
        third = op(x)
        assert not torch.equal(third, second)
        made.lora_B.data = 2 * made.lora_B.data  # uncounted, as a cast is
        again = op(x)
        assert not torch.equal(again, third)
        op.weight.merge()
        torch.testing.assert_close(op(x), again, rtol=0.01, atol=0.05)


def test_integer_zero_points_become_floats_that_are_added():
    q = codes("uint4-g32", torch.bfloat16)
    new = shifted(q, torch.zeros(24, 2))
    assert new.format == FORMATS["uint4-g32-affine"]
    assert torch.equal(new.parts["zero"], (-q.parts["scale"].float() * q.parts["zero"].float()).bfloat16())


def test_what_the_dtype_does_not_hold_is_refused():
    with pytest.raises(InputError, match=r"more than torch\.float16 holds"):
        shifted(codes("q4_1"), torch.full((24, 2), 1e6))


@pytest.mark.parametrize("to", ["int4-g32", "q4_0", "nf4-g64"])
def test_codes_that_take_none_in_become_floats(to):
    op = linear(codes(to), 32)
    wanted = op.weight.sum()
    op.weight.merge()
    assert isinstance(op.weight.stored, nn.Parameter)
    assert torch.equal(op.weight.base(), wanted)


def test_groups_that_are_longer_than_the_pools_become_floats():
    op = linear(codes("uint4-g64-affine"), 16)
    op.weight.merge()
    assert isinstance(op.weight.stored, nn.Parameter)


def test_beside_an_adapter_that_adds_to_single_weights_it_becomes_floats():
    op = linear(codes("q4_1"), 32)
    op.weight.adapters["other"] = lora(op.weight, r=2)
    op.weight.merge()
    assert isinstance(op.weight.stored, nn.Parameter)


# ---- the size of groups


def found(*bases: tuple[str, int]) -> int:
    return group_size({f"w{i}": Weight(Codes(codes(to, n=n))) for i, (to, n) in enumerate(bases)})


def test_the_size_is_that_of_the_codes():
    assert found(("q4_1", 64), ("uint4-g32-affine", 96)) == 32
    assert found(("uint4-g32", 64), ("uint4-g64", 128)) == 64
    assert found(("uint4-channel-affine", 64), ("uint4-g32", 64)) == 64


@pytest.mark.parametrize(
    ("bases", "says"),
    [
        ([("uint4-g32", 96), ("uint4-g64", 64)], r"of 32, 64.*not divide the 96 inputs of w0.*group-size"),
        ([("int4-g32", 64)], "int4-g32 has no zero points"),
        ([("nf4-g64", 64)], "nf4-g64 has no zero points"),
        ([("q4_k", 256)], "q4_k are quantized themselves: choose a format such as q4_1"),
        ([("uint8-tensor", 64)], "one zero point for all rows"),
    ],
)  # fmt: skip
def test_bases_without_a_size_are_refused_in_words(bases, says):
    with pytest.raises(InputError, match=says):
        found(*bases)


def test_floats_and_inputs_in_an_order_of_their_own_are_refused():
    with pytest.raises(InputError, match="w is no codes"):
        group_size({"w": Weight(nn.Parameter(torch.randn(8, 64)))})
    q = codes("uint4-g32")
    q.parts["order"] = torch.arange(64, dtype=torch.int32)
    with pytest.raises(InputError, match="order of their own"):
        group_size({"w": Weight(Codes(q))})


# ---- the method


def trained(base, to=None, **changes):
    return load(base).train(method="qa-lora", to=to, **{**SHORT, "r": 4, **changes})


def held(model):
    return {n: w.stored.q for n, w in weights(model).items() if isinstance(w.stored, Codes)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", [None, "q4_1", "uint4-g64", "uint3-g32"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_trained_saved_read_back_and_merged_the_codes_are_what_they_were(tmp_path, name, scheme, dtype):
    base = folder(tmp_path / "base", name, dtype=dtype, words=True)
    made, begun = trained(base, scheme), load(base).quantize(scheme or "uint4-g32-affine")
    unmerged = logits(made.model)
    again = load(made.save(tmp_path / "adapter"))
    assert torch.equal(logits(again.model), unmerged)
    again.merge()
    before, after = held(begun.model), held(again.model)
    assert before.keys() == after.keys() != set()
    assert all(torch.equal(after[n].codes, q.codes) for n, q in before.items())
    assert all(torch.equal(after[n].parts["scale"], q.parts["scale"]) for n, q in before.items())
    assert not all(torch.equal(added(after[n]), added(q)) for n, q in before.items())
    rounding = again.notes["merge_rounding"]
    assert rounding["zero_points"] == len(after)
    assert (rounding["largest"] < 1e-7) == (dtype == torch.float32 and scheme != "q4_1")
    atol = 0.02 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(logits(again.model), unmerged, rtol=0, atol=atol)


def test_it_learns_and_only_a_and_b_do(tmp_path):
    base = folder(tmp_path / "base", words=True)
    made = trained(base, steps=20)
    assert made.log.curve[-1]["loss"] < made.log.curve[0]["loss"] - 0.05
    assert made.notes["trained"] == "adapters"
    by_name = dict(ops(made.model))
    asked = [by_name[n] for n in attached(made.model)]
    assert made.log.trainable == sum(4 * (op.in_features // 32 + op.out_features) for op in asked)


def test_codes_that_are_there_are_kept(tmp_path):
    base = folder(tmp_path / "base", words=True)
    path = load(base).quantize("uint4-g64").save(tmp_path / "codes")
    made = trained(path)
    assert made.notes["kept_codes"] == 14
    assert {q.format.name for q in held(made.model).values()} == {"uint4-g64"}
    again = load(load(made.save(tmp_path / "adapter")).merge().save(tmp_path / "merged"))
    assert {q.format.name for q in held(again.model).values()} == {"uint4-g64-affine"}
    torch.testing.assert_close(logits(again.model), logits(made.model), rtol=0, atol=1e-5)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["quantization"]["bits"] == 4


def test_merged_into_the_original_it_is_floats(tmp_path):
    base = folder(tmp_path / "base", words=True)
    made, original = trained(base), weights(load(base).model)
    deltas = {f"{n}.weight": a.delta() for n, a in attached(made.model).items()}
    made.apply(Merge(base="original"))
    assert not held(made.model)
    for name, d in deltas.items():
        assert torch.equal(weights(made.model)[name].value(), original[name].base() + d)


@pytest.mark.parametrize(
    ("to", "says"),
    [
        ("W4A16", "--method qa-lora --to W4A16: int4-g128 has no zero points"),
        ("NF4", "has no zero points"),
        ("q4_k", "quantized themselves"),
        ("uint4-tensor", "one zero point for all rows"),
    ],
)
def test_schemes_without_such_zero_points_are_refused_before_a_model_is_read(to, says):
    with pytest.raises(InputError, match=says):
        method_steps("qa-lora", to, SHORT)


def test_symmetric_codes_that_are_there_are_refused(tmp_path):
    made = quantized(folder(tmp_path / "base", words=True), "int4-g32")
    with pytest.raises(InputError, match=r"q_proj: int4-g32 has no zero points"):
        attach(made.model, ["model.layers.0.self_attn.q_proj"], use_qalora=True)


def test_groups_that_no_zero_point_takes_in_are_refused(tmp_path):
    base = folder(tmp_path / "base", words=True)
    path = load(base).quantize("uint4-g64").save(tmp_path / "codes")
    with pytest.raises(InputError, match=r"qalora_group_size 32: the codes of .* have groups of 64"):
        trained(path, qalora_group_size=32)
    assert trained(path, qalora_group_size=64).merge().notes["merge_rounding"]["zero_points"] == 14


def test_dora_does_not_go_with_it():
    with pytest.raises(InputError, match="no zero point takes in"):
        method_steps("qa-lora", None, SHORT, {"use_dora": True})
    with pytest.raises(InputError, match="choose one"):
        Adapt(use_dora=True, use_qalora=True)


def test_a_float_base_says_no_size(tmp_path):
    made = run.load(folder(tmp_path / "base"))
    with pytest.raises(InputError, match="is no codes"):
        Adapt(use_qalora=True)(made)
    Adapt(use_qalora=True, qalora_group_size=16)(made)  # as PEFT's folders are, whatever the base
    assert all(a.settings()["qalora_group_size"] == 16 for a in attached(made.model).values())
