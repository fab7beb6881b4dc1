"""LoRA: what it computes, what is trained, and which layers get it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from halfbyte import FORMATS, InputError, adapters, models, run
from halfbyte.adapters.lora import Lora
from halfbyte.layers import Grid, Linear, Weight, ops, swap
from halfbyte.recipe import parse_recipe
from halfbyte.steps import Adapt, trainable
from miniatures import folder, logits, make, quantized


def weight(out: int = 48, n: int = 64, dtype: torch.dtype = torch.float32) -> Weight:
    return Weight(nn.Parameter(torch.randn(out, n).to(dtype), requires_grad=False))


def trained(w: Weight, **settings) -> Lora:
    lora = Lora(w, **settings)
    nn.init.normal_(lora.lora_B, std=0.1)
    return lora.eval()


@pytest.mark.parametrize("to", [None, "nf4-g64", "int4-g32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_first_the_model_computes_its_base_exactly(tmp_path, to, dtype):
    base = folder(tmp_path / "m", dtype=dtype)
    made = run.load(base) if to is None else quantized(base, to)
    before = logits(made.model)
    Adapt(r=8)(made)
    assert torch.equal(logits(made.model), before)
    made.model.train()
    assert torch.equal(logits(made.model), before)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 8))
def test_trainable_parameters_grow_linearly_with_r(out, n, r):
    w = weight(out, n)
    assert sum(p.numel() for p in Lora(w, r=r).parameters()) == r * (out + n)


def test_only_the_adapters_are_trained(tmp_path):
    made = run.load(folder(tmp_path / "m"))
    counts = []
    for r in (2, 4):
        Adapt(r=r)(made)
        assert trainable(made.model) == "adapters"
        asked = {n for n, p in made.model.named_parameters() if p.requires_grad}
        assert all(".adapters." in n for n in asked)
        counts.append(sum(p.numel() for p in made.model.parameters() if p.requires_grad))
        for _, op in ops(made.model):
            op.weight.adapters.clear()
    assert counts[1] == 2 * counts[0] > 0


@pytest.mark.parametrize("use_rslora", [False, True])
@given(st.integers(1, 16), st.floats(0.5, 64), st.integers(0, 1000))
def test_delta_is_what_the_factored_path_adds(use_rslora, r, alpha, seed):
    torch.manual_seed(seed)
    w = weight()
    lora = trained(w, r=r, lora_alpha=alpha, use_rslora=use_rslora)
    x, y = torch.randn(3, 64), torch.randn(3, 48)
    torch.testing.assert_close(lora(x, y), y + x @ lora.delta().T, rtol=1e-4, atol=1e-4)


def test_the_scale():
    w = weight()
    plain, stabilized = trained(w, r=4, lora_alpha=8), trained(w, r=4, lora_alpha=8, use_rslora=True)
    torch.testing.assert_close(plain.delta(), 2 * plain.lora_B @ plain.lora_A)
    torch.testing.assert_close(stabilized.delta(), 4 * stabilized.lora_B @ stabilized.lora_A)


def test_a_is_drawn_with_the_variance_of_the_paper():
    a = Lora(weight(16, 4096), r=64).lora_A
    assert a.std().item() == pytest.approx(1 / (3 * 4096) ** 0.5, rel=0.05)  # uniform within 1/sqrt(in)
    assert a.abs().max() <= 1 / 64


def test_dropout_acts_in_training_alone():
    lora = trained(weight(), lora_dropout=0.5)
    x, y = torch.randn(5, 64), torch.zeros(5, 48)
    assert torch.equal(lora(x, y), lora(x, y))
    lora.train()
    assert not torch.equal(lora(x, y), lora(x, y))
    many = torch.stack([lora(x, y) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(many, lora.eval()(x, y), rtol=0.1, atol=0.1)  # dropout keeps the mean


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_and_b_are_float32_on_a_16_bit_base(dtype):
    lora = trained(weight(dtype=dtype))
    assert {p.dtype for p in lora.parameters()} == {lora.delta().dtype} == {torch.float32}
    assert lora(torch.randn(2, 64).to(dtype), torch.randn(2, 48).to(dtype)).dtype == dtype


@pytest.mark.parametrize("settings", [{"r": 0}, {"r": -1}, {"lora_dropout": 1.0}, {"lora_dropout": -0.1}])
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(InputError):
        Lora(weight(), **settings)


def test_unknown_settings_and_kinds_are_refused(tmp_path):
    made = run.load(folder(tmp_path / "m"))
    with pytest.raises(InputError, match="rank"):
        Adapt(rank=4)(made)
    with pytest.raises(InputError, match="lora"):
        Adapt(adapter="lore")(made)


def test_an_adapter_below_a_grid_moves_what_the_grid_sees():
    w = weight()
    w.adapters["default"] = trained(w)
    w.grid = Grid(FORMATS["int4-g32"])
    assert torch.equal(w.value(), w.grid(w.base() + w.adapters["default"].delta()))


# ---- which layers


def names(model, target_modules):
    return adapters.targets(model, models.roles(model), target_modules)


@pytest.mark.parametrize("name", ["llama", "llama-untied", "gpt2", "neox", "bert"])
def test_all_linear_means_every_linear_layer_of_the_blocks(name):
    model = swap(make(name))
    found = names(model, "all-linear")
    prefixes = tuple(f"{p}." for p, _ in models.blocks(model))
    assert set(found) == {n for n, op in ops(model) if isinstance(op, Linear) and n.startswith(prefixes)}
    assert found


def test_a_list_meets_names_and_endings():
    model = swap(make("llama-untied"))
    assert names(model, ["q_proj"]) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert names(model, ["layers.1.self_attn.q_proj", "lm_head"]) == ["model.layers.1.self_attn.q_proj", "lm_head"]
    with pytest.raises(InputError, match=r"proj, .*q_proj"):
        names(model, ["q_proj", "proj"])  # an ending begins at a dot


def test_a_regular_expression_meets_whole_names():
    model = swap(make("llama"))
    assert names(model, r".*\.(q|v)_proj") == [
        f"model.layers.{i}.self_attn.{k}_proj" for i in (0, 1) for k in ("q", "v")
    ]
    for pattern, says in ((r"q_proj", "meets no linear layer"), ("(", "no regular expression")):
        with pytest.raises(InputError, match=says):
            names(model, pattern)


def test_an_embedding_gets_one_where_it_is_named():
    model = swap(make("llama-untied"))
    assert names(model, ["embed_tokens"]) == ["model.embed_tokens"]
    assert not [n for n in names(model, "all-linear") if "embed" in n]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"r": "8", "init_lora_weights": "orthogonal"}, "adapt: r: it is a whole number, not '8'"),
        ({"r": 8.0}, "r: it is a whole number"),
        ({"r": True}, "r: it is a whole number"),
        ({"lora_alpha": "8"}, "lora_alpha: it is a number"),
        ({"lora_dropout": [0.5]}, "lora_dropout: it is a number"),
        ({"use_dora": "yes"}, "use_dora: it is true or false"),
        ({"use_rslora": 1}, "use_rslora: it is true or false"),
        ({"init_lora_weights": []}, "it is true"),
        ({"rank_pattern": {"q_proj": "8"}, "init_lora_weights": "orthogonal"}, "rank_pattern should give"),
        ({"rank_pattern": {3: 8}}, "3 is no layer's name"),
    ],
)
def test_settings_of_a_wrong_type_are_refused_before_a_model_is_read(settings, says):
    with pytest.raises(InputError, match=says):
        parse_recipe({"model": "no/such", "steps": [{"adapt": settings}]})
    with pytest.raises(InputError):
        parse_recipe({"model": "no/such", "method": "lora", "train": {"data": "x.jsonl"}, "adapt": settings})
