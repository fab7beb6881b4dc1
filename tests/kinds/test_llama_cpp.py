"""What llama.cpp makes of our GGUF files: the same tokens, logits, chats and text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import miniatures
from halfbyte import kinds, models, run
from halfbyte.adapters import attach, targets
from halfbyte.generate import generate
from halfbyte.kinds import gguf as kind
from halfbyte.kinds import gguf_lora
from halfbyte.layers import ops
from halfbyte.models import gguf_saving
from halfbyte.plan import plan
from halfbyte.scheme import MIXES

pytestmark = pytest.mark.readers
IDS = torch.arange(3, 33).reshape(2, 15)
WORDS = {"qwen2": "qwen2", "qwen3": "qwen2", "mistral": "spm", "phi3": "spm", "gemma3": "spm-bare"}
GELU = 1e-3  # llama.cpp takes it from a table in fp16
ROUNDED = 0.02  # llama.cpp rounds the inputs of products with codes to 8 bits
CHATS = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Grüße 🙂"}],
    [
        {"role": "user", "content": " two  spaces "},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "def f():\n\treturn 1\n"},
    ],
]


def words(name):
    pre = WORDS.get(name, "smollm")
    return miniatures.sentencepiece(pre == "spm") if pre.startswith("spm") else miniatures.bpe(pre)


def made(path, name="llama", **own):
    """A miniature's folder with words, and the model."""
    tokenizer = words(name)
    base = miniatures.folder(path / "base", name, vocab_size=len(tokenizer), **own)
    tokenizer.save_pretrained(base)
    return models.load(base)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("name", ["llama", "llama-untied", "mistral", "qwen2", "qwen3", "phi3", "gemma3", "gpt2"])
def test_logits_of_floats(tmp_path, name):
    loaded = made(tmp_path, name)
    gguf_saving.save(loaded, tmp_path / "m.gguf", {})
    reader = kind.LlamaCpp(tmp_path / "m.gguf", 64)
    close = GELU if name in ("gemma3", "gpt2") else 1e-5
    torch.testing.assert_close(logits(reader), logits(loaded.model), rtol=0, atol=close)
    assert kind.differs(reader, loaded.tokenizer) is None
    assert kind.differs(reader, run.load(tmp_path / "m.gguf").tokenizer) is None


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_logits_with_rotary_scaling(tmp_path, rope):
    scaled = {"rope_theta": 5e5, **rope}
    loaded = made(tmp_path, "llama", rope_parameters=scaled, head_dim=64, max_position_embeddings=64)
    gguf_saving.save(loaded, tmp_path / "m.gguf", {})
    torch.testing.assert_close(logits(kind.LlamaCpp(tmp_path / "m.gguf", 64)), logits(loaded.model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("to", ["F16", "BF16", *MIXES])
def test_every_type_computes_what_our_reading_of_the_file_does(tmp_path, to):
    loaded = made(tmp_path, "llama", hidden_size=256, intermediate_size=512, num_attention_heads=8)
    formats = {}
    if to in MIXES:
        entries = plan(loaded.model, MIXES[to])
        formats = {e.name.removesuffix(".weight"): e.after for e in entries if e.after and not e.tied_to}
    gguf_saving.save(loaded, tmp_path / "m.gguf", formats, gguf_saving.FLOATS.get(to))
    theirs, ours = kind.LlamaCpp(tmp_path / "m.gguf", 64), models.load(tmp_path / "m.gguf", torch.float32).model
    assert (logits(theirs) - logits(ours)).norm() < ROUNDED * logits(ours).norm()
    if formats:
        assert set(formats.values()) == {op.weight.format for _, op in ops(ours)}


def test_chats_and_text(tmp_path):
    loaded = made(tmp_path)
    gguf_saving.save(loaded, tmp_path / "m.gguf", {})
    reader = kind.LlamaCpp(tmp_path / "m.gguf", 256)
    for chat in CHATS:
        ids = loaded.tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert reader.chat(chat) == ids
    assert reader.llama.token_eos() == loaded.tokenizer.eos_token_id
    ours = generate(loaded.model, loaded.tokenizer, "The quick", 12).text
    theirs = reader.llama.create_completion("The quick", max_tokens=12, temperature=0.0, repeat_penalty=1.0)
    assert theirs["choices"][0]["text"] == ours


def test_the_real_tokenizer_and_its_chats(tmp_path):
    """The packaged SmolLM2: its file, read by llama.cpp and by us."""
    from halfbyte.cli.demo import packaged

    loaded, reader = models.load(packaged(), weights=False), kind.LlamaCpp(Path(packaged()), 64)
    assert kind.differs(reader, loaded.tokenizer) is None
    for chat in CHATS:
        assert reader.chat(chat) == loaded.tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3"])
def test_an_adapter_beside_its_base(tmp_path, name, rslora):
    loaded = made(tmp_path, name)
    adapted = run.load(tmp_path / "base")
    for adapter in attach(
        adapted.model, targets(adapted.model, models.roles(adapted.model)), r=4, use_rslora=rslora
    ).values():
        torch.nn.init.normal_(adapter.adapters["default"].lora_B, std=0.1)  # pyright: ignore
    gguf_saving.save(loaded, tmp_path / "m.gguf", {})
    job = kinds.Job(adapted.loaded)
    assert gguf_lora.refuses(job) is None
    gguf_lora.write(job, tmp_path / "lora.gguf")
    theirs = logits(kind.LlamaCpp(tmp_path / "m.gguf", 64, lora_path=str(tmp_path / "lora.gguf")))
    assert (logits(adapted.model) - logits(loaded.model)).abs().max() > 0.01
    torch.testing.assert_close(theirs, logits(adapted.model), rtol=0, atol=1e-4)
