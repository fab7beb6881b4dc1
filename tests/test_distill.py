"""Distillation: what a model loses against a teacher, and its gradient."""

import torch
import torch.nn.functional as F

from halfbyte import distill
from halfbyte.distill import Distillation
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
    loss = Distillation(model)(model, b)
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad.abs().max() < 1e-6 for p in model.parameters())


def test_only_targets_count():
    ours, theirs, b = toy(), toy(seed=1), batch(targets=0.4)
    wanted = b.labels[:, 1:] != -100
    a, c = (m(b.input_ids).logits[:, :-1][wanted].log_softmax(-1) for m in (ours, theirs))
    by_hand = F.kl_div(a, c, reduction="sum", log_target=True)
    torch.testing.assert_close(Distillation(theirs)(ours, b), by_hand)
    both = Distillation(theirs, 0.25)(ours, b)
    torch.testing.assert_close(both, 0.25 * by_hand + 0.75 * loss_sum(ours, b))


def test_training_brings_a_model_to_its_teacher():
    ours, theirs = toy(), toy(seed=1)
    before = Distillation(theirs)(ours, batch()).item()
    train(ours, iter(lambda: batch(), None), args(steps=60), loss_of=Distillation(theirs))
    assert Distillation(theirs)(ours, batch()).item() < before / 2
