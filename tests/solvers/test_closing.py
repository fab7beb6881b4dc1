"""The weight that closes a block: what the block gives without it, and what is made of what is missing."""

import pytest
import torch

from halfbyte import data, feed, models
from halfbyte.kernels import half
from halfbyte.layers import ops
from halfbyte.solvers import closing
from halfbyte.solvers.form import Form
from miniatures import folder, tokenizer

CLOSING = {"llama": "mlp.down_proj", "gpt2": "mlp.c_proj", "neox": "mlp.dense_4h_to_h", "opt": "fc2"}


@pytest.mark.parametrize("name", CLOSING)
@pytest.mark.parametrize("fast", [False, True])
def test_with_what_is_left_of_it_a_block_gives_what_it_gives(tmp_path, monkeypatch, name, fast):
    """Also once the closing weight is another, as it is when it has its codes."""
    monkeypatch.setattr(half, "fast", lambda: fast)
    model = models.load(folder(tmp_path / "m", name)).model
    _, block = models.blocks(model)[0]
    rows = data.encode(data.records([{"text": f"the {n} of some words"} for n in range(3)]), tokenizer(), 12)
    fed = feed.Feed(model, [block], list(data.eval_batches(rows, 1, 0)))
    # where a block adds its two halves to each other first, that sum is in bfloat16 too
    near = {"rtol": 1e-2, "atol": 1e-2} if fast and name == "neox" else {"rtol": 1e-5, "atol": 1e-6}
    fed.half, op = fast, dict(ops(block))[CLOSING[name]]
    left = closing.parts(block, fed.calls(0), op)
    for w in (op.weight.value() * 10, op.weight.value() * -30):
        op.weight.store(w)
        outputs = [part.closed(op) for part in left]
        for mine, whole, part in zip(outputs, fed.run(0), left, strict=True):
            torch.testing.assert_close(mine, whole, **near)
            assert (mine - part.rest).abs().max() > 0.05
    assert not op._forward_hooks


def fed():
    """(700, 64): inputs, some of them alike."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(700, 64, generator=g) @ torch.randn(64, 64, generator=g) * 0.1
    return x + torch.randn(700, 64, generator=g) * torch.rand(64, generator=g) * 2


def halves(x, e):
    """The form of inputs, and over either half of the text the sum of what is missing on them, by all tokens."""
    both = torch.stack([a.T @ b for a, b in zip(e.tensor_split(2), x.tensor_split(2), strict=True)])
    return Form.of(x.T @ x / len(x)), both / len(x)


def test_what_both_halves_of_the_text_agree_on_is_wholly_trusted():
    x = fed().repeat(2, 1)
    turn = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    form, missing = halves(x, x @ turn.T)
    expected = torch.linalg.solve(form.h, missing.sum(0).T).T
    change, share = closing.regression(form, missing)
    torch.testing.assert_close(change, expected, atol=1e-3, rtol=1e-3)
    assert share == 1


def test_nothing_is_made_of_what_one_half_of_the_text_denies_the_other():
    x, turn = fed(), torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    sign = torch.ones(len(x), 1)
    sign[len(x) // 2 :] = -1
    form, missing = halves(x, sign * (x @ turn.T))
    change, share = closing.regression(form, missing)
    assert change.abs().max() == share == 0


def test_of_noise_little_is_taken_for_a_loss():
    """Where inputs say nothing of what is missing, what is found costs less on other text than a plain regression."""
    x = fed()
    g = torch.Generator().manual_seed(1)
    noise = torch.randn(len(x), 8, generator=g)
    form, missing = halves(x, noise)
    plain = torch.linalg.lstsq(x, noise).solution.T
    change, share = closing.regression(form, missing)
    assert share < 0.5
    assert (x @ change.T).norm() < 0.5 * (x @ plain.T).norm()
