"""Tokenizers in GGUF: a Hugging Face tokenizer -> the metadata that llama.cpp reads one from, and back.

llama.cpp knows two kinds that matter here: byte-level BPE ("gpt2"), whose splitting of text into words goes by a name
of its own (`tokenizer.ggml.pre`), and SentencePiece ("llama"), whose merges go by scores.
"""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from typing import Any

from halfbyte.containers.gguf import File, Value
from halfbyte.errors import InputError, reason

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's token types
_SPACE = "\u2581"  # SentencePiece's
_TEMPLATE = "tokenizer.chat_template"
_ENDS = ("eos", "eot", "eom")  # of a text, a turn, a message: an answer ends at any of them
_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = [rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"]
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Split:
    """How text is cut into words before byte-level BPE: parts in order, each "digits" (one by one), "words" (GPT-2's
    own expression, built into the byte-level step) or an expression. whole: a word that is a token is not cut."""

    parts: tuple[str, ...]
    whole: bool = False


# llama.cpp's names (llama-vocab.cpp); of names for the same split, the first is written.
SPLITS = {
    "gpt-2": Split(("words",)),
    "smollm": Split(("digits", "words")),
    "llama-bpe": Split((rf"{_CASELESS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}",), whole=True),
    "smaug-bpe": Split((rf"{_CASELESS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}",)),
    "qwen2": Split((rf"{_CASELESS}|{_LETTERS}|\p{{N}}|{_REST}",)),
    "tekken": Split((rf"{'|'.join(_CASED)}|\p{{N}}|{_CASED_REST}",), whole=True),
    "gpt-4o": Split(("|".join([*(f"{c}{_CASELESS}?" for c in _CASED), r"\p{N}{1,3}", _CASED_REST]),)),
    "llama3": Split((rf"{_CASELESS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}",), whole=True),
    "starcoder": Split(("digits", "words")),
    "refact": Split(("digits", "words")),
    "command-r": Split(("digits", "words")),
    "deepseek-r1-qwen": Split((rf"{_CASELESS}|{_LETTERS}|\p{{N}}|{_REST}",)),
}


def metadata(tokenizer: Any, vocabulary: int, generation: Any = None) -> dict[str, Value]:
    """What a file says of a tokenizer. vocabulary: rows of the embedding; those without a token are marked unused.
    generation: the model's generation config, which may name further ends of an answer. Raises InputError for a kind
    that llama.cpp has no name for."""
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = raw["model"]["type"]
    if kind != "BPE":
        raise InputError(f"the tokenizer is of kind {kind}, which is not written to GGUF; BPE is.")
    steps = _flat(raw["pre_tokenizer"])
    said = _byte_level(raw, steps) if any(s["type"] == "ByteLevel" for s in steps) else _sentencepiece(raw, steps)
    tokens, types = _tokens(tokenizer, raw, vocabulary)
    said |= {"tokens": tokens, "token_type": types, **_special(tokenizer), **_ends(tokenizer, generation)}
    if said["model"] == "llama":
        said["scores"] = _scores(raw, tokens)
    out = {f"tokenizer.ggml.{k}": v for k, v in said.items()}
    return out | templates(tokenizer.chat_template)


def templates(found: str | dict[str, str] | None) -> dict[str, Value]:
    """The chat template; of several by name the default one, and the others by theirs (tools have one of their own)."""
    if not found:
        return {}
    named = dict(found) if isinstance(found, dict) else {"default": found}
    out: dict[str, Value] = {_TEMPLATE: named.pop("default", None) or next(iter(named.values()))}
    if named:
        out["tokenizer.chat_templates"] = list(named)
    return out | {f"{_TEMPLATE}.{name}": template for name, template in named.items()}


def _flat(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer or normalizer, sequences opened."""
    if step is None:
        return []
    inner = step.get("pretokenizers") or step.get("normalizers") if step["type"] == "Sequence" else None
    return [step] if inner is None else [s for i in inner for s in _flat(i)]


def _byte_level(raw: dict[str, Any], steps: list[dict[str, Any]]) -> dict[str, Any]:
    parts: list[str] = []
    for step in steps:
        match step:
            case {"type": "Digits", "individual_digits": True}:
                parts.append("digits")
            case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
                parts.append(regex)
            case {"type": "ByteLevel"}:
                parts += ["words"] if step.get("use_regex", True) else []
            case _:
                parts.append(json.dumps(step))
    split = Split(tuple(parts), bool(raw["model"].get("ignore_merges")))
    name = next((n for n, s in SPLITS.items() if s == split), None)
    if name is None:
        shown = " then ".join(p[:60] for p in parts)
        raise InputError(f"the tokenizer cuts text in a way that llama.cpp has no name for here: {shown}.")
    prefix = any(s["type"] == "ByteLevel" and s.get("add_prefix_space") for s in steps)
    merges = [m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]]
    return {"model": "gpt2", "pre": name, "add_space_prefix": prefix, **({"merges": merges} if merges else {})}


def _sentencepiece(raw: dict[str, Any], steps: list[dict[str, Any]]) -> dict[str, Any]:
    if not raw["model"].get("byte_fallback"):
        raise InputError("the tokenizer is BPE without bytes to fall back to, which is not written to GGUF.")
    prefix = any(s["type"] == "Metaspace" and s.get("prepend_scheme", "always") != "never" for s in steps)
    prefix = prefix or any(s["type"] == "Prepend" for s in _flat(raw["normalizer"]))
    return {"model": "llama", "pre": "default", "add_space_prefix": prefix}


def _tokens(tokenizer: Any, raw: dict[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    """Texts and types by id."""
    by_id = {i: t for t, i in tokenizer.get_vocab().items()}
    if (last := max(by_id)) >= vocabulary:
        raise InputError(f"the tokenizer's ids go to {last}, but the model's embedding has {vocabulary} rows.")
    added = {t["id"]: t for t in raw["added_tokens"]}
    unknown = raw["model"].get("unk_token")
    tokens, types = [], []
    for i in range(vocabulary):
        text, special = by_id.get(i, f"[PAD{i}]"), added.get(i)
        if i not in by_id:
            kind = _UNUSED
        elif text == unknown:
            kind = _UNKNOWN
        elif special is not None:
            kind = _CONTROL if special["special"] else _USER_DEFINED
        elif len(text) == 6 and text.startswith("<0x") and raw["model"].get("byte_fallback"):
            kind = _BYTE
        else:
            kind = _NORMAL
        tokens.append(text.replace(_SPACE, " ") if kind == _USER_DEFINED else text)
        types.append(kind)
    return tokens, types


def _special(tokenizer: Any) -> dict[str, Any]:
    out = {}
    for name, ours in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        if (i := getattr(tokenizer, f"{ours}_token_id")) is not None:
            out[f"{name}_token_id"] = i
    ids = tokenizer("a").input_ids
    out["add_bos_token"] = adds_bos(tokenizer)
    out["add_eos_token"] = len(ids) > 1 and ids[-1] == tokenizer.eos_token_id
    return out


def adds_bos(tokenizer: Any) -> bool:
    """Whether a token that begins a text is put in front of every one."""
    return tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def _ends(tokenizer: Any, generation: Any) -> dict[str, Any]:
    """What a file says of the ends of an answer that `_special` has not: the token that ends a turn, and one more."""
    turn = end_of_turn(tokenizer)
    said = {} if turn is None else {"eot_token_id": turn}
    others = [i for i in ends(tokenizer, generation) if i not in (tokenizer.eos_token_id, turn)]
    return said | {"eom_token_id": others[0]} if others else said


def ends(tokenizer: Any, generation: Any = None) -> list[int]:
    """The tokens at which an answer ends: the tokenizer's own, that of the chat template, the generation config's."""
    more = getattr(generation, "eos_token_id", None)
    found = [tokenizer.eos_token_id, end_of_turn(tokenizer), *(more if isinstance(more, list) else [more])]
    return list(dict.fromkeys(i for i in found if type(i) is int and 0 <= i < len(tokenizer)))


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token with which the chat template ends what the assistant says; None where there is none."""
    if not tokenizer.chat_template:
        return None
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception:  # templates raise what they like
        return None
    _, said, rest = text.rpartition("hello")
    after = tokenizer(rest, add_special_tokens=False).input_ids if said else []
    special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    return next((i for i in after if i in special), None)


def _scores(raw: dict[str, Any], tokens: list[str]) -> list[float]:
    """The earlier a merge, the higher the score of what it makes."""
    rank: dict[str, int] = {}
    for i, merge in enumerate(raw["model"]["merges"]):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        rank.setdefault(left + right, i)
    last = float(len(rank))
    return [-float(rank.get(t, last)) for t in tokens]


def read(file: File) -> Any:
    """The tokenizer that a file describes, None where it describes none. Raises InputError."""
    from transformers import PreTrainedTokenizerFast  # AutoTokenizer would parse the file once more, for its config

    if "tokenizer.ggml.tokens" not in file.metadata:
        return None
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(file.path.parent, gguf_file=file.path.name)
    except Exception as e:
        raise InputError(f"{file.path}: its tokenizer cannot be read: {reason(e)}") from None
    if named := _named_templates(file):
        tokenizer.chat_template = named
    kind, prefix = file.metadata.get("tokenizer.ggml.model"), file.metadata.get("tokenizer.ggml.add_space_prefix")
    split = SPLITS.get(file.text("tokenizer.ggml.pre", ""))
    if kind == "gpt2" and split is not None:
        cut(tokenizer.backend_tokenizer, split, bool(prefix))
    if kind == "llama":
        _respace(tokenizer.backend_tokenizer, prefix is None or bool(prefix))
    return tokenizer


def _named_templates(file: File) -> dict[str, str]:
    """The chat templates by name, where a file has several."""
    found = {k.removeprefix(f"{_TEMPLATE}."): v for k, v in file.metadata.items() if k.startswith(f"{_TEMPLATE}.")}
    found = {k: v for k, v in found.items() if isinstance(v, str)}
    return {"default": file.text(_TEMPLATE), **found} if found and _TEMPLATE in file.metadata else {}


def read_ends(file: File) -> int | list[int] | None:
    """The tokens at which a file says that an answer ends, as a generation config has them."""
    found = [file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in _ENDS]
    ids = list(dict.fromkeys(i for i in found if type(i) is int))
    return ids if len(ids) > 1 else ids[0] if ids else None


def _respace(backend: Any, prefix: bool) -> None:
    """Makes a tokenizer write spaces as SentencePiece does, with one in front or not, and take that off again."""
    from tokenizers import decoders, normalizers

    steps = [normalizers.Prepend(_SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    backend.pre_tokenizer = None
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )


def cut(backend: Any, split: Split, prefix: bool) -> None:
    """Makes a tokenizer cut text as the split says."""
    from tokenizers import Regex, pre_tokenizers

    steps: list[Any] = []
    for part in split.parts:
        if part == "digits":
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        elif part != "words":
            steps.append(pre_tokenizers.Split(Regex(part), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex="words" in split.parts))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    if split.whole:
        backend.model.ignore_merges = True
