"""halfbyte generate MODEL --prompt TEXT"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from halfbyte.cli.console import Dtype, Json, ModelArgument, Revision, emit, say


def command(
    model: ModelArgument,
    prompt: Annotated[str | None, typer.Option(help="What to go on from; without it, on a terminal, a chat.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Through the model's chat template.")] = False,
    max_new_tokens: int = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: int = 0,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DIR", help="An adapter folder beside MODEL, under a name; several."),
    ] = None,
    use: Annotated[
        str | None, typer.Option(help="The name of the adapter that answers; the first of --adapter if left out.")
    ] = None,
    kv_cache: Annotated[str | None, typer.Option(help="Keep keys and values in a format: int8, q8_0.")] = None,
    dtype: Dtype = None,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Let a model write: go on from a prompt, answer it, or chat."""
    import torch

    from halfbyte import kv_cache as caches
    from halfbyte import named_adapters, run
    from halfbyte.errors import InputError
    from halfbyte.generate import generate

    if prompt is None and not sys.stdin.isatty():
        raise InputError("--prompt is missing, and there is no terminal to chat on.")
    if prompt is None and json:
        raise InputError("--json needs a --prompt: a chat is no object.")
    if prompt == "":
        raise InputError("--prompt is empty: give the model something to go on from.")
    if max_new_tokens < 1 or temperature < 0:
        raise InputError("--max-new-tokens must be at least 1 and --temperature at least 0.")
    if kv_cache is not None:
        caches.parse(kv_cache)
    named = _named(adapter or [], use)
    loaded = run.load(model, dtype, revision)
    for name, folder in named.items():
        named_adapters.load_adapter(loaded, folder, name)
    if named:
        named_adapters.set_adapter(loaded, use or next(iter(named)))
    tokenizer = loaded.needs_tokenizer
    torch.manual_seed(seed)
    if prompt is None:
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(f"{model} has no chat template to chat through; give a --prompt to go on from.")
        _chat(loaded, max_new_tokens, temperature, kv_cache)
        return
    show = (lambda text: None) if json else (lambda text: print(text, end="", flush=True))
    out = generate(loaded.model, tokenizer, prompt, max_new_tokens, chat, temperature, show, kv_cache)
    if json:
        emit({"text": out.text, "tokens": out.tokens, "tokens_per_second": out.tokens_per_second})
    else:
        print()
        say(f"{out.tokens} tokens, {out.tokens_per_second:.1f} a second")


def _named(given: list[str], use: str | None) -> dict[str, Path]:
    """Adapters' names and folders: NAME=DIR, or DIR, which is called as its folder is. Raises InputError."""
    from halfbyte import adapters
    from halfbyte.errors import InputError

    if use is not None and not given:
        raise InputError(f"--use {use}: it is the name of one that --adapter NAME=DIR gives.")
    out: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        path = Path(folder if equals else text)
        name = name if equals else path.resolve().name
        adapters.check_name(name)
        if name in out:
            raise InputError(f"--adapter {text}: there is one named {name!r} already; give it another name.")
        out[name] = path
    if use is not None and use not in out:
        raise InputError(f"--use {use}: --adapter gives {', '.join(out)}.")
    return out


def _chat(loaded: Any, max_new_tokens: int, temperature: float, kv_cache: str | None) -> None:
    """Turns on a terminal until an empty line or end of file."""
    from halfbyte.generate import generate

    say("An empty line ends the chat.")
    messages: list[dict[str, str]] = []
    while True:
        try:
            said = input("you: ").strip()
        except EOFError:
            return
        if not said:
            return
        messages.append({"role": "user", "content": said})
        out = generate(
            loaded.model, loaded.tokenizer, messages, max_new_tokens, True, temperature,
            lambda text: print(text, end="", flush=True), kv_cache,
        )  # fmt: skip
        print()
        messages.append({"role": "assistant", "content": out.text})
