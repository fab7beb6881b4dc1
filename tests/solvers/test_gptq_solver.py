"""GPTQ on one weight: what it minimizes, what it fits, and what it leaves to rounding."""

import logging

import pytest
import torch

from halfbyte import InputError, data, feed, kernels, models
from halfbyte.formats import parse
from halfbyte.kernels import proxy
from halfbyte.layers import Linear, Weight, ops
from halfbyte.solvers import Moments, Site, gptq, rtn, solver
from halfbyte.solvers.form import Form
from miniatures import folder, tokenizer

NAMES = ["int4-g64", "uint4-g64", "int3-g32", "int4-channel", "q4_0", "q4_1", "q4_k", "iq4_nl", "nf4-g64", "mxfp4"]

TEXT = data.encode(
    data.records([{"text": f"the {n} of some words, which are {n * n} in number"} for n in range(60)]), tokenizer(), 16
)


def case(rows=24, inputs=512, seed=0):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, inputs, generator=g) * 0.05
    x = torch.randn(700, inputs, generator=g) @ torch.randn(inputs, inputs, generator=g) * 0.1
    x += torch.randn(700, inputs, generator=g) * torch.rand(inputs, generator=g) * 2
    return w, x, x.T @ x / len(x)


def error(w, q, x):
    """What a layer's outputs are off by: the thing itself, not its quadratic form."""
    return (x @ (w - proxy.values(q)).T).square().mean().item()


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_nearer_than_with_rounding_weighed_or_not(name):
    w, x, gram = case()
    f = parse(name)
    plain, weighed = error(w, kernels.quantize(w, f), x), error(w, rtn.quantize(w, f, gram.diagonal()), x)
    solved = error(w, gptq.quantize(w, f, Form.of(gram)), x)
    assert solved < 0.75 * min(plain, weighed)


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "uint4-g64", "iq4_nl", "uint4-g64-affine"])
def test_scales_fitted_to_codes_have_the_least_loss_for_them(name):
    w, _, gram = case()
    h = Form.of(gram).h
    q = kernels.quantize(w, parse(name))
    fitted = gptq.refitted(q, (proxy.values(q) - w) @ h, h)
    assert torch.equal(fitted.codes, q.codes)
    best = proxy.loss(w, fitted, h)
    assert (best < proxy.loss(w, q, h)).all()
    p = fitted.qparams
    for factor in (0.99, 1.01):
        other = proxy.with_qparams(fitted, type(p)(p.scale * factor, p.zero))
        assert (proxy.loss(w, other, h) > best).all()


def test_the_factor_is_that_of_the_inverse():
    _, _, gram = case()
    form = Form.of(gram)
    h, lower = form.h[form.order][:, form.order].double(), form.factor.double()
    assert torch.equal(lower, lower.tril())
    assert (h.diagonal().diff() <= 0).all()
    torch.testing.assert_close(lower @ lower.T @ h, torch.eye(len(h)).double(), atol=1e-4, rtol=0)


def test_what_is_solved_for_by_the_factor():
    w, _, gram = case()
    form = Form.of(gram)
    torch.testing.assert_close(form.solved(w @ form.h), w, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(form.h, gram + form.damping * torch.eye(len(gram)))


def test_a_hessian_that_is_not_positive_definite_is_damped_until_it_is_and_that_is_said(caplog):
    gram = torch.full((96, 96), 0.5) + 0.5 * torch.eye(96)
    gram[0, 1] = gram[1, 0] = 1.4  # more than the diagonal allows
    form = Form.of(gram, "a.b")
    assert form.damping == pytest.approx(1.0)
    h = form.h[form.order[:, None], form.order]
    assert (form.factor @ form.factor.T @ h - torch.eye(96)).abs().max() < 1e-4
    assert "a.b: its Hessian is positive definite with 1 of" in caplog.text
    caplog.clear()
    Form.of(torch.eye(96))
    assert not caplog.text


@pytest.mark.parametrize("where", [(3, 3), (3, 4)])
def test_inputs_that_are_no_numbers_are_refused_by_name(where):
    gram = torch.eye(64)
    gram[where], gram[where[::-1]] = torch.nan, torch.nan
    with pytest.raises(InputError, match=r"inputs of a\.b"):
        Form.of(gram, "a.b")


def test_inputs_that_were_always_0_and_none_at_all():
    w, x, _ = case()
    x[:, 7] = 0
    for seen in (x, x * 0):
        q = gptq.quantize(w, parse("int4-g64"), Form.of(seen.T @ seen / len(seen)))
        assert q.dequantize().isfinite().all()
        assert (q.dequantize() - w).abs().max() < 0.1


def test_what_saw_nothing_or_is_not_solved_for_is_rounded_and_the_log_says_so(caplog):
    w, _, gram = case()
    op = Linear(Weight(torch.nn.Parameter(w)))
    sites = {
        "blind": Site(op, parse("int4-g64")),
        "floats": Site(op, parse("fp8-e4m3-channel"), Moments(gram.diagonal(), gram)),
    }
    with caplog.at_level(logging.WARNING, "halfbyte"):
        found = solver("gptq").solve(op, None, None, sites)
    for name, site in sites.items():
        assert torch.equal(found[name].dequantize(), kernels.quantize(w, site.format).dequantize())
    assert "blind" in caplog.text
    assert "saw no input" in caplog.text
    assert "float type" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_last_op_makes_good_what_was_lost_before_it(tmp_path, dtype):
    """A block that is fed what it would not be in the float model comes nearer to what it gives there."""
    model = models.load(folder(tmp_path / "m", "llama"), dtype).model
    prefix, block = models.blocks(model)[0]
    stream = data.batches(TEXT, 1, seed=0, pad_token_id=0)
    found = feed.Feed(model, [block], [next(stream) for _ in range(8)])
    names = [n for n, _ in ops(model) if n.startswith(prefix)]
    targets = found.run(0)
    g = torch.Generator().manual_seed(0)
    turn = (torch.randn(targets[0].shape[-1], targets[0].shape[-1], generator=g) * 0.02).to(dtype)
    found.states = [x + x @ turn for x in found.states]
    with feed.watching(dict(ops(model)), names, "gram") as seen:
        found.run(0)
    told = seen.moments()
    last = f"{prefix}.mlp.down_proj"

    def missing(closing):
        sites = {n: Site(op, parse("int8-g32"), told[n], n == closing) for n, op in ops(model) if n in names}
        before = {n: sites[n].op.weight.value().clone() for n in names}
        for n, q in gptq.solve(block, found.calls(0), targets, sites).items():
            assert q.dtype == dtype
            sites[n].op.weight.store(q.dequantize())
        lost = sum((y - t).square().sum().item() for y, t in zip(found.run(0), targets, strict=True))
        for n, w in before.items():
            sites[n].op.weight.store(w)
        return lost

    assert missing(last) < 0.8 * missing(None)
