"""Keys and values as codes: rounded once, read the same however tokens come, and smaller in memory."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import DynamicIndexedLayer, DynamicLayer, LinearAttentionLayer

import halfbyte
from halfbyte import data, evaluate, kernels, kv_cache
from halfbyte.generate import generate
from halfbyte.kv_cache import Tokens
from halfbyte.steps import Evaluate
from miniatures import folder, make, tokenizer

NAMES = ["llama", "qwen3", "gpt2", "neox", "opt", "gemma3"]  # gemma3: a sliding window of 8
IDS = torch.randint(3, 99, (2, 30), generator=torch.Generator().manual_seed(0))


def run(model, f, pieces):
    """Logits of IDS, given to the model in pieces, and what it then keeps."""
    kept = kv_cache.floats(model) if f is None else kv_cache.quantized(model, kv_cache.parse(f))
    with torch.no_grad():
        return torch.cat([model(input_ids=piece, **kept).logits for piece in IDS.split(pieces, 1)], 1), kept


# ---- tokens


@pytest.mark.parametrize("name", ["int8-channel", "uint8-channel", "q8_0", "int4-g32", "uint4-g32", "fp8-e4m3-channel"])
@pytest.mark.parametrize("pieces", [[1] * 200, [150, 1, 49], [200]])
def test_tokens_are_those_that_came_each_rounded_by_itself(name, pieces):
    x = torch.randn(2, 3, 200, 32)
    tokens = Tokens(kv_cache.parse(name))
    for piece in x.split(pieces, 2):
        tokens.add(piece)
    wanted = kernels.quantize(x, name).dequantize()
    assert torch.equal(tokens.value(), wanted)
    assert len(tokens) == 200
    tokens.keep(7)
    assert torch.equal(tokens.value(), wanted[:, :, -7:])
    tokens.select(torch.tensor([1, 1]))
    assert torch.equal(tokens.value(), wanted[[1, 1], :, -7:])


def test_a_window_that_slides_for_long_takes_no_more_memory():
    tokens, x = Tokens(kv_cache.parse("int8")), torch.randn(1, 1, 500, 64)
    wanted = kernels.quantize(x, "int8-channel").dequantize()
    for i in range(500):
        tokens.add(x[:, :, i : i + 1])
        tokens.keep(40)
        assert tokens.nbytes <= (40 + 1 + 64) * (64 + 4)
        assert torch.equal(tokens.value(), wanted[:, :, max(0, i - 39) : i + 1])


# ---- models


@pytest.mark.parametrize("name", NAMES)
def test_it_makes_no_difference_how_tokens_come(name):
    model = make(name)
    whole, _ = run(model, "int8", [30])
    for pieces in ([1] * 30, [12, 1, 1, 16], [3, 27]):
        torch.testing.assert_close(run(model, "int8", pieces)[0], whole, atol=1e-4, rtol=1e-4)


def rounded(monkeypatch):
    """Has transformers' own cache round what it is given; ours does not pass through it."""
    update = DynamicLayer.update

    def rounding(self, keys, values, *args, **kwargs):
        keys, values = (kernels.quantize(x, "int8-channel").dequantize() for x in (keys, values))
        return update(self, keys, values, *args, **kwargs)

    monkeypatch.setattr(DynamicLayer, "update", rounding)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "gemma3"])
def test_attention_reads_rounded_keys_and_values(name, monkeypatch):
    """The same logits as with transformers' own cache, if each layer's keys and values are rounded before it."""
    model = make(name)
    ours, _ = run(model, "int8", [30])
    plain, _ = run(model, None, [30])
    rounded(monkeypatch)
    torch.testing.assert_close(run(model, None, [30])[0], ours, atol=1e-5, rtol=1e-5)
    assert 0 < (plain - ours).abs().max() < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_falls_by_what_the_codes_save(dtype):
    model = make("mistral", dtype, max_position_embeddings=2048)  # heads of 32
    ids = torch.randint(3, 99, (2, 1000))
    sizes = {}
    for f in (None, "int8", "int4-g32"):
        kept = kv_cache.floats(model) if f is None else kv_cache.quantized(model, kv_cache.parse(f))
        with torch.no_grad():
            model(input_ids=ids, **kept)
        sizes[f] = kv_cache.nbytes(kept)
    width = dtype.itemsize
    assert sizes[None] == 2 * 2 * 2 * 2 * 1000 * 32 * width  # keys and values, layers, rows, heads
    room = 1 + 1 / 8  # for tokens to come
    assert sizes["int8"] / sizes[None] <= room * (32 + width) / (32 * width)
    assert sizes["int4-g32"] / sizes[None] <= room * (16 + width) / (32 * width)


def test_a_beam_search_takes_other_rows(monkeypatch):
    model = make("llama")
    settings = {"num_beams": 4, "max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    ours = model.generate(IDS, **settings, **kv_cache.quantized(model, kv_cache.parse("int8")))
    rounded(monkeypatch)
    assert torch.equal(ours, model.generate(IDS, **settings))


def test_a_models_own_settings_do_not_matter(tiny_llama):
    loaded = halfbyte.load(tiny_llama)
    wanted = generate(loaded.model, loaded.tokenizer, "The fox", 20, cache="int8").text
    own = loaded.model.generation_config
    own.update(num_beams=3, cache_implementation="static")
    assert generate(loaded.model, loaded.tokenizer, "The fox", 20, cache="int8").text == wanted
    assert (own.num_beams, own.cache_implementation) == (3, "static")


def test_what_is_written_is_the_likeliest_through_the_same_cache(tiny_llama):
    loaded = halfbyte.load(tiny_llama)
    ids = loaded.tokenizer("The fox")["input_ids"]
    out = generate(loaded.model, loaded.tokenizer, "The fox", 12, cache="int4-g32")
    for _ in range(out.tokens):
        kept = kv_cache.quantized(loaded.model, kv_cache.parse("int4-g32"))
        with torch.no_grad():
            ids.append(int(loaded.model(torch.tensor([ids]), **kept).logits[0, -1].argmax()))
    assert loaded.tokenizer.decode(ids[-out.tokens :], skip_special_tokens=True) == out.text


# ---- the ledger


def test_the_ledger_measures_the_model_through_it(tiny_llama, tiny_data):
    row = {}
    for f in (None, "int8", "int4-g32"):
        made = halfbyte.load(tiny_llama)
        made.apply(Evaluate(data=str(tiny_data["text"]), against=str(tiny_llama), context=64, kv_cache=f))
        row[f] = made.rows[-1][1]
    assert row[None]["kl_mean"] == 0
    assert 0 < row["int8"]["kl_mean"] < row["int4-g32"]["kl_mean"]
    assert row["int8"]["conventions"] == row[None]["conventions"] + "; keys and values in int8-channel"


def test_labels_are_scored_through_it_and_packed_rows_are_refused(tiny_llama, tiny_data):
    made = halfbyte.load(tiny_llama)
    made.apply(Evaluate(data=str(tiny_data["label"]), context=64, kv_cache="int8"))
    assert made.rows[-1][1]["accuracy"] is not None
    rows = data.encode(data.read_records(tiny_data["label"]), made.tokenizer, 200)
    with pytest.raises(halfbyte.InputError, match="unpacked"):
        evaluate.measure(made.model, rows, cache=kv_cache.parse("int8"))


# ---- refusals


@pytest.mark.parametrize("name", ["nf4-g64", "int8-tensor", "q4_k", "nvfp4"])
def test_scales_that_tokens_share_are_refused(name):
    with pytest.raises(halfbyte.InputError, match=f"--kv-cache {name}: .*one at a time"):
        kv_cache.parse(name)


def test_an_unknown_format_is_refused():
    with pytest.raises(halfbyte.InputError, match="is not a format"):
        kv_cache.parse("int9")


def test_what_keeps_no_keys_and_values_is_refused(tmp_path):
    f = kv_cache.parse("int8")
    with pytest.raises(halfbyte.InputError, match="keeps no keys and values"):
        kv_cache.quantized(make("bert"), f)
    with pytest.raises(halfbyte.InputError, match="heads of 16"):
        kv_cache.quantized(make("llama"), kv_cache.parse("q8_0"))
    made = halfbyte.load(folder(tmp_path / "bert", "bert", words=True))
    labelled = [{"text": t, "label": t} for t in "ab"]
    with pytest.raises(halfbyte.InputError, match="--kv-cache: a classifier"):
        made.apply(Evaluate(data=labelled, context=32, kv_cache="int8"))


def test_a_layer_that_keeps_more_is_refused_and_one_of_fixed_size_left_alone():
    f, fixed = kv_cache.parse("int8"), LinearAttentionLayer()
    assert kv_cache._quantized(fixed, f) is fixed
    with pytest.raises(halfbyte.InputError, match="DynamicIndexedLayer keeps more"):
        kv_cache._quantized(DynamicIndexedLayer(), f)


def test_a_bare_vocabulary_is_enough(tmp_path):
    """The tokenizer of a miniature, through the step that writes: no chat template, a sliding window of 8."""
    loaded = halfbyte.load(folder(tmp_path / "gemma3", "gemma3", words=tokenizer()))
    assert generate(loaded.model, loaded.tokenizer, "abc", 20, cache="int8").tokens > 0
