"""Text from a model: what is asked for comes out, and the model is left as it was."""

from __future__ import annotations

import json

import pytest
import torch

import halfbyte
from halfbyte.generate import generate


@pytest.fixture(scope="module")
def model(tiny_llama):
    return halfbyte.load(tiny_llama)


def test_greedy_is_the_likeliest_token_each_time(model):
    tokenizer = model.tokenizer
    out = generate(model.model, tokenizer, "The fox", 4)
    ids = tokenizer("The fox")["input_ids"]
    for _ in range(out.tokens):
        with torch.no_grad():
            ids.append(int(model.model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert tokenizer.decode(ids[-out.tokens :], skip_special_tokens=True) == out.text


def test_streamed_text_is_the_text(model):
    said: list[str] = []
    out = generate(model.model, model.tokenizer, "The fox", 12, on_text=said.append)
    assert "".join(said).rstrip("\ufffd") == out.text.rstrip("\ufffd")
    assert len(said) > 1


def test_the_models_own_settings_stay_and_say_nothing(model, tmp_path, capfd):
    own = model.model.generation_config
    own.update(do_sample=True, temperature=0.3, top_p=0.9, top_k=5, max_length=20)
    before = own.to_dict()
    generate(model.model, model.tokenizer, "The fox", 3)
    generate(model.model, model.tokenizer, "The fox", 3, temperature=0.7)
    assert own.to_dict() == before
    assert capfd.readouterr().err == ""
    saved = json.loads((model.save(tmp_path / "out") / "generation_config.json").read_text())
    assert saved["temperature"] == 0.3


def test_chat_goes_through_the_template(model):
    asked = generate(model.model, model.tokenizer, "hello", 3, chat=True)
    written = generate(model.model, model.tokenizer, "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n", 3)
    assert asked.text == written.text
    assert asked.text == generate(model.model, model.tokenizer, [{"role": "user", "content": "hello"}], 3).text


def test_a_prompt_that_leaves_no_room(model):
    with pytest.raises(halfbyte.InputError, match="512 tokens that this model takes"):
        generate(model.model, model.tokenizer, "fox " * 300, 500)
    with pytest.raises(halfbyte.InputError, match="is empty"):
        generate(model.model, model.tokenizer, "", 5)
