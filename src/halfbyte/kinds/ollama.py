"""A folder for ollama: the GGUF file, and the Modelfile that names it, its template and where it stops.

ollama's templates are Go's, not Jinja. Ours is made of what the model's own template puts around each role's text, and
held against that template on several conversations: one that cannot be said this way is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from halfbyte.errors import InputError
from halfbyte.kinds import gguf
from halfbyte.qtensor import QTensor

if TYPE_CHECKING:
    from halfbyte.kinds import Job
    from halfbyte.models import Loaded

NAME, SUFFIX, READER, ADAPTERS = "ollama", "", gguf.READER, False
FILE, MODELFILE = "model.gguf", "Modelfile"
Chat = list[dict[str, str]]
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

    def render(self, chat: Chat) -> str:
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

    def rendered(chat: Chat, answer: bool = True) -> str:
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


def modelfile(tokenizer: Any) -> str:
    """The Modelfile beside the GGUF file. Raises InputError as `template_of` does."""
    lines = [f"FROM ./{FILE}"]
    if tokenizer is not None and tokenizer.chat_template:
        made = template_of(tokenizer)
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
    return [*gguf.remarks(job), f"ollama runs llama.cpp, which reads {FILE} back; the Modelfile itself is not tried"]


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


def differs(reader: nn.Module, tokenizer: Any) -> str | None:
    """See Kind."""
    return gguf.differs(reader, tokenizer)
