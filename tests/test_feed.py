"""What blocks are given, and which ops of a block close it."""

import pytest

from halfbyte import data, feed, models
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
