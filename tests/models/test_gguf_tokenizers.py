"""Tokenizers through GGUF: written, read again, the same ids."""

from __future__ import annotations

import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from transformers import GenerationConfig

import miniatures
from halfbyte.containers import gguf as container
from halfbyte.errors import InputError
from halfbyte.kinds.gguf import TEXTS
from halfbyte.models import gguf_tokenizer
from halfbyte.models.gguf_tokenizer import SPLITS

PRE = ["gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2", "tekken", "gpt-4o"]  # those that are written


def through(path, tokenizer):
    """The tokenizer that is read from a file with this one's metadata, and the file's metadata."""
    said = gguf_tokenizer.metadata(tokenizer, len(tokenizer) + 3)
    said = {"general.architecture": "llama", **said}
    container.write(path / "t.gguf", said, {"x": ("f32", (1,))}, [("x", torch.zeros(1))])
    file = container.File(path / "t.gguf")
    return gguf_tokenizer.read(file), file.metadata


@pytest.fixture(scope="module", params=[*PRE, "sentencepiece", "sentencepiece-bare"])
def pair(request, tmp_path_factory):
    name = request.param
    made = miniatures.bpe(name) if name in SPLITS else miniatures.sentencepiece(name == "sentencepiece")
    return name, made, *through(tmp_path_factory.mktemp(name), made)


@pytest.mark.parametrize("text", TEXTS)
def test_the_same_ids(pair, text):
    _, made, again, _ = pair
    ids = made(text).input_ids
    assert again(text).input_ids == ids
    assert again.decode(ids) == made.decode(ids)


@given(text=st.text(max_size=40))
def test_any_text_has_the_same_ids(pair, text):
    _, made, again, _ = pair
    assert again(text).input_ids == made(text).input_ids


def test_what_the_file_says(pair):
    name, made, again, said = pair
    tokens, types = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"].tolist()
    assert said["tokenizer.ggml.model"] == ("gpt2" if name in SPLITS else "llama")
    assert said["tokenizer.ggml.pre"] == (name if name in SPLITS else "default")
    assert len(tokens) == len(types) == len(made) + 3
    assert types[-3:] == [5] * 3
    assert tokens[-1] == f"[PAD{len(made) + 2}]"
    assert types[made.eos_token_id] == 3
    assert said["tokenizer.ggml.eos_token_id"] == made.eos_token_id
    assert said["tokenizer.chat_template"] == made.chat_template == again.chat_template
    assert (again.eos_token, again.bos_token, again.pad_token) == (made.eos_token, made.bos_token, made.pad_token)


def test_an_added_token_that_is_not_special_is_matched_whole(tmp_path):
    made = miniatures.bpe()
    again, said = through(tmp_path, made)
    think = made.convert_tokens_to_ids("<think>")
    assert said["tokenizer.ggml.token_type"][think] == 4
    assert again("a<think>b").input_ids == made("a<think>b").input_ids
    assert think in again("a<think>b").input_ids


@pytest.mark.parametrize(
    ("template", "stops", "said"),
    [
        ("...</s>", None, {"eos": 2, "eot": 2}),
        ("...</s>", 2, {"eos": 2, "eot": 2}),
        ("...<think>", 2, {"eos": 2}),  # a token, but no special one
        ("...<end> </s>", [2, 1, 5], {"eos": 2, "eot": "<end>", "eom": 1}),
        ("...", [2, "<end>"], {"eos": 2, "eom": "<end>"}),
        ("", [1 << 20, -1, 2], {"eos": 2}),
    ],
)
def test_the_ends_of_an_answer(tmp_path, template, stops, said):
    made = miniatures.bpe()
    made.add_tokens([AddedToken("<end>", special=True, normalized=False)])
    end = template.replace("</s>", "<|im_end|>")
    made.chat_template = end and "{% for m in messages %}{{ m.content }}" + end + "{% endfor %}"
    ids = {"<end>": made.convert_tokens_to_ids("<end>")}
    given = [ids.get(i, i) for i in stops] if isinstance(stops, list) else stops
    generation = GenerationConfig(eos_token_id=given)
    found = gguf_tokenizer.metadata(made, len(made), generation)
    assert {k: v for k in ("eos", "eot", "eom") if (v := found.get(f"tokenizer.ggml.{k}_token_id")) is not None} == {
        k: ids.get(i, i) for k, i in said.items()
    }


def test_several_templates_by_name(tmp_path):
    made = miniatures.bpe()
    made.chat_template = named = {"default": made.chat_template, "tool_use": "{{ tools }}", "rag": "{{ documents }}"}
    again, said = through(tmp_path, made)
    assert said["tokenizer.chat_templates"] == ["tool_use", "rag"]
    assert said["tokenizer.chat_template"] == named["default"]
    assert again.chat_template == named


def test_the_names_of_one_split_are_all_read():
    first = {split: name for name, split in reversed(SPLITS.items())}
    assert set(PRE) == set(first.values())


def broken(change):
    made = miniatures.bpe()
    raw = json.loads(made.backend_tokenizer.to_str())
    change(raw)
    made._tokenizer = Tokenizer.from_str(json.dumps(raw))
    return made


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (miniatures.tokenizer(), "kind WordLevel"),
        (broken(lambda raw: raw.update(pre_tokenizer={"type": "Whitespace"})), "without bytes to fall back to"),
        (
            broken(
                lambda raw: raw["pre_tokenizer"]["pretokenizers"].insert(
                    0, {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": False}
                )
            ),
            "no name for here: x+ then digits then words",
        ),
    ],
)
def test_what_llama_cpp_has_no_name_for_is_refused(made, words):
    with pytest.raises(InputError, match=re.escape(words)):
        gguf_tokenizer.metadata(made, 1000)


def test_an_embedding_that_is_too_small_is_refused():
    made = miniatures.bpe()
    with pytest.raises(InputError, match=rf"ids go to {len(made) - 1}, but the model's embedding has 300"):
        gguf_tokenizer.metadata(made, 300)


def test_no_tokenizer_is_none(tmp_path):
    container.write(
        tmp_path / "t.gguf", {"general.architecture": "llama"}, {"x": ("f32", (1,))}, [("x", torch.zeros(1))]
    )
    assert gguf_tokenizer.read(container.File(tmp_path / "t.gguf")) is None


def test_the_real_one(smollm2_tokenizer, tmp_path):
    """As transformers reads it from the package, where it does not know how the model cuts text."""
    again, said = through(tmp_path, smollm2_tokenizer)
    assert said["tokenizer.ggml.pre"] == "gpt-2"
    for text in TEXTS:
        assert again(text).input_ids == smollm2_tokenizer(text).input_ids
