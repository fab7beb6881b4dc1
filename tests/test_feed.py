"""What blocks are given, and which ops of a block close it."""

import pytest
import torch

from halfbyte import data, feed, models
from halfbyte.layers import ops
from miniatures import folder, tokenizer

ENDS = {
    "llama": ["self_attn.o_proj", "mlp.down_proj"],
    "gpt2": ["attn.c_proj", "mlp.c_proj"],
    "neox": ["attention.dense", "mlp.dense_4h_to_h"],  # beside each other
    "opt": ["self_attn.out_proj", "fc2"],
    "falcon": ["self_attention.dense", "mlp.dense_4h_to_h"],  # added up in place
    "gemma3": [],
    "mixtral": [],  # experts are used by some tokens each
}


def given(tmp_path, name):
    """The first block of a miniature, and what it is fed."""
    model = models.load(folder(tmp_path / "m", name)).model
    _, block = models.blocks(model)[0]
    rows = data.encode(data.records([{"text": "some words, and more of them"}]), tokenizer(), 12)
    return block, feed.Feed(model, [block], list(data.eval_batches(rows, 1, 0)))


@pytest.mark.parametrize("name", ENDS)
def test_which_ops_of_a_block_add_to_what_it_is_fed(tmp_path, name):
    assert given(tmp_path, name)[1].ends(0) == ENDS[name]


@pytest.mark.parametrize("name", [n for n, ends in ENDS.items() if ends])
def test_up_to_the_op_that_closes_it_a_block_feeds_all_others_as_ever(tmp_path, name):
    block, fed = given(tmp_path, name)
    inside = dict(ops(block))
    last = inside[ENDS[name][-1]]
    others = [n for n in inside if n != ENDS[name][-1]]
    found = []
    for run in (lambda: fed.run(0), lambda: fed.until(0, last)):
        with feed.watching(inside, others, "gram") as seen:
            run()
        found.append(seen.moments())
    assert found[0].keys() == found[1].keys() == set(others)
    assert all(torch.equal(found[0][n].gram, found[1][n].gram) for n in others)
    last.register_forward_hook(lambda *_: pytest.fail("the closing op was run"))
    fed.until(0, last)
