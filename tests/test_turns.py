"""A block's calls, each waiting where a weight has no codes yet."""

import pytest
import torch

from halfbyte import data, feed, models
from halfbyte.kernels import half
from halfbyte.layers import ops
from halfbyte.turns import Turns, together
from miniatures import folder, tokenizer

ORDER = {
    "llama": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "gpt2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
    "opt": [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]],
}


def first(tmp_path, name, calls=3):
    """The first block of a miniature, and what it is fed."""
    model = models.load(folder(tmp_path / "m", name)).model
    _, block = models.blocks(model)[0]
    rows = data.encode(data.records([{"text": f"the {n} of some words"} for n in range(calls)]), tokenizer(), 12)
    return block, feed.Feed(model, [block], list(data.eval_batches(rows, 1, 0)))


def ordered(block, fed):
    with together(dict(ops(block))) as order:
        fed.run(0)
    return order


@pytest.mark.parametrize("name", ORDER)
def test_ops_that_are_fed_the_same_have_their_turn_together(tmp_path, name):
    order = ordered(*first(tmp_path, name))
    assert [[n.rpartition(".")[2] for n in names] for names in order] == ORDER[name]


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "gemma3", "mixtral", "qwen3-moe"])
@pytest.mark.parametrize("fast", [False, True])
def test_each_op_is_told_what_those_before_it_give_with_the_weights_that_they_got(tmp_path, monkeypatch, name, fast):
    monkeypatch.setattr(half, "fast", lambda: fast)
    block, fed = first(tmp_path, name)
    inside, order = dict(ops(block)), ordered(block, fed)
    fed.half = fast
    turns, told = Turns(block, fed.calls(0), inside, order), {}
    for names, xs in turns:
        assert not torch.is_autocast_enabled("cpu")  # what is solved meanwhile is multiplied as ever
        for n in names:
            told[n] = xs
            inside[n].weight.store(inside[n].weight.value() * -1.5)
    again = {n: [] for n in inside}
    for n, op in inside.items():
        op.register_forward_pre_hook(lambda m, args, n=n: again[n].append(args[0]))
    after = fed.run(0)
    assert {n for n in inside if again[n]} == set(told)
    assert all(torch.equal(turns.given[i], y) for i, y in enumerate(after))
    for n, xs in told.items():
        assert len(xs) == len(again[n])
        assert all(torch.equal(a, b) for a, b in zip(xs, again[n], strict=True))


def test_an_op_that_no_turn_was_known_of_has_one_of_its_own(tmp_path):
    block, fed = first(tmp_path, "llama")
    inside, order = dict(ops(block)), ordered(block, fed)
    names = [names for names, _ in Turns(block, fed.calls(0), inside, order[1:])]
    assert sorted(names) == sorted([*([n] for n in order[0]), *order[1:]])


def test_what_is_left_early_waits_no_longer(tmp_path):
    block, fed = first(tmp_path, "llama")
    inside, order = dict(ops(block)), ordered(block, fed)
    turns = iter(Turns(block, fed.calls(0), inside, order))
    assert next(turns)[0] == order[0]
    turns.close()
    assert not any(op._forward_pre_hooks for op in inside.values())
    assert len(fed.run(0)) == len(fed.calls(0))


def test_an_error_inside_a_block_is_the_drivers(tmp_path):
    block, fed = first(tmp_path, "llama")
    inside, order = dict(ops(block)), ordered(block, fed)

    def fails(*_):
        raise ValueError("in the middle")

    inside["self_attn.o_proj"].register_forward_hook(fails)
    with pytest.raises(ValueError, match="in the middle"):
        list(Turns(block, fed.calls(0), inside, order))
    assert not any(op._forward_pre_hooks for op in inside.values())
