"""GGUF files, read by llama.cpp."""

from __future__ import annotations

import unicodedata
from ctypes import create_string_buffer
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from halfbyte.containers import ggml
from halfbyte.errors import reason
from halfbyte.kinds import chats
from halfbyte.models import gguf_saving, gguf_tokenizer
from halfbyte.qtensor import QTensor

if TYPE_CHECKING:
    from halfbyte.kinds import Job
    from halfbyte.models import Loaded

_F32 = 0  # ggml's number of the type: a cache in fp16 would add its own rounding
NAME, SUFFIX = "gguf", ".gguf"
READER = "llama.cpp, through llama-cpp-python"
ADAPTERS = False


def refuses(job: Job) -> str | None:
    """See Kind."""
    return gguf_saving.refuses(job.loaded, job.formats, job.floats)


def fitting(q: QTensor) -> QTensor | None:
    """See Kind."""
    return ggml.fitting(q)


def write(job: Job, path: Path) -> None:
    """See Kind."""
    gguf_saving.save(job.loaded, path, job.formats, job.floats, job.on_tensor)


def ours(job: Job) -> Loaded | None:
    """See Kind."""
    return None


def missing() -> str | None:
    """See Kind."""
    return None if find_spec("llama_cpp") else "pip install llama-cpp-python, which builds llama.cpp in some minutes"


def open(path: Path, context: int) -> nn.Module:
    """See Kind."""
    return LlamaCpp(path, context)


# What tokenizers disagree about: spaces, digits, other scripts, joined emoji, code, special tokens, nothing.
TEXTS = (
    "Hello, world!", "  two  spaces, one trailing ", "\ttab\n\nlines\r\n end\n", "1234567890 3.14 1,000 ½ ²³",
    "don't WON'T it's we'Re", "naïve Ångström ﬁ", "日本語のテキスト 中文字符 한국어", "Привет, мир! שלום مرحبا नमस्ते",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈", "def f(x):\n    return x**2  # é\n", "<|im_start|>user\nhi<|im_end|>", "</s><s><unk><pad>",
    "a\u0301 e\u0301 vs á é", "\u00a0nbsp\u2003em\u200bzero", "http://a.b/c?d=e&f=%20", "    \n  \t \n", "",
)  # fmt: skip


def differs(reader: nn.Module, loaded: Loaded) -> str | None:
    """See Kind. Texts, conversations by the chat template, and what ends an answer."""
    assert isinstance(reader, LlamaCpp)
    tokenizer = loaded.tokenizer
    composes = _composes(tokenizer)
    for text in TEXTS:
        if composes:  # see remarks
            text = unicodedata.normalize("NFC", text)
        ours, theirs = tokenizer(text).input_ids, reader.tokenize(text)
        if ours != theirs:
            return f"{text[:40]!r} as the tokens {theirs[:12]}, not {ours[:12]}"
    for chat, text in chats.rendered(tokenizer):
        try:
            theirs = reader.chat(chat)
        except Exception as e:  # of its own rendering
            return f"no conversation of {chat.name} by this chat template: {reason(e)}"
        if (why := unlike(chat, tokenizer(text, add_special_tokens=False).input_ids, theirs)) is not None:
            return why
    for token in gguf_tokenizer.ends(tokenizer, getattr(loaded.model, "generation_config", None)):
        if not reader.ends(token):
            return f"{tokenizer.convert_ids_to_tokens(token)!r}, which ends an answer, as a token to go on from"
    return None


def unlike(chat: chats.Chat, ours: list[int], theirs: list[int]) -> str | None:
    """Where the tokens of a conversation part, in words; None if they do not."""
    if ours == theirs:
        return None
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return (
        f"a conversation of {chat.name} otherwise, from token {at} on: {theirs[at : at + 8]}, not {ours[at : at + 8]}"
    )


def _composes(tokenizer: Any) -> bool:
    return '"NFC"' in tokenizer.backend_tokenizer.to_str().partition('"model"')[0]


def remarks(job: Job) -> list[str]:
    """See Kind."""
    why = _without_jinja(job.loaded.tokenizer)
    return [*weights_and_words(job), *([] if why is None else [f"llama.cpp without --jinja takes {why}"])]


def weights_and_words(job: Job) -> list[str]:
    """The remarks on all but the chat template."""
    config, out = job.loaded.config, []
    if job.loaded.tokenizer is None:
        out.append("there is no tokenizer: the file holds weights alone, and most programs will not take it")
    elif _composes(job.loaded.tokenizer):
        out.append("the tokenizer composes accents (NFC) before it cuts text; llama.cpp does not, so compose yours")
    if config.model_type == "mistral" and getattr(config, "sliding_window", None):
        out.append(f"llama.cpp has no sliding window for this model: the file allows {config.sliding_window} tokens")
    return out


def _without_jinja(tokenizer: Any) -> str | None:
    """What llama.cpp takes for the chat template where it does not run the model's own, in words; None where that
    gives the same, or llama.cpp cannot be asked."""
    if tokenizer is None or not tokenizer.chat_template or not find_spec("llama_cpp"):
        return None
    template = gguf_tokenizer.templates(tokenizer.chat_template)["tokenizer.chat_template"]
    for chat, text in chats.rendered(tokenizer):
        theirs = _by_name(str(template), chat.messages)
        if theirs is None:
            return "no conversations: its own list of chat templates has none that is like this one"
        if chat.tools is None and theirs != text:
            return f"a chat template of its own list, which renders {chat.name} otherwise"
    return None


def _by_name(template: str, messages: list[chats.Message]) -> str | None:
    """A conversation as the template of llama.cpp's list that this one is taken for renders it; None for none."""
    llama_cpp: Any = import_module("llama_cpp")
    turns = [llama_cpp.llama_chat_message(m["role"].encode(), m["content"].encode()) for m in messages]
    given = template.encode(), (llama_cpp.llama_chat_message * len(turns))(*turns), len(turns), True
    size = llama_cpp.llama_chat_apply_template(*given, None, 0)
    if size < 0:
        return None
    buffer = create_string_buffer(size + 1)
    llama_cpp.llama_chat_apply_template(*given, buffer, size)
    return buffer.raw[:size].decode()


class LlamaCpp(nn.Module):
    """A GGUF file in llama.cpp, on the CPU: its logits, tokens and texts. more: further settings of llama_cpp.Llama."""

    def __init__(self, path: Path, context: int, **more: Any) -> None:
        super().__init__()
        llama_cpp: Any = import_module("llama_cpp")
        threads = torch.get_num_threads()
        self.llama: Any = llama_cpp.Llama(
            str(path), n_ctx=context, n_batch=context, n_threads=threads, n_threads_batch=threads, n_gpu_layers=0,
            logits_all=True, verbose=False, type_k=_F32, type_v=_F32, **more,
        )  # fmt: skip

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
        """input_ids (rows, n), filled up on the right -> .logits (rows, n, vocabulary) float32, 0 for filling."""
        rows, n = input_ids.shape
        lengths = [n] * rows if attention_mask is None else attention_mask.sum(1).tolist()
        logits = torch.zeros(rows, n, self.llama.n_vocab())
        for i, length in enumerate(lengths):
            self.llama.reset()
            self.llama.eval(input_ids[i, :length].tolist())
            logits[i, :length] = torch.from_numpy(self.llama.scores[:length])
        return SimpleNamespace(logits=logits)

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text, special tokens in it read as such; with those that the file says are put around it."""
        return self.llama.tokenize(text.encode(), add_bos=True, special=True)

    def chat(self, chat: chats.Chat) -> list[int]:
        """Ids of a conversation, as the file's template renders it up to the answer. Raises what the template does."""
        said, formats = self.llama.metadata, import_module("llama_cpp.llama_chat_format")
        template = said["tokenizer.chat_template"]
        if chat.tools is not None:
            template = said.get("tokenizer.chat_template.tool_use", template)
        bos, eos = (self._text(i) for i in (self.llama.token_bos(), self.llama.token_eos()))
        prompt = formats.Jinja2ChatFormatter(template, eos, bos)(messages=chat.messages, tools=chat.tools).prompt
        return self.llama.tokenize(prompt.encode(), add_bos=False, special=True)

    def ends(self, token: int) -> bool:
        """Whether an answer ends at a token."""
        return bool(import_module("llama_cpp").llama_vocab_is_eog(self.llama._model.vocab, token))

    def _text(self, token: int) -> str:
        return "" if token < 0 else self.llama.detokenize([token], special=True).decode()
