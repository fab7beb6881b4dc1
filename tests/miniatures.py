"""Miniatures of real architectures, with random weights: made from transformers' own configs, in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from halfbyte import run
from halfbyte.run import Run
from halfbyte.scheme import custom, scheme
from halfbyte.solvers import solver

IDS = torch.arange(3, 23).reshape(2, 10)
_LLAMA = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1,
          "eos_token_id": 2}  # fmt: skip
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 128, "n_positions": 64, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
_PLAIN = {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

# name -> (model class, config class, settings)
MINIATURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**_LLAMA, "tie_word_embeddings": True}),
    "llama-untied": ("LlamaForCausalLM", "LlamaConfig", {**_LLAMA, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**_LLAMA, "tie_word_embeddings": True}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_LLAMA, "head_dim": 16, "sliding_window": 8}),
    "neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _PLAIN),
    "opt": ("OPTForCausalLM", "OPTConfig", {**_PLAIN, "ffn_dim": 128, "max_position_embeddings": 64,
                                            "word_embed_proj_dim": 64}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "bert": ("BertForSequenceClassification", "BertConfig", {**_PLAIN, "max_position_embeddings": 64}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_LLAMA, **_EXPERTS}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_LLAMA, "head_dim": 16, "num_experts": 4,
                                                            "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
}  # fmt: skip


def make(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A miniature with random weights, in eval mode; as transformers makes it."""
    model_class, config_class, own = MINIATURES[name]
    config = getattr(transformers, config_class)(**{**own, **settings})
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # not .to(dtype), which would cast the rotary frequencies too
    try:
        model = getattr(transformers, model_class)(config).eval()
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():  # biases and norms start at 0 and 1, where a mistake in them would not show
        for p in model.parameters():
            if p.ndim == 1:
                p += 0.1 * torch.randn_like(p)
    model.config.dtype = dtype
    return model


def folder(path: Path, name: str = "llama", dtype: torch.dtype = torch.float32, words: bool = False, **own) -> Path:
    """A miniature saved by transformers; with `words`, a tokenizer too."""
    model = make(name, dtype, **own)
    model.save_pretrained(path)
    if words:
        tokenizer().save_pretrained(path)
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


def quantized(path: Path, to: Any) -> Run:
    """A model from a folder, its weights made codes by round to nearest."""
    made = run.load(path)
    run.freeze(made, scheme(to) if isinstance(to, str) else custom(to), solver("rtn"))
    return made


@torch.no_grad()
def logits(model: Any, **kwargs: Any) -> torch.Tensor:
    return model(IDS, **kwargs).logits.detach()
