"""Distillation: what a model loses against a teacher, and its gradient."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from halfbyte import InputError, distill
from halfbyte.distill import Distillation, asked, kl_of_likeliest, likeliest, remembered
from halfbyte.train import loss_sum, train
from test_train import args, batch, toy


def logits(seed: int, rows: int = 300) -> torch.Tensor:
    return torch.randn(rows, 11, generator=torch.Generator().manual_seed(seed)).requires_grad_(True)


def test_loss_and_gradient_are_those_of_the_formula():
    ours, theirs = logits(0), logits(1)
    by_hand = F.kl_div(ours.log_softmax(-1), theirs.detach().log_softmax(-1), reduction="sum", log_target=True)
    (expected,) = torch.autograd.grad(3 * by_hand, ours)
    found = distill.kl(ours, theirs)
    (gradient,) = torch.autograd.grad(3 * found, ours)
    torch.testing.assert_close(found, by_hand)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_the_teacher_itself_loses_nothing_and_stays_as_it_is():
    model, b = toy(), batch(targets=0.4)
    loss = Distillation(asked(model))(model, b)
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad.abs().max() < 1e-6 for p in model.parameters())


def test_only_targets_count():
    ours, theirs, b = toy(), toy(seed=1), batch(targets=0.4)
    wanted = b.labels[:, 1:] != -100
    a, c = (m(b.input_ids).logits[:, :-1][wanted].log_softmax(-1) for m in (ours, theirs))
    by_hand = F.kl_div(a, c, reduction="sum", log_target=True)
    torch.testing.assert_close(Distillation(asked(theirs))(ours, b), by_hand)
    both = Distillation(asked(theirs), 0.25)(ours, b)
    torch.testing.assert_close(both, 0.25 * by_hand + 0.75 * loss_sum(ours, b))


def test_training_brings_a_model_to_its_teacher():
    ours, theirs = toy(), toy(seed=1)
    before = Distillation(asked(theirs))(ours, batch()).item()
    train(ours, iter(lambda: batch(), None), args(steps=60), loss_of=Distillation(asked(theirs)))
    assert Distillation(asked(theirs))(ours, batch()).item() < before / 2


def test_a_teacher_is_run_once_and_remembered(tmp_path):
    theirs, seen = toy(seed=1), [batch(targets=0.4, seed=i) for i in range(3)]
    wanted = [Distillation(asked(theirs), 0.5)(toy(), b) for b in seen]
    kept = remembered(theirs, theirs.head, seen + seen[:1], tmp_path / "teacher")
    assert (tmp_path / "teacher").stat().st_size == sum(b.targets for b in seen) * 8 * 4  # (targets, 8) in float32
    theirs.embed.weight.data.zero_()  # of what is before the head nothing is needed any more
    for b, loss in zip(seen, wanted, strict=True):
        torch.testing.assert_close(Distillation(kept, 0.5)(toy(), b), loss)
    turned = [replace(seen[0], input_ids=seen[0].input_ids.flip(0), labels=seen[0].labels.flip(0))]
    torch.testing.assert_close(Distillation(kept, 0.5)(toy(), turned[0]).isfinite(), torch.tensor(True))


def test_a_row_is_remembered_whatever_it_is_padded_to(tmp_path):
    theirs, short = toy(seed=1), batch(rows=1)
    kept = remembered(theirs, theirs.head, [short], tmp_path / "teacher")
    padded = replace(short, input_ids=F.pad(short.input_ids, (0, 5)), labels=F.pad(short.labels, (0, 5), value=-100))
    assert torch.equal(kept(padded), kept(short))


def test_a_model_that_does_more_after_its_head_is_refused(tmp_path):
    theirs = toy(seed=1)
    forward = theirs.forward
    theirs.forward = lambda **inputs: SimpleNamespace(logits=5 * forward(**inputs).logits.tanh())
    with pytest.raises(InputError, match="cache-teacher"):
        remembered(theirs, theirs.head, [batch()], tmp_path / "teacher")


@pytest.mark.parametrize("k", [1, 4, 11])
def test_likeliest_tokens_and_the_rest_as_one_give_the_loss_and_gradient_of_the_formula(tmp_path, k):
    """By hand: of the tokens that are not among the likeliest, one makes up the rest, by autograd."""
    theirs, b = toy(seed=1), batch(targets=0.4)
    kept = likeliest(theirs, k, [b], tmp_path / "teacher")(b)
    assert kept.shape == (b.targets, 2 * k)
    p = asked(theirs)(b).detach().softmax(-1)
    ours = torch.randn(p.shape, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    top = p.topk(k).indices
    q = ours.softmax(-1)
    parts = [(p.gather(1, top), q.gather(1, top))]
    others = torch.ones_like(p).scatter(1, top, 0)
    parts.append(((p * others).sum(1), (q * others).sum(1)))
    by_hand = sum((x * (x.log() - y.log())).sum() for x, y in parts)
    (expected,) = torch.autograd.grad(3 * by_hand, ours)
    found = kl_of_likeliest(ours, kept)
    (gradient,) = torch.autograd.grad(3 * found, ours)
    torch.testing.assert_close(found, by_hand, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    assert found.item() < distill.kl(ours, asked(theirs)(b)).item()


def test_more_likeliest_tokens_than_there_are_is_all_of_them(tmp_path):
    theirs, b = toy(seed=1), batch()
    loss = Distillation(likeliest(theirs, 1000, [b], tmp_path / "teacher"), 0.5, kl_of_likeliest)(toy(), b)
    torch.testing.assert_close(loss, Distillation(asked(theirs), 0.5)(toy(), b), rtol=1e-5, atol=1e-4)
