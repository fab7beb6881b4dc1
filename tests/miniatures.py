"""Miniatures of real architectures, with random weights: made from transformers' own configs, in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from halfbyte import run
from halfbyte.run import Run
from halfbyte.scheme import custom, scheme
from halfbyte.solvers import solver
from halfbyte.steps import Freeze

IDS = torch.arange(3, 23).reshape(2, 10)
_LLAMA = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1,
          "eos_token_id": 2}  # fmt: skip
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 128, "n_positions": 64, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
_PLAIN = {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
       "vocab_size": 128, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}  # fmt: skip
_WHISPER = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "vocab_size": 128,
            "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 32, "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "suppress_tokens": None,
            "begin_suppress_tokens": None}  # fmt: skip

# name -> (model class, config class, settings)
MINIATURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**_LLAMA, "tie_word_embeddings": True}),
    "llama-untied": ("LlamaForCausalLM", "LlamaConfig", {**_LLAMA, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**_LLAMA, "tie_word_embeddings": True}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_LLAMA, "head_dim": 16, "sliding_window": 8,
                                                          "query_pre_attn_scalar": 16}),
    "neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _PLAIN),
    "opt": ("OPTForCausalLM", "OPTConfig", {**_PLAIN, "ffn_dim": 128, "max_position_embeddings": 64,
                                            "word_embed_proj_dim": 64}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_LLAMA, "head_dim": 32, "sliding_window": None}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_LLAMA, "head_dim": 32}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**_LLAMA, "max_position_embeddings": 64}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "bert": ("BertForSequenceClassification", "BertConfig", {**_PLAIN, "max_position_embeddings": 64}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_LLAMA, **_EXPERTS}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_LLAMA, "head_dim": 16, "num_experts": 4,
                                                            "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", {**_LLAMA, **_EXPERTS, "head_dim": 16, "sliding_window": 8,
                                                      "max_position_embeddings": 64,
                                                      "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "falcon": ("FalconForCausalLM", "FalconConfig", {**_PLAIN, "new_decoder_architecture": True, "num_kv_heads": 2,
                                                     "max_position_embeddings": 64}),
}  # fmt: skip

EXPERTS = ("mixtral", "qwen3-moe", "gpt-oss")  # those whose experts transformers fuses

# Those that are no causal language models: what goes in and out is not the same for all.
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "minilm": ("BertModel", "BertConfig", {**_PLAIN, "max_position_embeddings": 64}),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", _WHISPER),
    "vit": ("ViTForImageClassification", "ViTConfig", {"hidden_size": 64, "intermediate_size": 128,
                                                       "num_hidden_layers": 2, "num_attention_heads": 4,
                                                       "image_size": 32, "patch_size": 8, "num_labels": 5}),
}  # fmt: skip


def make(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A miniature with random weights, in eval mode; as transformers makes it."""
    model_class, config_class, own = {**MINIATURES, **OTHERS}[name]
    config = getattr(transformers, config_class)(**{**own, **settings})
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # not .to(dtype), which would cast the rotary frequencies too
    try:
        model = getattr(transformers, model_class)(config).eval()
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():  # biases and norms start at 0 and 1, where a mistake in them would not show
        for n, p in model.named_parameters():
            if p.ndim == 1 or n.endswith("bias"):
                p += 0.1 * torch.randn_like(p)
    model.config.dtype = dtype
    return model


def theirs(path: Path, name: str, **settings: Any) -> Any:
    """A folder of a miniature as plain transformers reads it; its experts one after the other, as ours are."""
    cls = getattr(transformers, {**MINIATURES, **OTHERS}[name][0])
    if name in EXPERTS:
        settings = {"experts_implementation": "eager", **settings}
    return cls.from_pretrained(path, **settings).eval()


def folder(
    path: Path, name: str = "llama", dtype: torch.dtype = torch.float32, words: bool | PreTrainedTokenizerFast = False,
    **own: Any,
) -> Path:  # fmt: skip
    """A miniature saved by transformers. words: whether with `tokenizer()`, or a tokenizer to whose size it is made."""
    if not isinstance(words, bool):
        own = {"vocab_size": len(words), **own}
    make(name, dtype, **own).save_pretrained(path)
    if words is not False:
        (tokenizer() if words is True else words).save_pretrained(path)
    return path


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character: 3 special ones and printable ASCII; a chat template in the manner of ChatML."""
    characters = [chr(c) for c in range(32, 127)]
    vocabulary = {t: i for i, t in enumerate(["<pad>", "<s>", "</s>", "\n", *characters])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.decoder = decoders.Fuse()
    out = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    out.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    return out


_TEXT = [
    "The quick brown fox jumps over 12 lazy dogs; it's the 3rd time they've seen it, isn't it?",
    "def area(width, height):\n    return width * height  # no units\n",
    "Voilà: naïve café, 100% Ångström. Привет, мир! 日本語のテキスト 🙂",
] * 4  # so that there is something to merge


def bpe(pre: str = "smollm", size: int = 400) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on a few sentences, that cuts text as llama.cpp's `pre` says."""
    from halfbyte.models.gguf_tokenizer import SPLITS, cut

    raw = Tokenizer(models.BPE())
    raw.decoder = decoders.ByteLevel()
    cut(raw, SPLITS[pre], False)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(_TEXT, trainer)
    out = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=special[0], bos_token=special[1], eos_token=special[2], unk_token=special[0]
    )
    out.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    out.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return out


def sentencepiece(prefix: bool = True, size: int = 420) -> PreTrainedTokenizerFast:
    """A tokenizer as Llama 2's is: SentencePiece's spaces, BPE with bytes to fall back to."""
    special = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{b:02X}>" for b in range(256))]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(vocab_size=size - 260, show_progress=False)
    raw.train_from_iterator(_TEXT, trainer)
    learnt = json.loads(raw.to_str())["model"]
    vocabulary = {t: i for i, t in enumerate([*special, *(t for t in learnt["vocab"])])}
    merges = [tuple(m) for m in learnt["merges"]]
    raw = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("\u2581")] if prefix else []
    raw.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    raw.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    out = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    out.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    return out


def quantized(path: Path, to: Any) -> Run:
    """A model from a folder, its weights made codes by round to nearest."""
    made = run.load(path)
    run.freeze(made, scheme(to) if isinstance(to, str) else custom(to), solver("rtn"))
    return made


def calibrated(path: Path, to: Any = "W8A8_STATIC", **settings: Any) -> Run:
    """A model from a folder with words, quantized by a scheme whose inputs are static."""
    made = run.load(path)
    Freeze(scheme=to, calibration=[{"text": t} for t in _TEXT], **settings)(made)
    return made


def inputs(model: Any) -> dict[str, torch.Tensor]:
    """What a miniature takes: tokens, an image, or sound; and tokens for its decoder."""
    take = torch.Generator().manual_seed(0)
    sizes = {"pixel_values": (2, 3, 32, 32), "input_features": (2, 16, 40)}.get(model.main_input_name)
    given = IDS if sizes is None else torch.randn(sizes, generator=take).to(model.dtype)
    out = {model.main_input_name: given}
    return {**out, "decoder_input_ids": IDS} if model.config.is_encoder_decoder else out


@torch.no_grad()
def logits(model: Any, **kwargs: Any) -> torch.Tensor:
    """What a miniature makes of its inputs; of an encoder without a head, the last hidden states."""
    out = model(**inputs(model), **kwargs)
    return getattr(out, "logits", out[0]).detach()


def training_logits(model: Any) -> torch.Tensor:
    """The forward that training saw: without dropout there is nothing else in it but the grids."""
    model.train()
    try:
        return logits(model)
    finally:
        model.eval()
