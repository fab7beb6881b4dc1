"""evaluate and generate: the model's own samples as data, and keys and values in a format."""

from __future__ import annotations

import pytest


def test_a_row_without_data(halfbyte, tiny_llama):
    options = ("--data", "self", "--context", 64, "--max-windows", 2, "--json")
    said = halfbyte("evaluate", tiny_llama, *options, "--against", tiny_llama)
    assert said.status == 0, said.err
    assert said.json["kl_mean"] == 0
    assert said.json["windows"] == 2
    assert "the reference wrote itself" in said.json["conventions"]


def test_keys_and_values_in_a_format(halfbyte, tiny_llama, tiny_data):
    options = ("--data", tiny_data["text"], "--context", 64, "--against", tiny_llama, "--json")
    said = halfbyte("evaluate", tiny_llama, *options, "--kv-cache", "int8")
    assert said.status == 0, said.err
    assert said.json["kl_mean"] > 0
    assert "int8-channel" in said.json["conventions"]
    written = halfbyte("generate", tiny_llama, "--prompt", "The fox", "--max-new-tokens", 5, "--kv-cache", "int8")
    assert written.status == 0
    assert "5 tokens" in written.err


@pytest.mark.parametrize(
    "verb", [("evaluate", "--data", "self", "--against", "nowhere"), ("generate", "--prompt", "a")]
)
def test_a_format_that_tokens_cannot_be_held_in_is_refused_before_the_model_is_read(refused, verb):
    refused(verb[0], "nowhere", *verb[1:], "--kv-cache", "q4_k", words=("--kv-cache q4_k", "one at a time"))


def test_samples_of_no_reference_are_refused(refused):
    refused("evaluate", "nowhere", "--data", "self", words=("--data self", "--against MODEL"))
