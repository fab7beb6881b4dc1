"""The names of parameters in memory and in a folder."""

import pytest
import torch
from torch import nn

from halfbyte.layers import swap
from halfbyte.models.names import Names
from miniatures import EXPERTS, MINIATURES, OTHERS, make

TWO = {
    "mixtral": {
        "model.layers.1.mlp.experts.3.gate_proj.weight": "model.layers.1.block_sparse_moe.experts.3.w1.weight",
        "model.layers.1.mlp.experts.3.up_proj.bias": "model.layers.1.block_sparse_moe.experts.3.w3.bias",
        "model.layers.1.mlp.experts.3.down_proj.weight": "model.layers.1.block_sparse_moe.experts.3.w2.weight",
        "model.layers.1.mlp.gate.weight": "model.layers.1.block_sparse_moe.gate.weight",
        "model.layers.1.self_attn.q_proj.weight": "model.layers.1.self_attn.q_proj.weight",
    },
    "qwen3-moe": {
        "model.layers.1.mlp.experts.3.gate_proj.weight": "model.layers.1.mlp.experts.3.gate_proj.weight",
    },
    "neox": {"lm_head.weight": "embed_out.weight"},
    "vit": {
        "vit.layers.0.attention.q_proj.weight": "vit.encoder.layer.0.attention.attention.query.weight",
        "vit.layers.0.mlp.fc2.bias": "vit.encoder.layer.0.output.dense.bias",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", TWO)
def test_both_names(name):
    names = Names(swap(make(name)))
    for held, stored in TWO[name].items():
        assert names.stored(held) == stored
        assert names.held(stored) == held
        assert names.held(held) == held


@pytest.mark.parametrize("name", [*MINIATURES, *OTHERS])
def test_every_name_comes_back(name):
    model = swap(make(name))
    names = Names(model)
    for n, _ in model.named_parameters(remove_duplicate=False):
        own = n.removesuffix(".stored")
        assert names.held(names.stored(own)) == own


@pytest.mark.parametrize("name", EXPERTS)
def test_parts_of_fused_parameters_go_together_again(name):
    model = make(name)
    fused = {n: p.detach() for n, p in model.named_parameters() if ".experts." in n}
    names = Names(swap(model))
    parts = [(n.removesuffix(".stored"), p.detach()) for n, p in model.named_parameters() if ".experts." in n]
    together = names.together(["model.layers.0.self_attn.q_proj"])
    joined = {names.held(n): t for n, t in names.folder(reversed(parts), together)}
    assert joined.keys() == fused.keys()
    assert all(torch.equal(joined[n], fused[n]) for n in fused)


def test_experts_of_codes_stay_apart():
    names = Names(swap(make("gpt-oss")))
    all_floats, one = names.together([]), names.together(["model.layers.0.mlp.experts.1.up_proj"])
    assert {n.split(".")[2] for n in all_floats} == {"0", "1"}
    assert {n.split(".")[2] for n in one} == {"1"}
    assert not Names(swap(make("mixtral"))).together([])  # there are names for each


def test_a_plain_module_has_one_name():
    names = Names(nn.Sequential(nn.Linear(2, 2)))
    assert names.stored("0.weight") == names.held("0.weight") == "0.weight"
