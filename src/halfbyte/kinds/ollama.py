"""A folder for ollama: the GGUF file, and the Modelfile that names it, its template and where it stops.

ollama's templates are Go's, not Jinja. Ours is made of what the model's own template puts around each role's text, and
held against that template on several conversations: one that cannot be said this way is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from halfbyte.errors import InputError
from halfbyte.kinds import chats, gguf
from halfbyte.models.gguf_tokenizer import adds_bos
from halfbyte.qtensor import QTensor

if TYPE_CHECKING:
    from halfbyte.kinds import Job
    from halfbyte.models import Loaded

NAME, SUFFIX, READER, ADAPTERS = "ollama", "", gguf.READER, False
FILE, MODELFILE = "model.gguf", "Modelfile"
_ROLES = ("system", "user", "assistant")
_MARKS = {role: f"\u2402{role}\u2403" for role in _ROLES}  # texts that no template holds


@dataclass(frozen=True)
class Template:
    """What stands before and after the text of each role, before everything, and before the answer. default: what a
    conversation without a system's turn begins with."""

    start: str
    around: dict[str, tuple[str, str]]
    answer: str
    default: str = ""

    def render(self, chat: list[chats.Message]) -> str:
        """A conversation as ollama will render it, up to the answer."""
        turns = "".join(before + m["content"] + after for m in chat for before, after in [self.around[m["role"]]])
        own = "" if chat and chat[0]["role"] == "system" else self.default
        return self.start + own + turns + self.answer

    def go(self) -> str:
        """As a Go template."""
        cases = "".join(
            f'{{{{- {"if" if i == 0 else "else if"} eq .Role "{role}" }}}}{_go(before)}{{{{ .Content }}}}{_go(after)}'
            for i, (role, (before, after)) in enumerate(self.around.items())
        )
        own = "{{- if not .System }}" + _go(self.default) + "{{- end }}" if self.default else ""
        return f"{_go(self.start)}{own}{{{{- range .Messages }}}}{cases}{{{{- end }}}}{{{{- end }}}}{_go(self.answer)}"


def _go(text: str) -> str:
    """A text in a Go template, as an action, so that its spaces and braces stay as they are."""
    if not text:
        return ""
    quoted = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return f'{{{{- "{quoted}" -}}}}'


def template_of(tokenizer: Any) -> Template:
    """The template of a tokenizer. Raises InputError if it does not put the same around a role's every turn."""

    def rendered(chat: list[chats.Message], answer: bool = True) -> str:
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=answer)

    def turn(role: str) -> dict[str, str]:
        return {"role": role, "content": _MARKS[role]}

    try:
        user, system = rendered([turn("user")], False), rendered([turn("system"), turn("user")], False)
        both = rendered([turn("user"), turn("assistant"), turn("user")], False)
        answer = rendered([turn("user")])[len(user) :]
        end = rendered([turn("user"), turn("assistant")], False).split(_MARKS["assistant"])[1]
        start, found = _split(system, both, end, tokenizer.bos_token or "")
        default = user[len(start) : user.index(found["user"][0] + _MARKS["user"])]
    except Exception as e:  # templates raise what they like
        raise InputError(f"the chat template cannot be said as ollama's: {str(e)[:100]}.") from None
    made = Template(start, found, answer, default)
    for roles in ("u", "su", "uau", "suauau"):
        for content in ("hi", "two  spaces", 'a\nb {{ x }} "q" \\n é'):
            chat = [{"role": r, "content": content} for c in roles for r in _ROLES if r[0] == c]
            if made.render(chat) != rendered(chat):
                raise InputError("the chat template does not put the same around every turn, which ollama's must.")
    return made


def _split(system: str, both: str, end: str, bos: str) -> tuple[str, dict[str, tuple[str, str]]]:
    """The start of every conversation, and what is around each role, of two that were rendered with marks. end: what
    stands after an assistant's last turn."""
    s, u, a = (_MARKS[r] for r in _ROLES)
    first, middle, last = both.split(u)  # before the user, around the assistant, after the last user
    after_user, before_assistant = last, middle.split(a)[0].removeprefix(last)
    before_user = middle.split(a)[1].removeprefix(end)
    before_system, between = system.split(u)[0].split(s)
    after_system = between.removesuffix(before_user)
    own = first.removesuffix(before_user)  # with what a conversation without a system's turn may begin with
    start = next(c for c in (own, bos, "") if before_system.startswith(c) and first.startswith(c))
    around = {
        "system": (before_system.removeprefix(start), after_system),
        "user": (before_user, after_user),
        "assistant": (before_assistant, end),
    }
    return start, around


def as_given(tokenizer: Any) -> Template:
    """The template as ollama gets it: it puts the token that begins a text in front itself, where the file says so."""
    made = template_of(tokenizer)
    return replace(made, start=made.start.removeprefix(tokenizer.bos_token)) if adds_bos(tokenizer) else made


def modelfile(tokenizer: Any) -> str:
    """The Modelfile beside the GGUF file. Raises InputError as `template_of` does."""
    lines = [f"FROM ./{FILE}"]
    if tokenizer is not None and tokenizer.chat_template:
        made = as_given(tokenizer)
        lines.append(f'TEMPLATE """{made.go()}"""')
        stop = made.around["assistant"][1].strip() or tokenizer.eos_token
        lines.append(f'PARAMETER stop "{stop}"')
    return "\n".join(lines) + "\n"


def refuses(job: Job) -> str | None:
    """See Kind."""
    try:
        modelfile(job.loaded.tokenizer)
    except InputError as e:
        return str(e).rstrip(".")
    return gguf.refuses(job)


def remarks(job: Job) -> list[str]:
    """See Kind."""
    out = [
        *gguf.weights_and_words(job),
        f"ollama runs llama.cpp, which reads {FILE} back; the Modelfile itself is not tried",
    ]
    tokenizer = job.loaded.tokenizer
    if tokenizer is None or not tokenizer.chat_template:
        return out
    if chats.has_tools(tokenizer):
        out.append("the Modelfile's template has no place for tools, which the model's own has")
    made = template_of(tokenizer)
    others = [chat.name for chat, text in _plain(tokenizer) if made.render(chat.messages) != text]
    if others:
        out.append(f"the Modelfile's template keeps texts as they are, where the model's own does not: {others[0]}")
    if adds_bos(tokenizer) and not made.start.startswith(tokenizer.bos_token):
        out.append(f"ollama puts {tokenizer.bos_token} in front of conversations too, which the chat template does not")
    return out


def _plain(tokenizer: Any) -> Iterator[tuple[chats.Chat, str]]:
    """The conversations that need no tools."""
    return ((chat, text) for chat, text in chats.rendered(tokenizer) if chat.tools is None)


def fitting(q: QTensor) -> QTensor | None:
    """See Kind."""
    return gguf.fitting(q)


def write(job: Job, path: Path) -> None:
    """See Kind."""
    (path / MODELFILE).write_text(modelfile(job.loaded.tokenizer), encoding="utf-8")
    gguf.write(job, path / FILE)


def ours(job: Job) -> Loaded | None:
    """See Kind."""
    return None


def missing() -> str | None:
    """See Kind."""
    return gguf.missing()


def open(path: Path, context: int) -> nn.Module:
    """See Kind."""
    return gguf.open(path / FILE, context)


def differs(reader: nn.Module, loaded: Loaded) -> str | None:
    """See Kind. What the Modelfile makes of conversations too, as far as it says what the chat template does."""
    tokenizer = loaded.tokenizer
    if (why := gguf.differs(reader, loaded)) is not None or not tokenizer.chat_template:
        return why
    assert isinstance(reader, gguf.LlamaCpp)
    meant, given = template_of(tokenizer), as_given(tokenizer)
    begins = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    for chat, text in _plain(tokenizer):
        if meant.render(chat.messages) != text:  # see remarks
            continue
        ids = tokenizer(text, add_special_tokens=False).input_ids
        theirs = reader.tokenize(given.render(chat.messages))
        if (why := gguf.unlike(chat, ids if ids[:1] == begins else begins + ids, theirs)) is not None:
            return why
    return None
