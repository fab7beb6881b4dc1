"""The loop: what a step computes, and that it comes out the same."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from halfbyte import InputError, data
from halfbyte.data import Batch
from halfbyte.train import Masters, Pace, TrainingArguments, loss_sum, matrices_decay, train
from miniatures import make, tokenizer

VOCABULARY = 16
FLAT = {"lr_scheduler_type": "constant", "warmup_ratio": 0.0}


class Toy(nn.Module):
    """Predicts the next token from this one alone: small enough for exact comparisons."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8, dtype=dtype)
        self.head = nn.Linear(8, VOCABULARY, dtype=dtype)

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=self.head(self.embed(input_ids)))


def toy(dtype=torch.float32, seed=0) -> Toy:
    torch.manual_seed(seed)
    return Toy(dtype)


def batch(rows: int = 2, targets: float = 1.0, seed: int = 0, length: int = 9) -> Batch:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (rows, length), generator=g)
    wanted = torch.rand(ids.shape, generator=g) < targets
    wanted[:, 0], wanted[:, 1] = False, True
    labels = ids.masked_fill(~wanted, -100)
    return Batch(ids, labels, None, None, ids.numel(), int(wanted.sum()))


def joined(batches) -> Batch:
    ids, labels = (torch.cat([getattr(b, k) for b in batches]) for k in ("input_ids", "labels"))
    return Batch(ids, labels, None, None, ids.numel(), sum(b.targets for b in batches))


def weights(model):
    return torch.cat([p.detach().flatten().float() for p in model.parameters()])


def args(**changes) -> TrainingArguments:
    return TrainingArguments(**{"steps": 5, "learning_rate": 1e-2, **changes})


# ---- the loss


def test_the_loss_is_the_sum_over_the_targets_alone():
    model, b = toy(), batch(targets=0.4)
    logits = model(b.input_ids).logits
    by_hand = sum(
        -F.log_softmax(logits[i, t - 1], -1)[b.input_ids[i, t]]
        for i in range(2)
        for t in range(1, 9)
        if b.labels[i, t] != -100
    )
    torch.testing.assert_close(loss_sum(model, b), by_hand)


def test_the_loss_of_classes():
    model = toy()
    pooled = SimpleNamespace(logits=model(torch.arange(4)).logits)
    b = Batch(torch.arange(4)[:, None], torch.tensor([1, 5, 0, 2]), None, None, 4, 4)
    found = loss_sum(lambda **_: pooled, b)
    torch.testing.assert_close(found, F.cross_entropy(pooled.logits, b.labels, reduction="sum"))


def test_the_loss_falls_on_a_small_model():
    model = make("llama", attention_dropout=0.0)
    records = data.records([{"text": "the same sentence again and again"}] * 4)
    rows = data.encode(records, tokenizer(), 32)
    log = train(model, data.batches(rows, 4, seed=0, pad_token_id=0), args(steps=30, learning_rate=3e-3))
    assert log.curve[-1]["loss"] < 0.6 * log.curve[0]["loss"]
    assert log.trainable == sum(p.numel() for p in model.parameters())
    assert not model.training


# ---- accumulation


@given(st.lists(st.tuples(st.integers(1, 4), st.floats(0, 1), st.integers(0, 99)), min_size=2, max_size=4))
def test_accumulated_batches_are_one_large_batch(parts):
    """Every target counts the same, also where the batches have unequal numbers of them."""
    small = [batch(rows, share, seed) for rows, share, seed in parts]
    one, many = toy(), toy()
    settings = args(steps=2, **FLAT)
    log_one = train(one, itertools.repeat(joined(small)), settings)
    log_many = train(many, itertools.cycle(small), replace(settings, gradient_accumulation_steps=len(small)))
    torch.testing.assert_close(weights(many), weights(one), rtol=1e-4, atol=1e-5)
    for a, b in zip(log_one.curve, log_many.curve, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_a_mean_of_means_would_be_something_else():
    """Guards the test above: these batches are unequal enough to tell the two apart."""
    small = [batch(1, 0.0, 1), batch(4, 1.0, 2)]
    model = toy()
    means = [loss_sum(model, b).item() / b.targets for b in small]
    whole = loss_sum(model, joined(small)).item() / sum(b.targets for b in small)
    assert abs(sum(means) / 2 - whole) > 1e-3


# ---- 16 bit


def test_float32_masters_move_where_bf16_alone_would_not():
    model = toy(torch.bfloat16)
    before = weights(model)
    settings = args(steps=200, learning_rate=1e-5, **FLAT)
    train(model, itertools.repeat(batch()), settings)
    moved = (weights(model) - before).abs().max()
    assert 1e-3 < moved < 6e-3  # 200 steps of 1e-5, and the rounding of values near 1

    alone = toy(torch.bfloat16)
    large = alone.head.weight.detach().abs() > 0.05  # where 1e-5 is far below a bf16 step
    kept = alone.head.weight.detach().clone()
    optimizer = torch.optim.AdamW(alone.parameters(), lr=1e-5, weight_decay=0.0)
    for _ in range(50):
        loss_sum(alone, batch()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(alone.head.weight[large], kept[large])


def test_the_model_is_its_masters_rounded():
    model = toy(torch.bfloat16)
    masters = Masters(dict(model.named_parameters()), args(), matrices_decay)
    loss_sum(model, batch()).backward()
    masters.step(1e-2, 1.0)
    for p, m in zip(masters.parameters, masters.masters, strict=True):
        assert (p.dtype, m.dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(p, m.to(torch.bfloat16))
    assert any(not torch.equal(m, m.bfloat16().float()) for m in masters.masters)


def test_a_parameter_has_a_pace_of_its_own():
    """AdamW's first step is its learning rate, half of what is given while that warms up, whatever the gradient."""
    model = toy()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    first = next(iter(before))
    pace = lambda name, p: Pace(ratio=10.0 if name == first else 1.0)  # noqa: E731
    train(model, itertools.repeat(batch()), args(steps=1, learning_rate=1e-4, **FLAT), pace=pace)
    moved = {n: (p - before[n]).abs().max().item() for n, p in model.named_parameters()}
    assert moved[first] == pytest.approx(5e-4, rel=0.05)
    assert all(m == pytest.approx(5e-5, rel=0.05) for n, m in moved.items() if n != first)


def test_what_does_not_decay_keeps_its_size():
    model = toy()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    first, *_ = before
    masters = Masters(
        dict(model.named_parameters()), args(weight_decay=0.5), lambda name, p: Pace(decays=name != first)
    )
    masters.step(0.1, 1.0)
    for name, p in model.named_parameters():
        assert torch.allclose(p, before[name] * (1 if name == first else 0.95))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_goes_on_to_the_same_bytes(dtype):
    settings = args(steps=8, lr_scheduler_type="cosine")
    whole, halted = toy(dtype), toy(dtype)
    stream = [batch(seed=i) for i in range(8)]
    train(whole, iter(stream), settings)

    states = []
    train(halted, iter(stream), replace(settings, save_steps=4), save=states.append)
    (state,) = states
    resumed = toy(dtype, seed=9)
    log = train(resumed, iter(stream[4:]), settings, begun=replace(state, curve=state.curve[:4]))
    assert torch.equal(weights(resumed), weights(whole))
    assert [row["step"] for row in log.curve] == list(range(1, 9))


def test_a_state_is_not_changed_by_the_training_that_goes_on():
    states = []
    train(toy(), itertools.repeat(batch()), args(steps=4, save_steps=2), save=states.append)
    assert len(states[0].curve) == 2


def test_a_state_of_another_model_is_refused():
    state = Masters(dict(toy().named_parameters()), args(), matrices_decay).state_dict()
    with pytest.raises(InputError, match="another model"):
        Masters({"p": nn.Parameter(torch.ones(3))}, args(), matrices_decay).load_state_dict(state)


def test_weight_decay_spares_vectors():
    model = toy()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    masters = Masters(dict(model.named_parameters()), args(weight_decay=0.5), matrices_decay)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    masters.step(0.1, 1.0)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[n] * (0.95 if p.ndim > 1 else 1.0))


# ---- rates and norms


def rates(**changes):
    settings = args(**{"steps": 100, "learning_rate": 1.0, "warmup_ratio": 0.1, **changes})
    return [settings.rate(i) for i in range(settings.steps)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_the_rate_warms_up_and_then_never_rises(kind):
    found = rates(lr_scheduler_type=kind)
    assert found[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert found[10] == 1.0
    assert all(a >= b > 0 for a, b in itertools.pairwise(found[10:]))


def test_the_shapes_of_the_rates():
    cosine, linear, constant = (rates(lr_scheduler_type=k) for k in ("cosine", "linear", "constant"))
    assert cosine[55] == pytest.approx(0.5)
    assert cosine[40] == pytest.approx((1 + math.cos(math.pi / 3)) / 2)
    assert linear[55] == pytest.approx(0.5)
    assert linear[-1] == pytest.approx(1 / 90)
    assert set(constant[10:]) == {1.0}


@given(st.integers(1, 300), st.floats(0, 1), st.sampled_from(["cosine", "linear", "constant"]))
def test_no_step_is_without_a_rate(steps, warmup, kind):
    found = rates(steps=steps, warmup_ratio=warmup, lr_scheduler_type=kind)
    assert all(0 < r <= 1 for r in found)


def test_the_rates_are_those_of_the_curve():
    settings = args(steps=6, warmup_ratio=0.5)
    log = train(toy(), itertools.repeat(batch()), settings)
    assert [row["learning_rate"] for row in log.curve] == [settings.rate(i) for i in range(6)]


@given(st.floats(1e-3, 10))
def test_the_gradient_is_clipped_to_its_norm(most):
    model = toy()
    masters = Masters(dict(model.named_parameters()), args(), matrices_decay)
    loss_sum(model, batch()).backward()
    raw = torch.cat([p.grad.flatten() for p in model.parameters()])
    seen = {}
    masters.optimizer.register_step_pre_hook(lambda *_: seen.update(g=[m.grad.clone() for m in masters.masters]))
    norm = masters.step(1e-2, most)
    assert norm == pytest.approx(raw.norm().item(), rel=1e-5)
    clipped = torch.cat([g.flatten() for g in seen["g"]])
    torch.testing.assert_close(clipped, raw * min(1.0, most / (norm + 1e-6)), rtol=1e-4, atol=1e-7)


# ---- seeds, logs, failures


def test_the_same_seed_gives_the_same_bytes():
    def trained(seed):
        model = make_dropout(seed)
        return weights(model), train(model, itertools.repeat(batch()), args()).curve[-1]["loss"], weights(model)

    def make_dropout(seed):
        torch.manual_seed(seed)
        model = Toy()
        model.embed = nn.Sequential(model.embed, nn.Dropout(0.3))
        return model

    a, b, c = trained(1), trained(1), trained(2)
    assert a[1] == b[1]
    assert torch.equal(a[2], b[2])
    assert not torch.equal(a[2], c[2])
    assert not torch.equal(a[0], a[2])


def test_the_curve_has_every_step_and_the_held_out_loss():
    seen = []
    evaluations = iter([3.0, 2.0, 1.0])
    log = train(
        toy(), itertools.repeat(batch()), args(steps=5, eval_steps=2),
        on_step=seen.append, evaluate=lambda: next(evaluations),
    )  # fmt: skip
    assert seen == log.curve
    assert [row["step"] for row in log.curve] == [1, 2, 3, 4, 5]
    assert [row.get("eval_loss") for row in log.curve] == [None, 3.0, None, 2.0, 1.0]  # and at the end
    summary = log.summary()
    assert summary["steps"] == 5
    assert summary["loss"] == log.curve[-1]["loss"]
    assert summary["tokens_per_second"] > 0
    assert summary["peak_memory"] > 1e6


def test_evaluation_happens_in_eval_mode_and_training_goes_on():
    model, modes = toy(), []
    train(
        model, itertools.repeat(batch()), args(steps=2, eval_steps=1),
        on_step=lambda row: modes.append(model.training), evaluate=lambda: modes.append(model.training) or 0.0,
    )  # fmt: skip
    assert modes == [False, True, False, True]


def test_a_loss_that_is_not_finite_says_so():
    model = toy()
    with torch.no_grad():
        model.head.bias[3] = math.nan
    with pytest.raises(RuntimeError, match=r"loss is nan at step 1"):
        train(model, itertools.repeat(batch()), args())


def test_a_gradient_that_is_not_finite_says_so_and_moves_nothing():
    model = toy()
    masters = Masters(dict(model.named_parameters()), args(), matrices_decay)
    before = weights(model)
    for p in model.parameters():
        p.grad = torch.full_like(p, math.inf)
    with pytest.raises(RuntimeError, match="not finite"):
        masters.step(1e-2, 1.0)
    assert torch.equal(weights(model), before)


def test_nothing_trainable_is_an_error():
    with pytest.raises(InputError, match="nothing is trainable"):
        train(toy().requires_grad_(False), itertools.repeat(batch()), args())


def test_what_requires_no_gradient_stays():
    model = toy()
    model.embed.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, itertools.repeat(batch()), args())
    assert torch.equal(model.embed.weight, before["embed.weight"])
    assert not torch.equal(model.head.weight, before["head.weight"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": 0}, "steps must be above 0"),
        ({"learning_rate": 0.0}, "learning rate must be above 0"),
        ({"learning_rate": math.nan}, "learning rate must be above 0"),
        ({"gradient_accumulation_steps": 0}, "gradient accumulation steps"),
        ({"lr_scheduler_type": "cosin"}, "cosine, linear, constant"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(changes, says):
    with pytest.raises(InputError, match=says):
        args(**changes)


def test_gradient_checkpointing_computes_the_same():
    losses = []
    for on in (False, True):
        torch.manual_seed(0)
        model = make("llama")
        rows = data.encode(data.records([{"text": "some text of a few words"}] * 3), tokenizer(), 16)
        stream = data.batches(rows, 2, seed=0, pad_token_id=0)
        log = train(model, stream, args(steps=3, gradient_checkpointing=on))
        losses.append([row["loss"] for row in log.curve])
    assert losses[0] == losses[1]
