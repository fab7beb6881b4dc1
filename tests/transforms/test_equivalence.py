"""What a transform makes of a model computes what the model computed: in float64, as stored, and read by others."""

import json
from types import MethodType

import pytest
import torch
import transformers

from halfbyte import InputError, models
from halfbyte.formats import parse
from halfbyte.layers import Linear, ops, swap
from halfbyte.models import edges
from halfbyte.transforms import TRANSFORMS, Fed, Target, folding, hadamard, transform
from miniatures import IDS, folder, logits, make

NAMES = ["llama", "llama-untied", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "gpt2", "neox", "opt"]
PAIRS = [(name, by) for name in NAMES for by in TRANSFORMS if (name, by) != ("gemma3", "hadamard")]
TARGET = Target(parse("int4-g32"), parse("int8-token"))


def exact(model):
    """The model with norms that stay in float64, where transformers' round to float32."""

    def forward(self, x):
        gain = 1 + self.weight if "Gemma" in type(self).__name__ else self.weight
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps[self]) * gain

    eps = {}
    for m in model.modules():
        if type(m).__name__.endswith("RMSNorm"):
            eps[m] = getattr(m, "eps", None) or m.variance_epsilon
            m.forward = MethodType(forward, m)
    return model


def fed(model):
    """Inputs of every layer, some of them far larger than others."""
    out = {}
    for name, op in ops(model):
        if isinstance(op, Linear):
            x = torch.randn(24, op.in_features) * 4 ** torch.randn(op.in_features)
            out[name] = Fed(x.abs().amax(0), x)
    return out


def transformed(model, by, target=TARGET):
    """The model, in place; and what the transform notes of it."""
    if by == "hadamard" and edges(model).tied:
        models.untie(model)
    known = fed(model)
    return transform(by).apply(model, edges(model), known, dict.fromkeys(known, target), 0)


@pytest.mark.parametrize(("name", "by"), PAIRS)
def test_the_float_model_computes_the_same(name, by):
    model = exact(swap(make(name, torch.float64)))
    before, weights = logits(model), {n: op.weight.base().clone() for n, op in ops(model)}
    noted = transformed(model, by)
    assert (logits(model) - before).abs().max() < 1e-9 * before.abs().max()
    changed = {n for n, op in ops(model) if not torch.equal(op.weight.base(), weights[n])}
    if by == "hadamard":
        assert changed == set(weights)
    else:
        edges_of = [e for block in edges(model).blocks for e in block]
        assert 0 < noted["scaled"] <= len(edges_of)
        assert changed
        assert changed <= {n for e in edges_of for n in (e.source, *e.readers)}


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "neox", "opt"])
def test_transforms_follow_one_another(name):
    model = exact(swap(make(name, torch.float64)))
    before = logits(model)
    for by in ("smooth", "hadamard", "awq"):
        transformed(model, by)
    assert (logits(model) - before).abs().max() < 1e-9 * before.abs().max()


@pytest.mark.parametrize(("name", "by"), PAIRS)
def test_plain_transformers_reads_the_same_model_from_the_folder(tmp_path, name, by):
    loaded = models.load(folder(tmp_path / "m", name))
    before = logits(loaded.model)
    transformed(loaded.model, by)
    (tmp_path / "out").mkdir()
    models.save(loaded, tmp_path / "out")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        after = theirs.eval()(IDS).logits
    assert (after - before).abs().max() < 2e-5  # float32: 2^-24 a rounding, and scales of up to 4^6
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    given = json.loads((tmp_path / "m" / "config.json").read_text())
    assert {k for k in {*saved, *given} if saved.get(k) != given.get(k)} <= {"tie_word_embeddings"}


@pytest.mark.parametrize("by", TRANSFORMS)
def test_weights_are_rounded_to_their_dtype_once_for_each_end_that_is_changed(by):
    model = swap(make("llama-untied", torch.float64))
    small = swap(make("llama-untied", torch.bfloat16))
    with torch.no_grad():
        for (_, ours), (_, theirs) in zip(model.named_parameters(), small.named_parameters(), strict=True):
            ours.copy_(theirs)
    known = fed(model)
    for m in (model, small):
        transform(by).apply(m, edges(m), known, dict.fromkeys(known, TARGET), 0)
    for (_, ours), (name, theirs) in zip(model.named_parameters(), small.named_parameters(), strict=True):
        assert theirs.dtype == torch.bfloat16
        both = any(part in name for part in ("v_proj", "o_proj", "up_proj"))  # as what reads, then as what gives
        mixed = ours.abs().max().item() if both and by == "hadamard" else 0.0
        torch.testing.assert_close(theirs.double(), ours.double(), rtol=2 * 2**-8 if both else 2**-8, atol=mixed / 256)


def test_a_size_that_the_dtype_cannot_hold_is_refused():
    model = swap(make("llama", torch.float16))
    edge = edges(model).blocks[0][0]
    with pytest.raises(InputError, match=r"input_layernorm.*float16"):
        folding.scale(model, edge, torch.full((64,), 1e-6, dtype=torch.float64), False)


@pytest.mark.parametrize("n", [1, 2, 12, 20, 28, 36, 60, 64, 76, 96, 576, 768])
def test_a_rotation_is_made_of_signs_where_such_a_matrix_exists(n):
    r = hadamard.rotation(n, torch.Generator().manual_seed(0))
    torch.testing.assert_close(r @ r.T, torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(r.abs(), torch.full_like(r, n**-0.5))


@pytest.mark.parametrize("n", [3, 9, 18, 50, 52, 92])
def test_other_widths_are_turned_too(n):
    r = hadamard.rotation(n, torch.Generator().manual_seed(0))
    torch.testing.assert_close(r @ r.T, torch.eye(n, dtype=torch.float64))
    assert (r.abs() < 0.99).all() or n == 1


@pytest.mark.parametrize("n", [2, 9, 64, 576])
def test_a_rotation_may_leave_the_mean_of_channels_alone(n):
    r = hadamard.rotation(n, torch.Generator().manual_seed(0), means=True)
    torch.testing.assert_close(r @ r.T, torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(r.sum(1), torch.ones(n, dtype=torch.float64))


def test_the_seed_decides_the_rotation():
    first, second, other = (hadamard.rotation(64, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_what_cannot_be_turned_is_refused_in_words():
    tied, post = swap(make("llama")), swap(make("gemma3"))
    for model, words in ((tied, "--untie"), (post, "norms with weights of their own")):
        before = logits(model)
        with pytest.raises(InputError, match=words):
            hadamard.apply(model, edges(model), {}, {}, 0)
        assert torch.equal(logits(model), before)
    blind = swap(make("neox"))
    with torch.no_grad():
        blind.gpt_neox.layers[1].input_layernorm.weight[3] = 0
    with pytest.raises(InputError, match=r"layers.1.input_layernorm"):
        hadamard.apply(blind, edges(blind), {}, {}, 0)


@pytest.mark.parametrize("name", ["mixtral", "bert"])
def test_an_architecture_without_a_row_is_refused(name):
    with pytest.raises(InputError, match=r"have no row.*llama"):
        edges(swap(make(name)))


def test_a_layer_that_the_row_does_not_know_is_refused():
    model = swap(make("llama"))
    model.model.layers[1].mlp.extra = swap(torch.nn.Linear(64, 64))
    with pytest.raises(InputError, match=r"layers.1.mlp.extra"):
        edges(model)
    other = swap(make("opt", activation_function="gelu"))
    with pytest.raises(InputError, match="relu"):
        edges(other)
