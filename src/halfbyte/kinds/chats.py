"""Conversations that the reader of a model must make the same tokens of as the model's own template does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]


@dataclass(frozen=True)
class Chat:
    """name: for messages. tools: what the template is given beside the turns; None for nothing."""

    name: str
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None

    def render(self, tokenizer: Any) -> str:
        """The text up to the assistant's answer. Raises what the template does."""
        return tokenizer.apply_chat_template(
            self.messages, tools=self.tools, tokenize=False, add_generation_prompt=True
        )


def _turns(*turns: tuple[str, str]) -> list[Message]:
    return [{"role": role, "content": content} for role, content in turns]


_WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'Today\'s weather in a "city" – ou une ville.',
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "é.g. Zürich"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
_CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
CHATS = (
    Chat("one turn", _turns(("user", "Hello, who are you?"))),
    Chat("a system's turn", _turns(("system", "Be short."), ("user", "hi"))),
    Chat("several turns", _turns(("system", "You are kind."), ("user", "a"), ("assistant", "b"), ("user", "c d"),
                                 ("assistant", "e\n\nf"), ("user", "g"))),
    Chat("spaces and code", _turns(("user", " two  spaces "), ("assistant", "def f():\n\treturn {1: '2'}\n"),
                                   ("user", "{{ x }} {% if %} \\n \"q\" <b>&amp;</b>"))),
    Chat("other scripts", _turns(("user", "Grüße 🙂👩‍👩‍👧‍👦 日本語 Привет שלום"), ("assistant", "¡Olé!"),
                                 ("user", "…"))),
    Chat("empty turns", _turns(("user", "hi"), ("assistant", ""), ("user", ""))),
    Chat("an empty system's turn", _turns(("system", ""), ("user", "hi"))),
    Chat("tools", _turns(("user", "Is it warm?")), [_WEATHER]),
    Chat("tools and a system's turn", _turns(("system", "Be short."), ("user", "Is it warm?")), [_WEATHER]),
    Chat("a tool's answer", [
        {"role": "user", "content": "Is it warm?"}, {"role": "assistant", "content": "", "tool_calls": [_CALL]},
        {"role": "tool", "tool_call_id": "call00001", "name": "weather", "content": '{"celsius": 21}'},
    ], [_WEATHER]),
)  # fmt: skip


def has_tools(tokenizer: Any) -> bool:
    """Whether the template, or one of several, says what to do with tools."""
    template = tokenizer.chat_template
    return "tools" in (" ".join(template.values()) if isinstance(template, dict) else template)


def rendered(tokenizer: Any) -> Iterator[tuple[Chat, str]]:
    """Every one of CHATS that the template takes, as text up to the answer; none where there is no template."""
    if not tokenizer.chat_template:
        return
    for chat in CHATS:
        if chat.tools is not None and not has_tools(tokenizer):
            continue
        try:
            text = chat.render(tokenizer)
        except Exception:  # a template refuses in whatever way: some know no system's turn
            continue
        yield chat, text
