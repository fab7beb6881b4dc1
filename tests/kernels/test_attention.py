"""Attention by pieces, held to torch's own in float64."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from halfbyte.kernels.attention import ROWS, InPieces, attention
from halfbyte.kernels.half import half_layers

TOKENS = 2 * ROWS + 5  # a last piece that is not whole


def case(heads=6, shared=2, tokens=TOKENS, seen=TOKENS, d=16, width=24):
    g = torch.Generator().manual_seed(0)
    shapes = (2, heads, tokens, d), (2, shared, seen, d), (2, shared, seen, width)
    return [torch.randn(shape, generator=g).requires_grad_() for shape in shapes]


def both(given, **how):
    """Outputs and gradients: ours, and torch's in float64."""
    found = []
    for f, dtype in ((attention, torch.float32), (scaled_dot_product_attention, torch.float64)):
        parts = [t.detach().to(dtype).requires_grad_() for t in given]
        y = f(*parts, **how | {k: v.to(dtype) for k, v in how.items() if torch.is_tensor(v) and v.is_floating_point()})
        weighed = y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape)
        found.append([y, *torch.autograd.grad(weighed.sum(), parts)])
    return found


def padded(tokens, seen, right=True):
    """Causal, and of one row of text 20 tokens are none."""
    mask = torch.ones(tokens, seen, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
    mask[1, :, :, slice(seen - 20, None) if right else slice(20)] = False
    return mask


def near(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert (a.double() - b).norm() < 0.01 * b.norm()


@pytest.mark.parametrize(
    "how",
    [
        {"is_causal": True},
        {},
        {"scale": 0.5, "is_causal": True},
        {"attn_mask": padded(TOKENS, TOKENS)},
        {"attn_mask": torch.zeros(2, 1, TOKENS, TOKENS).masked_fill_(~padded(TOKENS, TOKENS), torch.finfo().min)},
        {"attn_mask": torch.linspace(-2, 2, 6)[None, :, None, None]},  # of each head its own, for all tokens alike
        {"attn_mask": torch.ones(TOKENS, TOKENS).tril().bool()},
    ],
)
def test_it_gives_what_torch_gives_and_its_gradients(how):
    near(*both(case(), enable_gqa=True, **how))


def test_what_is_looked_at_may_be_another_text():
    near(*both(case(shared=6, seen=40)))


@pytest.mark.parametrize("kind", ["bool", "float", "minus infinity"])
def test_tokens_that_see_none_spoil_no_others(kind):
    mask = there = padded(TOKENS, TOKENS, right=False)
    if kind != "bool":
        low = torch.finfo().min if kind == "float" else -torch.inf
        mask = torch.zeros(there.shape).masked_fill_(~there, low)
    given = case(shared=6)
    found = attention(*given, attn_mask=mask)
    expected = scaled_dot_product_attention(*given, attn_mask=there)
    seeing = there.any(-1).expand(2, 6, TOKENS)
    assert (found[seeing] - expected[seeing]).norm() < 0.01 * expected[seeing].norm()
    found[seeing].float().sum().backward()
    assert all(t.grad.isfinite().all() for t in given)


@pytest.mark.parametrize(
    ("given", "how", "words"),
    [
        (case(shared=6, seen=40), {"is_causal": True, "attn_mask": torch.ones(TOKENS, 40).bool()}, "is_causal"),
        (case(shared=4), {"enable_gqa": True}, "heads"),
        (case(), {}, "size of tensor"),
    ],
)
def test_what_does_not_fit_torch_refuses_in_its_own_words(given, how, words):
    with pytest.raises((RuntimeError, ValueError), match=words):
        attention(*given, **how)


def test_dropout_is_left_to_torch():
    given = case(shared=6)
    torch.manual_seed(0)
    found = attention(*given, dropout_p=0.5)
    torch.manual_seed(0)
    assert torch.equal(found, scaled_dot_product_attention(*given, dropout_p=0.5))


def test_inside_the_mode_models_use_it_and_nothing_else_changes():
    given = case(shared=6)
    outside = scaled_dot_product_attention(*given)
    with InPieces():
        named = scaled_dot_product_attention(query=given[0], key=given[1], value=given[2])
        assert torch.equal(named, scaled_dot_product_attention(*given))
        assert scaled_dot_product_attention(*given).dtype == torch.bfloat16
        assert torch.softmax(given[0], -1).dtype == torch.float32
    assert torch.equal(scaled_dot_product_attention(*given), outside)


def test_memory_grows_with_the_tokens_alone():
    """What is kept for the gradient: q, k, v, and what leads to them."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        attention(*case(shared=6, tokens=1024, seen=1024), is_causal=True)
    assert max(kept) < 1024 * 1024


def test_layers_in_bfloat16_on_a_cpu_that_imitates_it_keep_torchs_own(monkeypatch):
    monkeypatch.setattr("halfbyte.kernels.half.fast", lambda: False)
    given = case(shared=6)
    with torch.no_grad(), half_layers("cpu"):
        found = scaled_dot_product_attention(*given, is_causal=True)
    assert torch.equal(found, scaled_dot_product_attention(*(t.bfloat16() for t in given), is_causal=True))
