"""Architectures in GGUF: what a model becomes in a file, and what is made of a file again."""

from __future__ import annotations

import re

import pytest
import torch
import transformers

import miniatures
from halfbyte import kernels, models
from halfbyte.containers import gguf as container
from halfbyte.errors import InputError
from halfbyte.formats import FORMATS
from halfbyte.layers import Codes, ops
from halfbyte.models import gguf, gguf_saving
from miniatures import folder, logits

NAMES = ["llama", "llama-untied", "mistral", "qwen2", "qwen3", "phi3", "gemma3", "gpt2"]
# transformers' own reader guesses head sizes, ids and sliding layers; where it need not, it must agree
FOREIGN = ["llama", "llama-untied", "qwen2"]


def file_of(path, name="llama", formats=None, floats=None, **own):
    """A miniature's folder and the GGUF file made of it."""
    base = folder(path / "base", name, **own)
    loaded = models.load(base)
    gguf_saving.save(loaded, path / "m.gguf", formats or {}, floats)
    return base, path / "m.gguf"


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_the_model_again(tmp_path, name):
    base, file = file_of(tmp_path, name)
    there = models.load(file, torch.float32)
    assert torch.equal(logits(there.model), logits(models.load(base).model))
    assert type(there.model).__name__ == miniatures.MINIATURES[name][0].replace("Mistral", "Llama")


@pytest.mark.parametrize("name", FOREIGN)
def test_transformers_reads_the_same(tmp_path, name):
    base, file = file_of(tmp_path, name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    torch.testing.assert_close(logits(theirs.eval()), logits(models.load(base).model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("to", ["q8_0", "q4_1"])
def test_codes_are_those_of_the_model(tmp_path, name, to):
    """Rounding while writing gives what rounding in memory gives, in transformers' order of rows."""
    base = folder(tmp_path / "base", name)
    loaded = models.load(base)
    matrices = {n: op.weight.base() for n, op in ops(loaded.model) if n not in models.tied(loaded.model)}
    gguf_saving.save(loaded, tmp_path / "m.gguf", dict.fromkeys(matrices, FORMATS[to]))
    there = dict(ops(models.load(tmp_path / "m.gguf").model))
    for n, w in matrices.items():
        stored = there[n].weight.stored
        assert isinstance(stored, Codes)
        assert torch.equal(stored.q.codes, kernels.quantize(w, to).codes), n


def test_a_file_made_of_a_file_is_the_same(tmp_path):
    _, file = file_of(tmp_path, "llama", dict.fromkeys(["model.layers.0.self_attn.q_proj"], FORMATS["q4_0"]))
    gguf_saving.save(models.load(file, torch.float32), tmp_path / "n.gguf", {})
    a, b = container.File(file), container.File(tmp_path / "n.gguf")
    assert list(a) == list(b)
    for name in a:
        assert a.infos[name].type == b.infos[name].type
        assert torch.equal(a.bytes(name), b.bytes(name)), name
    rest = {k: v for k, v in a.metadata.items() if k != "general.name"}
    assert rest == {k: v for k, v in b.metadata.items() if k != "general.name"}


def test_floats_stay_on_disk_until_they_are_written(tmp_path):
    base = folder(tmp_path / "base", "llama")
    loaded = models.load(base, weights=False)
    gguf_saving.save(loaded, tmp_path / "m.gguf", {"model.layers.1.mlp.up_proj": FORMATS["q8_0"]})
    assert all(p.device.type == "meta" for p in loaded.model.parameters())
    whole = models.load(base)
    gguf_saving.save(whole, tmp_path / "n.gguf", {"model.layers.1.mlp.up_proj": FORMATS["q8_0"]})
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "n.gguf").read_bytes()


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        ({"rope_type": "linear", "factor": 2.0}, ("linear", 2.0)),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, ("yarn", 4.0)),
    ],
)
def test_rotary_scaling(tmp_path, rope, said):
    base, file = file_of(tmp_path, "llama", rope_parameters={"rope_theta": 5e5, **rope})
    found = container.File(file).metadata
    assert (found["llama.rope.scaling.type"], found["llama.rope.scaling.factor"]) == said
    assert torch.equal(logits(models.load(file, torch.float32).model), logits(models.load(base).model))


def test_llama_3s_rotary_scaling_is_a_tensor(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip
    base, file = file_of(tmp_path, "llama", rope_parameters=rope, head_dim=64)
    factors = container.File(file).get("rope_freqs.weight", torch.float32)
    assert isinstance(factors, torch.Tensor)
    theirs = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](models.load(base).config, "cpu")[0]
    plain = 1.0 / 5e5 ** (torch.arange(0, 64, 2) / 64)
    torch.testing.assert_close(plain / factors, theirs)
    assert torch.equal(logits(models.load(file, torch.float32).model), logits(models.load(base).model))


@pytest.mark.parametrize(
    ("name", "own", "words"),
    [
        ("gemma3", {"query_pre_attn_scalar": 32}, "no word for query_pre_attn_scalar = 32"),
        ("llama", {"hidden_act": "gelu"}, "no word for hidden_act = gelu"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "scaling of type dyn",
        ),
        ("neox", {}, "models of type gpt_neox are not written"),
        ("mixtral", {}, "models of type mixtral are not written"),
    ],
)
def test_what_a_file_cannot_say_is_refused(tmp_path, name, own, words):
    loaded = models.load(folder(tmp_path / "base", name, **own))
    assert words in (gguf_saving.refuses(loaded, {}) or "")
    with pytest.raises(InputError, match=re.escape(words)):
        gguf_saving.save(loaded, tmp_path / "m.gguf", {})
    assert not (tmp_path / "m.gguf").exists()


def test_values_that_a_dtype_cannot_hold_are_refused(tmp_path):
    loaded = models.load(folder(tmp_path / "base", "llama"))
    dict(ops(loaded.model))["model.layers.0.mlp.up_proj"].weight.base()[0, 0] = 1e5
    with pytest.raises(InputError, match=r"up_proj.weight: its largest value, 1e\+05, is more than.*BF16"):
        gguf_saving.save(loaded, tmp_path / "m.gguf", {}, torch.float16)


def rewritten(file, path, drop=(), change=None, add=None):
    """The file again, some of it otherwise."""
    f = container.File(file)
    said = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in f.metadata.items()}
    tensors = {n: f.get(n, torch.float32) for n in f if n not in drop} | (add or {})
    heads = {n: (container.kind_of(t), tuple(t.shape)) for n, t in tensors.items()}
    container.write(path, {**said, **(change or {})}, heads, tensors.items())
    return path


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"drop": ["blk.1.ffn_up.weight"]}, "lacks the tensor blk.1.ffn_up.weight"),
        ({"drop": ["token_embd.weight"]}, "no token_embd.weight"),
        (
            {"add": {"blk.0.attn_gate.weight": torch.zeros(4, 4)}},
            "blk.0.attn_gate.weight is no part of LlamaForCausalLM",
        ),
        ({"change": {"llama.block_count": 0}}, "llama.block_count is 0"),
        ({"change": {"llama.block_count": 1 << 31}}, "llama.block_count is"),
        ({"change": {"llama.attention.head_count": "four"}}, "llama.attention.head_count is four"),
        ({"change": {"llama.attention.head_count": 3}}, "describes no model that can be made"),
        ({"change": {"llama.feed_forward_length": 96}}, "gate_proj.weight has the shape (128, 64)"),
        ({"change": {"llama.rope.scaling.type": "longrope"}}, "rotary scaling of type longrope"),
        ({"add": {"rope_freqs.weight": torch.full((8,), 3.0)}}, "rope_freqs.weight is not Llama 3's"),
    ],
)
def test_files_that_make_no_sense_are_refused(tmp_path, how, words):
    _, file = file_of(tmp_path, "llama")
    broken = rewritten(file, tmp_path / "broken.gguf", **how)
    with pytest.raises(InputError, match=re.escape(words)):
        models.load(broken)


def test_another_architecture_goes_through_transformers(tmp_path):
    """Of a row that halfbyte lacks, transformers reads the floats."""
    _, file = file_of(tmp_path, "qwen2")
    rows = gguf.ARCHITECTURES.pop("qwen2")
    try:
        there = models.load(file, torch.float32)
    finally:
        gguf.ARCHITECTURES["qwen2"] = rows
    assert torch.equal(logits(there.model), logits(models.load(file, torch.float32).model))
