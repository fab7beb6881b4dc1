"""Modelfiles: the template says what the model's own does, or the export is refused."""

from __future__ import annotations

import re

import pytest

import miniatures
from halfbyte import export, kinds, models
from halfbyte.cli.demo import packaged
from halfbyte.errors import InputError
from halfbyte.kinds import ollama

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}<H>{{ m.role }}</H>\n\n"
    "{{ m.content | trim }}<E>{% endfor %}{% if add_generation_prompt %}<H>assistant</H>\n\n{% endif %}"
)
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]


def go(text: str, messages: list[dict[str, str]], system: str = "") -> str:
    """Executes the few actions that our Go templates are made of, as text/template does."""
    loop = re.fullmatch(r"(.*?)\{\{- range \.Messages \}\}(.*)\{\{- end \}\}(.*)", text, re.DOTALL)
    assert loop is not None
    before, body, after = loop.groups()
    own = re.fullmatch(r"(.*?)(?:\{\{- if not \.System \}\}(.*)\{\{- end \}\})?", before, re.DOTALL)
    assert own is not None
    cases = dict(re.findall(r'if eq \.Role "(\w+)" \}\}(.*?)(?=\{\{- (?:else|end))', body, re.DOTALL))

    def strings(part: str, content: str = "") -> str:
        out = ""
        for quoted, _ in re.findall(r'\{\{- "((?:[^"\\]|\\.)*)" -\}\}|(\{\{ \.Content \}\})', part):
            out += quoted.encode().decode("unicode_escape") if quoted else content
        return out

    said = strings(own[1]) + ("" if system else strings(own[2] or ""))
    return said + "".join(strings(cases[m["role"]], m["content"]) for m in messages) + strings(after)


@pytest.mark.parametrize("template", [None, CHATML, LLAMA3])
def test_the_go_template_renders_what_the_model_was_trained_on(template):
    tokenizer = miniatures.bpe()
    tokenizer.chat_template = template or tokenizer.chat_template
    made = ollama.template_of(tokenizer)
    system = [{"role": "system", "content": "s"}]
    for chat in (CHAT[:1], CHAT, system + CHAT):
        meant = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert made.render(chat) == meant
        assert go(made.go(), chat, "s" if chat[0]["role"] == "system" else "") == meant


def test_the_real_one():
    loaded = models.load(packaged(), weights=False)
    text = ollama.modelfile(loaded.tokenizer)
    assert text.startswith("FROM ./model.gguf\nTEMPLATE ")
    assert text.endswith('PARAMETER stop "<|im_end|>"\n')


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}",  # counts its turns
        "{{ messages[-1].content }}",
        "{{ raise_exception('no') }}",
    ],
)
def test_templates_that_cannot_be_said_are_refused(template):
    tokenizer = miniatures.bpe()
    tokenizer.chat_template = template
    with pytest.raises(InputError, match="chat template"):
        ollama.template_of(tokenizer)


def test_the_folder(tmp_path):
    tokenizer = miniatures.bpe()
    base = miniatures.folder(tmp_path / "base", "llama", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(base)
    kind = kinds.KINDS["ollama"]
    job = export.prepare(export.read(base), kind, "Q8_0", False)
    export.export(base, job, kind, tmp_path / "out", None)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["Modelfile", "halfbyte.json", "model.gguf"]
    assert models.load(tmp_path / "out").path.name == "model.gguf"
