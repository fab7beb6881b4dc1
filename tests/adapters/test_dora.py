"""DoRA: what it computes, what is trained, and that nothing of its base is kept in it."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from halfbyte import FORMATS, InputError, kernels, run
from halfbyte.adapters import attach, attached, lora
from halfbyte.adapters.dora import Dora
from halfbyte.adapters.lora import Lora
from halfbyte.layers import Codes, Embedding, Grid, Linear, Weight, ops, swap, weights
from halfbyte.model import load
from halfbyte.steps import Adapt, Merge, trainable
from miniatures import folder, logits, make, quantized

TEXT = [{"text": "a small text that is learnt by heart, twice over and once again"}] * 4
SHORT = {"data": TEXT, "steps": 3, "batch_size": 2, "max_length": 24, "learning_rate": 1e-2}
DTYPES = [torch.float32, torch.bfloat16]


def linear(to: str | None = None, bias: bool = True, dtype: torch.dtype = torch.float32, **settings) -> Linear:
    """A layer of 48 x 64 with a DoRA that was moved, in eval."""
    value = torch.randn(48, 64).to(dtype)
    stored = nn.Parameter(value, requires_grad=False)
    op = Linear(Weight(stored), nn.Parameter(torch.randn(48).to(dtype)) if bias else None)
    if to is not None:
        op.weight.store(kernels.quantize(value, FORMATS[to], kernels.qparams(value, FORMATS[to])))
    op.weight.adapters["default"] = moved(Dora(op.weight, **settings))
    return op.eval()


def moved(dora: Dora) -> Dora:
    with torch.no_grad():
        dora.lora_B.normal_(std=0.1)
        dora.lora_magnitude_vector.mul_(1 + 0.3 * torch.randn(len(dora.lora_magnitude_vector)))
    return dora


def dora_of(op: Linear) -> Dora:
    dora = op.weight.adapters["default"]
    assert isinstance(dora, Dora)
    return dora


def value(op: Linear) -> torch.Tensor:
    """The paper's formula, in float64."""
    d = dora_of(op)
    v = op.weight.base().double() + d.scaling * d.lora_B.double() @ d.lora_A.double()
    return d.lora_magnitude_vector.double()[:, None] * v / v.norm(dim=1, keepdim=True)


# ---- what it computes


@pytest.mark.parametrize("to", [None, "nf4-g64", "int4-g32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_at_first_the_model_computes_its_base_exactly(tmp_path, name, to, dtype):
    base = folder(tmp_path / "m", name, dtype=dtype)
    made = run.load(base) if to is None else quantized(base, to)
    before = logits(made.model)
    Adapt(r=8, use_dora=True)(made)
    assert all(isinstance(a, Dora) for a in attached(made.model).values())
    assert torch.equal(logits(made.model), before)
    values = {n: w.base() for n, w in weights(made.model).items()}
    assert all(torch.equal(w.sum(), values[n]) for n, w in weights(made.model).items())
    made.model.train()
    assert torch.equal(logits(made.model), before) or name == "gpt2"  # which has dropout of its own


@pytest.mark.parametrize("to", [None, "nf4-g64"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_factored_and_summed_it_is_the_papers_formula(to, bias, use_rslora):
    op, x = linear(to, bias, r=4, lora_alpha=8, use_rslora=use_rslora), torch.randn(3, 5, 64)
    torch.testing.assert_close(op.weight.sum().double(), value(op), rtol=0, atol=1e-5)
    y = F.linear(x.double(), value(op), None if op.bias is None else op.bias.double())
    torch.testing.assert_close(op(x).double(), y, rtol=0, atol=1e-4)
    torch.testing.assert_close(op.weight.sum().norm(dim=1), dora_of(op).lora_magnitude_vector.abs())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_16_bit_base_what_is_trained_is_float32(dtype):
    op, x = linear(dtype=dtype), torch.randn(7, 64).to(dtype)
    assert {p.dtype for p in dora_of(op).parameters()} == {torch.float32}
    assert dora_of(op).delta(op.weight.base()).dtype == torch.float32
    assert op(x).dtype == op.weight.sum().dtype == dtype
    y = F.linear(x.double(), value(op), op.bias.double())
    assert (op(x).double() - y).abs().max() < 0.02 * y.abs().max()


def test_dropout_drops_from_what_both_products_are_made_of():
    """As PEFT's: y + (m/norm - 1) W0 x' + m/norm s B A x', where x' is x with some of it dropped."""
    op, x = linear(lora_dropout=0.5), torch.randn(5, 64)
    d = dora_of(op)
    assert torch.equal(op(x), op(x))
    op.train()
    torch.manual_seed(3)
    given = op(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    wanted = F.linear(x, op.weight.base(), op.bias) + F.linear(dropped, d.delta(op.weight.base()))
    torch.testing.assert_close(given, wanted, rtol=0, atol=1e-4)
    assert not torch.allclose(given, op.eval()(x), atol=0.1)


def test_the_norm_has_no_gradient():
    """What is learnt is that of (m / c) (W0 + s B A) with the norm c a constant, in both paths."""
    op, x, target = linear(), torch.randn(5, 64), torch.randn(5, 48)
    d = dora_of(op)
    names = [n for n, _ in d.named_parameters()]
    assert names == ["lora_A", "lora_B", "lora_magnitude_vector"]

    def gradients(y):
        return torch.autograd.grad(((y - target) ** 2).mean(), list(d.parameters()))

    v = op.weight.base() + d.scaling * d.lora_B @ d.lora_A
    constant = v.detach().norm(dim=1)
    wanted = gradients(F.linear(x, (d.lora_magnitude_vector / constant)[:, None] * v, op.bias))
    for y in (op(x), F.linear(x, op.weight.sum(), op.bias)):
        for one, other in zip(gradients(y), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_rows_of_zeros_stay_what_they_are():
    op, x = linear(), torch.randn(5, 64)
    with torch.no_grad():
        op.weight.stored[3] = 0
    op.weight.adapters["default"] = Dora(op.weight)
    y = op(x)
    assert torch.equal(y, F.linear(x, op.weight.base(), op.bias))
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in dora_of(op).parameters())
    assert torch.equal(op.weight.sum(), op.weight.base())


def test_an_adapter_below_a_grid_moves_what_the_grid_sees():
    op = linear()
    op.weight.grid = Grid(FORMATS["int4-g32"])
    w, x = op.weight, torch.randn(3, 64)
    assert torch.equal(w.value(), w.grid(w.base() + dora_of(op).delta(w.base())))
    torch.testing.assert_close(op.train()(x), F.linear(x, w.value(), op.bias))


# ---- the adapter and its base


@pytest.mark.parametrize("to", [None, "nf4-g64"])
def test_nothing_of_the_base_is_kept(to):
    op = linear(to, r=4)
    assert {n: tuple(t.shape) for n, t in dora_of(op).state_dict().items()} == {
        "lora_A": (4, 64), "lora_B": (48, 4), "lora_magnitude_vector": (48,),
    }  # fmt: skip
    assert not any(isinstance(v, torch.Tensor | Weight | Linear) for v in vars(dora_of(op)).values())


@pytest.mark.parametrize("to", [None, "nf4-g64"])
def test_copies_and_pickles(to):
    op, x = linear(to), torch.randn(3, 64)
    before = op(x)
    twin = copy.deepcopy(op)
    assert torch.equal(twin(x), before)
    assert torch.equal(pickle.load(io.BytesIO(pickle.dumps(op)))(x), before)
    twin.weight.store(torch.randn(48, 64))  # a twin goes by its own base
    assert torch.equal(op(x), before)
    torch.testing.assert_close(
        twin(x).double(), F.linear(x.double(), value(twin), twin.bias.double()), rtol=0, atol=1e-4
    )


def test_use_dora_is_a_setting_of_lora():
    w = linear().weight
    assert isinstance(lora(w, r=2), Lora)
    assert isinstance(lora(w, r=2, use_dora=False), Lora)
    made = lora(w, r=2, use_dora=True)
    assert isinstance(made, Dora)
    assert made.settings() == {**Lora(w, r=2).settings(), "use_dora": True}
    for settings in ({"r": 0}, {"lora_dropout": 1.0}):
        with pytest.raises(InputError):
            lora(w, use_dora=True, **settings)


def test_an_unknown_setting_is_refused(tmp_path):
    with pytest.raises(InputError, match="rank"):
        Adapt(rank=4, use_dora=True)(run.load(folder(tmp_path / "m")))


def test_an_embedding_that_is_told_to_have_one_looks_up_the_sum():
    op = linear()
    ids = torch.tensor([0, 5, 47])
    assert torch.equal(Embedding(op.weight)(ids), op.weight.sum()[ids])
    with pytest.raises(InputError, match="lm_head shares its weight"):
        attach(swap(make("llama")), ["lm_head"], use_dora=True)


# ---- trained, merged, saved


def trained(base, method, to=None, **changes):
    return load(base).train(method=method, to=to, **{**SHORT, "r": 4, "use_dora": True, **changes})


@pytest.mark.parametrize("method", ["lora", "qlora", "qat-lora"])
def test_training_moves_m_a_and_b_and_nothing_else(tmp_path, method):
    base, to = folder(tmp_path / "base", words=True), {"qlora": "NF4", "qat-lora": "W4A16"}.get(method)
    made = trained(base, method, to)
    first = trained(base, method, to, learning_rate=1e-30)
    before = first.model.state_dict()
    still = {n for n, t in made.model.state_dict().items() if torch.equal(t, before[n])}
    assert all(".adapters." in n for n in set(before) - still)
    assert not any(".adapters." in n for n in still)
    assert made.log.curve[-1]["loss"] < made.log.curve[0]["loss"]
    asked = sum(4 * (op.in_features + op.out_features) + op.out_features for op in adapted(made))
    assert made.log.trainable == asked
    assert made.notes["adapter"]["use_dora"] is True
    assert trainable(made.model) == "adapters"


def adapted(made):
    return [op for n, op in ops(made.model) if n in attached(made.model)]


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_it_computes_what_it_did_unmerged(tmp_path, name, method, dtype):
    made = trained(folder(tmp_path / "base", name, dtype=dtype, words=True), method)
    expected, unmerged = {n: w.sum() for n, w in weights(made.model).items()}, logits(made.model)
    path = made.save(tmp_path / "adapter")
    assert torch.equal(logits(load(path).model), unmerged)
    made.merge()
    assert not attached(made.model)
    assert all(torch.equal(w.value(), expected[n]) for n, w in weights(made.model).items())
    # as in the test of QLoRA: the sum is rounded once to the dtype; the factored path never is
    torch.testing.assert_close(logits(made.model), unmerged, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05)
    assert torch.equal(logits(load(made.save(tmp_path / "out")).model), logits(made.model))


def test_qlora_keeps_its_codes(tmp_path):
    base = folder(tmp_path / "base", words=True)
    made, frozen = trained(base, "qlora"), load(base).quantize("NF4")
    for name, w in weights(frozen.model).items():
        if isinstance(w.stored, Codes):
            stored = weights(made.model)[name].stored
            assert isinstance(stored, Codes)
            assert torch.equal(stored.q.codes, w.stored.q.codes)


def test_merged_into_the_original_the_norm_is_that_of_the_original(tmp_path):
    base = folder(tmp_path / "base", words=True)
    made, original = trained(base, "qlora"), weights(load(base).model)
    m = {f"{n}.weight": a.lora_magnitude_vector for n, a in attached(made.model).items()}
    made.apply(Merge(base="original"))
    for name, w in weights(made.model).items():
        if name in m:
            torch.testing.assert_close(w.value().norm(dim=1), m[name])
            assert not torch.equal(w.value(), original[name].base())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("to", ["W4A16", "uint3-channel", "W8A8", "nf4-g64", "FP8A16"])
@pytest.mark.usefixtures("torch_products")
def test_qat_lora_ships_exactly_what_was_trained(tmp_path, to, dtype):
    made = trained(folder(tmp_path / "base", dtype=dtype, words=True), "qat-lora", to, steps=2)
    in_eval = logits(made.model)
    made.model.train()
    assert torch.equal(logits(made.model), in_eval)
    made.model.eval()
    adapter = load(made.save(tmp_path / "adapter"))
    assert torch.equal(logits(adapter.model), in_eval)
    adapter.merge()
    assert torch.equal(logits(adapter.model), in_eval)
    again = load(adapter.save(tmp_path / "merged"))
    assert torch.equal(logits(again.model), in_eval)
    assert any(isinstance(w.stored, Codes) for w in weights(again.model).values())


def test_training_goes_on_from_its_folder(tmp_path):
    base = folder(tmp_path / "base", words=True)
    path = trained(base, "lora").save(tmp_path / "one")
    made = load(base).train(method="lora", path=str(path), **SHORT)
    assert all(isinstance(a, Dora) for a in attached(made.model).values())
    assert not torch.equal(logits(made.model), logits(load(path).model))
