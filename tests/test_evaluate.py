"""The ledger's figures against their definitions, and their errors against simulation."""

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from halfbyte import BudgetExceeded, InputError, data, evaluate
from halfbyte.data import Dataset
from halfbyte.data import Row as EncodedRow
from halfbyte.evaluate import Reference, Row, accuracy, check_budget, classification, measure, share_and_error
from miniatures import make, tokenizer

VOCABULARY = 12


class Bigram(nn.Module):
    """Predicts the next token from this one by a table of logits; counts how often it is asked."""

    def __init__(self, seed: int = 0, spread: float = 1.0, size: int = VOCABULARY) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(spread * torch.randn(size, size, generator=g))
        self.calls = 0

    def forward(self, input_ids, **_):
        self.calls += 1
        return SimpleNamespace(logits=self.table[input_ids])


def dataset(windows: int = 6, length: int = 10, seed: int = 0, targets: float = 1.0) -> Dataset:
    g = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(windows):
        ids = torch.randint(VOCABULARY, (length,), generator=g)
        wanted = torch.rand(length, generator=g) < targets
        wanted[0], wanted[1] = False, True
        rows.append(EncodedRow(ids, wanted, torch.zeros(length, dtype=torch.long)))
    return Dataset(rows, "text", "")


def token_losses(model, rows):
    """Negative log-likelihoods by window, computed one token at a time."""
    return [
        [
            -F.log_softmax(model.table[row.input_ids[t - 1]], -1)[row.input_ids[t]].item()
            for t in range(1, len(row))
            if row.targets[t]
        ]
        for row in rows.rows
    ]


# ---- the figures


@given(st.integers(1, 9), st.integers(1, 5), st.floats(0, 1), st.integers(0, 99))
def test_perplexity_against_a_hand_computation(windows, batch_size, targets, seed):
    model, rows = Bigram(seed), dataset(windows, seed=seed, targets=targets)
    row = measure(model, rows, batch_size=batch_size)
    by_hand = list(itertools.chain(*token_losses(model, rows)))
    mean = sum(by_hand) / len(by_hand)
    assert row.loss == pytest.approx(mean, rel=1e-5)
    assert row.perplexity == pytest.approx(math.exp(mean), rel=1e-5)
    assert (row.tokens, row.windows) == (len(by_hand), windows)
    assert row.kl_mean is row.top1_agreement is row.loss_difference is None


@given(st.integers(0, 99), st.integers(1, 5))
def test_a_model_loses_nothing_against_itself(seed, batch_size):
    model = Bigram(seed)
    row = measure(model, dataset(seed=seed), Reference(model), batch_size)
    assert row.kl_mean == row.kl_p99 == row.loss_difference == 0
    assert row.top1_agreement == 1
    assert (row.loss_difference_low, row.loss_difference_high, row.kl_error) == (0, 0, 0)


@given(st.integers(0, 99), st.floats(0.3, 1))
def test_kl_and_top1_against_their_definitions(seed, targets):
    ours, theirs, rows = Bigram(seed), Bigram(seed + 1), dataset(seed=seed, targets=targets)
    row = measure(ours, rows, Reference(theirs))
    kls, same = [], []
    for r in rows.rows:
        for t in range(1, len(r)):
            if r.targets[t]:
                p, q = (F.softmax(m.table[r.input_ids[t - 1]].double(), -1) for m in (theirs, ours))
                kls.append((p * (p / q).log()).sum().item())
                same.append(float(p.argmax() == q.argmax()))
    assert row.kl_mean == pytest.approx(sum(kls) / len(kls), rel=1e-4)
    assert row.top1_agreement == pytest.approx(sum(same) / len(same))
    expected = torch.tensor(kls, dtype=torch.double).quantile(0.99).item()
    assert row.kl_p99 == pytest.approx(expected, rel=1e-4)
    losses = [sum(map(sum, token_losses(m, rows))) / len(kls) for m in (ours, theirs)]
    assert row.loss_difference == pytest.approx(losses[0] - losses[1], rel=1e-3, abs=1e-5)


@given(st.integers(0, 99))
def test_the_interval_holds_the_paired_difference(seed):
    row = measure(Bigram(seed), dataset(20, seed=seed), Reference(Bigram(seed + 1)))
    assert row.loss_difference_low < row.loss_difference < row.loss_difference_high


def test_one_window_has_no_error():
    row = measure(Bigram(), dataset(1), Reference(Bigram(1)))
    assert row.perplexity_error is row.loss_difference_low is row.kl_error is None
    assert row.kl_mean > 0


@pytest.mark.parametrize("keep", [0, 1000, 10**9])
def test_what_a_reference_keeps_changes_no_figure(keep):
    rows, theirs = dataset(9), Bigram(1)
    plain = measure(Bigram(), rows, Reference(Bigram(1))).as_dict()
    kept = Reference(theirs, keep)
    first, second = (measure(Bigram(), rows, kept).as_dict() for _ in range(2))
    assert plain == first == second
    assert theirs.calls == {0: 6, 1000: 5, 10**9: 3}[keep]  # 1000 bytes hold the last, small batch alone
    assert kept.keep >= 0


def test_another_vocabulary_is_refused():
    with pytest.raises(InputError, match="12"):
        measure(Bigram(), dataset(), Reference(Bigram(size=13)))


def test_padding_and_packing_change_no_figure():
    """Rows of unequal length share a batch; each token's loss is that of its row alone."""
    model, tok = make("llama"), tokenizer()
    records = data.records([{"prompt": "ab" * n, "completion": "cd" * n} for n in range(1, 7)])
    rows = data.encode(records, tok, 64, packing=False)
    packed = data.encode(records, tok, 64, packing=True)
    assert len(packed) < len(rows)
    one, four = (measure(model, rows, batch_size=n) for n in (1, 4))
    assert one.tokens == four.tokens == measure(model, packed).tokens
    assert four.loss == pytest.approx(one.loss, rel=1e-5)
    assert measure(model, packed).loss == pytest.approx(one.loss, rel=1e-5)


def test_progress_is_told():
    seen = []
    measure(Bigram(), dataset(9), on_batch=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


# ---- the errors


def test_the_error_is_that_of_repeated_draws():
    """Bootstrapped over windows, against the spread of the loss over many data sets of the same size."""
    model = Bigram(spread=2.0)
    rows = [measure(model, dataset(40, seed=s)) for s in range(150)]
    spread = torch.tensor([r.loss for r in rows]).std().item()
    said = torch.tensor([r.perplexity_error / r.perplexity for r in rows]).mean().item()
    assert said == pytest.approx(spread, rel=0.2)


def test_the_interval_covers_the_true_difference_about_19_times_in_20():
    ours, theirs = Bigram(0), Bigram(1)
    many = dataset(4000, seed=10**6)
    truth = measure(ours, many, Reference(theirs), batch_size=500).loss_difference
    inside = 0
    for s in range(150):
        row = measure(ours, dataset(30, seed=s), Reference(theirs), batch_size=30)
        inside += row.loss_difference_low <= truth <= row.loss_difference_high
    assert 0.87 <= inside / 150 <= 0.99


def test_windows_are_what_is_resampled():
    """Tokens of a window are not independent: copies of a window inside a row must not shrink the error."""
    short = dataset(12, length=10)
    copied = Dataset(
        [
            EncodedRow(r.input_ids.repeat(4), r.targets.repeat(4), torch.arange(4).repeat_interleave(10))
            for r in short.rows
        ],
        "text",
        "",
    )
    a, b = (measure(Bigram(), rows) for rows in (short, copied))
    assert b.loss == pytest.approx(a.loss, rel=1e-6)
    assert b.perplexity_error == pytest.approx(a.perplexity_error, rel=1e-6)


def test_the_same_figures_every_time():
    first, second = (measure(Bigram(), dataset(), Reference(Bigram(1))).as_dict() for _ in range(2))
    assert first == second


@given(st.lists(st.booleans(), min_size=1, max_size=200))
def test_a_share_and_its_error(right):
    share, error = share_and_error(torch.tensor(right).double())
    assert share == pytest.approx(sum(right) / len(right))
    assert error == pytest.approx(math.sqrt(share * (1 - share) / len(right)), abs=1e-9)


# ---- tasks


class Echo(nn.Module):
    """A causal model that finds one given continuation likely whatever came before."""

    def __init__(self, text: str, tok) -> None:
        super().__init__()
        self.ids = tok(text)["input_ids"]
        self.size = len(tok)

    def forward(self, input_ids, **_):
        logits = torch.zeros(*input_ids.shape, self.size)
        logits[..., self.ids] = 5.0
        return SimpleNamespace(logits=logits)


def test_accuracy_is_by_the_likeliest_label():
    tok = tokenizer()
    records = data.records([{"text": f"t{i}", "label": "aaa" if i % 4 else "bbb"} for i in range(8)])
    assert accuracy(Echo("a", tok), records, tok) == (0.75, pytest.approx((0.75 * 0.25 / 8) ** 0.5))
    assert accuracy(Echo("b", tok), records, tok)[0] == 0.25


def test_classification_of_a_tiny_bert():
    model, tok = make("bert", num_labels=2), tokenizer()
    records = data.records([{"text": "x" * n, "label": "ab"[n % 2]} for n in range(1, 12)])
    rows = data.encode_classification(records, tok, 32)
    row = classification(model, rows, batch_size=4)
    losses, right = [], []
    for r in rows.rows:
        with torch.no_grad():
            logits = model(r.input_ids[None]).logits[0]
        losses.append(F.cross_entropy(logits, torch.tensor(r.label)).item())
        right.append(int(logits.argmax()) == r.label)
    assert row.loss == pytest.approx(sum(losses) / 11, rel=1e-5)
    assert row.accuracy == pytest.approx(sum(right) / 11)
    assert row.windows == 11


# ---- budgets and the file


@pytest.mark.parametrize(
    ("row", "limits", "says"),
    [
        (Row(kl_mean=0.2), {"max_kl": 0.1}, "0.2000 is above --max-kl 0.1"),
        (Row(kl_mean=math.nan), {"max_kl": 0.1}, "--max-kl"),
        (Row(loss=3.0), {"max_loss": 2.0}, "3.0000 is above --max-loss 2.0"),
        (Row(loss=math.nan), {"max_loss": 2.0}, "--max-loss"),
    ],
)
def test_a_limit_that_is_exceeded(row, limits, says):
    with pytest.raises(BudgetExceeded, match=says):
        check_budget(row, limits.get("max_kl"), limits.get("max_loss"))


def test_limits_that_are_kept():
    check_budget(Row(kl_mean=0.1, loss=2.0), 0.1, 2.0)
    check_budget(Row(), None, None)
    check_budget(Row(kl_mean=0.0, loss=0.0), 0.0, 0.0)


def test_a_kl_limit_needs_a_reference():
    with pytest.raises(InputError, match="--against"):
        check_budget(Row(loss=1.0), 0.1, None)


def test_the_ledger_grows_by_a_line_a_stage(tmp_path):
    for stage in ("a", "b"):
        evaluate.write_ledger(tmp_path, stage, Row(loss=1.0).as_dict())
    rows = json.loads((tmp_path / "ledger.json").read_text())
    assert [r["stage"] for r in rows] == ["a", "b"]
    wanted = {"perplexity", "perplexity_error", "loss", "loss_difference", "loss_difference_low",
              "loss_difference_high", "kl_mean", "kl_error", "kl_p99", "top1_agreement", "accuracy", "tokens",
              "context", "bytes", "bits_per_weight"}  # fmt: skip
    assert wanted <= rows[0].keys()


def test_the_error_of_a_quantile_is_that_of_theory_and_grows_where_windows_repeat_themselves():
    windows, per, g = 1000, 4, torch.Generator().manual_seed(0)
    picks = torch.randint(windows, (200, windows), generator=g)
    owner = torch.arange(windows).repeat_interleave(per)
    apart = torch.rand(windows * per, generator=g, dtype=torch.double)
    alike = torch.rand(windows, generator=g, dtype=torch.double).repeat_interleave(per)
    # of n uniform numbers the q-quantile has the standard error sqrt(q (1 - q) / n)
    for values, n in ((apart, windows * per), (alike, windows)):
        assert evaluate._quantile_error(values, 0.9, owner, picks) == pytest.approx((0.09 / n) ** 0.5, rel=0.3)


@pytest.mark.parametrize("whose", ["model", "reference"])
def test_what_computes_nan_has_no_figures(whose):
    sound, broken = Bigram(), Bigram()
    broken.table.data[:, 3] = float("nan")
    mine, other = (broken, sound) if whose == "model" else (sound, broken)
    with pytest.raises(InputError, match=f"the {whose} computes NaN"):
        measure(mine, dataset(), Reference(other))
