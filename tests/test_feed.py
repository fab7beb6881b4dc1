"""What blocks are given, and which op of a block closes it."""

import pytest

from halfbyte import data, feed, models
from miniatures import folder, tokenizer

CLOSING = {"llama": "mlp.down_proj", "gpt2": "mlp.c_proj", "neox": "mlp.dense_4h_to_h", "opt": "fc2", "gemma3": None}


@pytest.mark.parametrize("name", CLOSING)
def test_which_op_of_a_block_closes_it(tmp_path, name):
    model = models.load(folder(tmp_path / "m", name)).model
    _, block = models.blocks(model)[0]
    rows = data.encode(data.records([{"text": "some words, and more of them"}]), tokenizer(), 12)
    fed = feed.Feed(model, [block], list(data.eval_batches(rows, 1, 0)))
    assert fed.closing(0) == CLOSING[name]
