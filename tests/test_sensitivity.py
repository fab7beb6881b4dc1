"""What rounding is predicted to cost, against what it costs."""

from dataclasses import replace

import pytest
import torch

import miniatures
from halfbyte import data, evaluate, models, run, sensitivity
from halfbyte.errors import InputError
from halfbyte.formats import parse
from halfbyte.layers import ops
from halfbyte.solvers import rtn

FORMATS = {n: parse(n) for n in ("int2-g32", "int3-g32", "int4-g64")}


def sharp(path, name="llama", **own):
    """A miniature whose weights are larger than transformers begins with: its predictions are no longer all alike."""
    made = run.load(miniatures.folder(path, name, words=miniatures.bpe(), **own))
    with torch.no_grad():
        for n, op in ops(made.model):
            if n not in models.tied(made.model):
                op.weight.store(op.weight.base().detach() * 6)
    return made


def text(made, n=12):
    """The first n rows of 64 tokens."""
    rows = data.encode(data.records([{"text": " ".join(miniatures._TEXT)}]), made.tokenizer, 64)
    return replace(rows, rows=rows.rows[:n])


def batches(rows):
    return list(data.eval_batches(rows, 1, 0))


def found(made, rows, seed=0):
    """op's name -> the information of all ops that have its weight."""
    shared, out = models.tied(made.model), {}
    for n, s in sensitivity.fishers(made.model, batches(rows), seed).items():
        out.setdefault(shared.get(n, n), []).append(s)
    return out


@pytest.mark.parametrize("name", ["llama", "llama-untied", "gpt2", "mixtral"])
def test_predicted_and_measured_kl_agree(tmp_path, name):
    made = sharp(tmp_path / "m", name)
    rows = text(made)
    reference, seen = evaluate.Reference(made.model, keep=1 << 30), found(made, rows)
    evaluate.measure(made.model, rows, reference, 1)
    by_name, predicted, measured = dict(ops(made.model)), [], []
    for n in seen:
        w, kept = by_name[n].weight, by_name[n].weight.base().detach()
        losses = sensitivity.losses(kept, seen[n], FORMATS)
        for f in ("int2-g32", "int4-g64") if kept.shape[1] % 64 == 0 else ("int2-g32",):
            squares = next((s.squares for s in seen[n] if s.squares is not None), None)
            w.store(rtn.quantize(kept, FORMATS[f], squares).dequantize())
            predicted.append(losses[f])
            measured.append(evaluate.measure(made.model, rows, reference, 1).kl_mean)
            w.store(kept)
    both = torch.tensor([predicted, measured])
    assert torch.corrcoef(both.log())[0, 1] > 0.8
    assert 0.5 < both[1].sum() / both[0].sum() < 2


def test_fewer_bits_cost_more_and_rows_stand_for_all(tmp_path, monkeypatch):
    made = sharp(tmp_path / "m")
    seen = found(made, text(made))
    for n, op in ops(made.model):
        if n not in seen:
            continue
        whole = sensitivity.losses(op.weight.base().detach(), seen[n], FORMATS)
        assert whole["int2-g32"] > whole["int3-g32"] > whole["int4-g64"] > 0
        monkeypatch.setattr(sensitivity, "ROWS", 64)
        some = sensitivity.losses(op.weight.base().detach(), seen[n], FORMATS)
        monkeypatch.undo()
        assert some["int3-g32"] == pytest.approx(whole["int3-g32"], rel=0.5)


def test_the_information_is_the_mean_of_squared_gradients(tmp_path):
    made = sharp(tmp_path / "m", "llama-untied")
    rows = text(made, 1)
    seen, (batch,) = found(made, rows), batches(rows)
    model = made.model
    w = model.get_submodule("model.layers.0.mlp.up_proj").weight.stored
    w.requires_grad_(True)
    logits = model(**batch.inputs).logits[:, :-1][batch.labels[:, 1:] != -100].log_softmax(-1)
    drawn = torch.multinomial(logits.detach().exp(), 1, generator=torch.Generator().manual_seed(0))
    logits.gather(1, drawn).sum().backward()
    squares = w.grad.square() / len(drawn)
    (fisher,) = seen["model.layers.0.mlp.up_proj"]
    torch.testing.assert_close(fisher.columns, squares.mean(0), rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(fisher.rows, squares.mean(1) / squares.mean(), rtol=1e-3, atol=1e-6)
    table = model.model.embed_tokens.weight.stored.detach().clone().requires_grad_(True)
    model.model.embed_tokens.weight.stored = torch.nn.Parameter(table)
    logits = model(**batch.inputs).logits[:, :-1][batch.labels[:, 1:] != -100].log_softmax(-1)
    logits.gather(1, drawn).sum().backward()
    squares = model.model.embed_tokens.weight.stored.grad.square() / len(drawn)
    (fisher,) = seen["model.embed_tokens"]
    torch.testing.assert_close(fisher.columns, squares.mean(0), rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(fisher.rows, squares.mean(1) / squares.mean(), rtol=1e-3, atol=1e-6)


def test_it_is_the_same_twice_and_leaves_the_model_as_it_was(tmp_path):
    made = sharp(tmp_path / "m")
    rows, before = text(made, 2), {n: (p, p.requires_grad) for n, p in made.model.named_parameters()}
    a, b, c = found(made, rows), found(made, rows), found(made, rows, seed=1)
    for n in a:
        for one, two in zip(a[n], b[n], strict=True):
            assert torch.equal(one.rows, two.rows)
            assert torch.equal(one.columns, two.columns)
    assert any(not torch.equal(a[n][0].columns, c[n][0].columns) for n in a)
    after = {n: (p, p.requires_grad) for n, p in made.model.named_parameters()}
    assert all(after[n][0] is p and after[n][1] == asked and p.grad is None for n, (p, asked) in before.items())
    assert not any(m._forward_hooks for m in made.model.modules())


def test_a_gradient_that_is_not_finite(tmp_path):
    made = sharp(tmp_path / "m")
    made.model.model.norm.weight.data[3] = float("inf")
    with pytest.raises((InputError, RuntimeError), match=r"NaN|inf"):
        sensitivity.fishers(made.model, batches(text(made, 1)))


def test_what_was_never_reached_counts_as_the_mean_of_all():
    seen = [sensitivity.Fisher(torch.ones(4), torch.full((8,), 2.0)), sensitivity.Fisher(torch.ones(4), torch.zeros(6))]
    usual = sensitivity.Usual(seen).of(torch.zeros(3, 5))
    assert torch.equal(usual.rows, torch.ones(3))
    assert torch.equal(usual.columns, torch.ones(5))
