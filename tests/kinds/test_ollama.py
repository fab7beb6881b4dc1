"""Modelfiles: the template says what the model's own does, or the export is refused."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from tokenizers import processors
from transformers import LlamaConfig

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


def test_the_token_that_begins_a_text_is_left_to_ollama():
    """Where the tokenizer puts it in front of every text, ollama does, and the Modelfile must not again."""
    tokenizer = miniatures.bpe()
    tokenizer.chat_template = LLAMA3
    assert ollama.as_given(tokenizer).start == ollama.template_of(tokenizer).start == "<|im_start|>"
    begin(tokenizer)
    assert ollama.as_given(tokenizer).start == ""
    assert 'TEMPLATE """{{- range' in ollama.modelfile(tokenizer)


def begin(tokenizer):
    """Makes a tokenizer put its first token in front of every text."""
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )


@pytest.mark.parametrize(
    ("template", "begins", "words"),
    [
        (LLAMA3, False, ["the Modelfile's template keeps texts as they are, where the model's own does not: spaces"]),
        (CHATML, True, ["ollama puts <|im_start|> in front of conversations too"]),
        (CHATML + "{% if tools %}{% endif %}", False, ["the Modelfile's template has no place for tools"]),
    ],
)
def test_what_a_modelfile_does_otherwise_is_said(template, begins, words):
    tokenizer = miniatures.bpe()
    tokenizer.chat_template = template.replace("<|im_start|>", "<H>") if begins else template
    if begins:
        begin(tokenizer)
    said = ollama.remarks(kinds.Job(SimpleNamespace(config=LlamaConfig(), tokenizer=tokenizer)))
    assert [w for w, s in zip(words, said[1:], strict=True) if s.startswith(w)] == words


@pytest.mark.readers
@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("template", [CHATML, LLAMA3])
def test_llama_cpp_makes_the_same_tokens_of_it(tmp_path, template, begins):
    tokenizer = miniatures.bpe()
    tokenizer.chat_template = template
    if begins:
        begin(tokenizer)
    base = miniatures.folder(tmp_path / "base", words=tokenizer)
    job, kind = kinds.Job(models.load(base)), kinds.KINDS["ollama"]
    (tmp_path / "out").mkdir()
    kind.write(job, tmp_path / "out")
    reader = kind.open(tmp_path / "out", 64)
    assert kind.differs(reader, job.loaded) is None
    job.loaded.tokenizer.chat_template = template + " "
    assert "a conversation of one turn otherwise" in (kind.differs(reader, job.loaded) or "")


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


def test_the_folder(base, tmp_path):
    kind = kinds.KINDS["ollama"]
    job = export.prepare(export.read(base), kind, "Q8_0", False)
    export.export(base, job, kind, tmp_path / "out", None)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["Modelfile", "halfbyte.json", "model.gguf"]
    assert models.load(tmp_path / "out").path.name == "model.gguf"
