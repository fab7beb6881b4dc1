"""What llama.cpp makes of our GGUF files: the same tokens, logits, chats and text."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken

import miniatures
from halfbyte import data, export, kinds, models, run
from halfbyte.adapters import attach, attached, targets
from halfbyte.errors import BudgetExceeded, InputError
from halfbyte.generate import generate
from halfbyte.kinds import chats, gguf_lora, ollama
from halfbyte.kinds import gguf as kind
from halfbyte.layers import ops
from halfbyte.model import load
from halfbyte.models import gguf_saving
from halfbyte.plan import plan
from halfbyte.scheme import MIXES

pytestmark = pytest.mark.readers
IDS = torch.arange(3, 33).reshape(2, 15)
TEXT = data.records([{"text": "The quick brown fox jumps over the lazy dog. " * 8}])
WORDS = {"qwen2": "qwen2", "qwen3": "qwen2", "mistral": "spm", "phi3": "spm", "gemma3": "spm-bare"}
GELU = 1e-3  # llama.cpp takes it from a table in fp16
ROUNDED = 0.02  # llama.cpp rounds the inputs of products with codes to 8 bits
TOOLS = (
    "{%- if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{%- for c in m.tool_calls %}<call>{{ c.function.arguments | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def words(name):
    pre = WORDS.get(name, "smollm")
    return miniatures.sentencepiece(pre == "spm") if pre.startswith("spm") else miniatures.bpe(pre)


def made(path, name="llama", tokenizer=None, **own):
    """A miniature's folder with words, and the model."""
    return models.load(miniatures.folder(path / "base", name, words=tokenizer or words(name), **own))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("name", ["llama", "llama-untied", "mistral", "qwen2", "qwen3", "phi3", "gemma3", "gpt2"])
def test_logits_of_floats(tmp_path, name):
    loaded = made(tmp_path, name)
    gguf_saving.save(loaded, tmp_path / "m.gguf", {})
    reader = kind.LlamaCpp(tmp_path / "m.gguf", 64)
    close = GELU if name in ("gemma3", "gpt2") else 1e-5
    torch.testing.assert_close(logits(reader), logits(loaded.model), rtol=0, atol=close)
    assert kind.differs(reader, loaded) is None
    assert kind.differs(reader, models.load(tmp_path / "m.gguf")) is None


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_logits_with_rotary_scaling(tmp_path, rope):
    scaled = {"rope_theta": 5e5, **rope}
    loaded = made(tmp_path, "llama", rope_parameters=scaled, head_dim=64, max_position_embeddings=64)
    gguf_saving.save(loaded, tmp_path / "m.gguf", {})
    torch.testing.assert_close(logits(kind.LlamaCpp(tmp_path / "m.gguf", 64)), logits(loaded.model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("to", ["F16", "BF16", *MIXES])
def test_every_type_computes_what_our_reading_of_the_file_does(tmp_path, to):
    loaded = made(tmp_path, "llama", hidden_size=256, intermediate_size=512, num_attention_heads=8)
    formats = {}
    if to in MIXES:
        entries = plan(loaded.model, MIXES[to])
        formats = {e.name.removesuffix(".weight"): e.after for e in entries if e.after and not e.tied_to}
    gguf_saving.save(loaded, tmp_path / "m.gguf", formats, gguf_saving.FLOATS.get(to))
    theirs, ours = kind.LlamaCpp(tmp_path / "m.gguf", 64), models.load(tmp_path / "m.gguf", torch.float32).model
    assert (logits(theirs) - logits(ours)).norm() < ROUNDED * logits(ours).norm()
    if formats:
        assert set(formats.values()) == {op.weight.format for _, op in ops(ours)}


def test_text(tmp_path):
    loaded = made(tmp_path)
    gguf_saving.save(loaded, tmp_path / "m.gguf", {})
    reader = kind.LlamaCpp(tmp_path / "m.gguf", 256)
    ours = generate(loaded.model, loaded.tokenizer, "The quick", 12).text
    theirs = reader.llama.create_completion("The quick", max_tokens=12, temperature=0.0, repeat_penalty=1.0)
    assert theirs["choices"][0]["text"] == ours


@pytest.mark.parametrize(
    ("template", "taken"),
    [
        (None, 7),
        (TOOLS, 10),
        (MARKED, 7),
        ({"default": MARKED, "tool_use": TOOLS}, 10),
        ("{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
         "{{ m.role }}: {{ m.content | trim }}{{ eos_token }}{% endfor %}", 4),
    ],
    ids=["chatml", "tools", "generation", "named", "no system"],
)  # fmt: skip
def test_conversations(tmp_path, template, taken):
    loaded = made(tmp_path)
    loaded.tokenizer.chat_template = template or loaded.tokenizer.chat_template
    gguf_saving.save(loaded, tmp_path / "m.gguf", {})
    reader = kind.LlamaCpp(tmp_path / "m.gguf", 64)
    assert kind.differs(reader, loaded) is None
    assert kind.differs(reader, models.load(tmp_path / "m.gguf")) is None
    assert len(list(chats.rendered(loaded.tokenizer))) == taken


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (TOOLS.replace("<call>", " "), "a conversation of a tool's answer otherwise, from token"),
        (TOOLS.replace("{{ m.content }}", "{{ m.content or 'nothing' }}"), "a conversation of empty turns otherwise"),
        (TOOLS.replace("{{ m.content }}", "{{ m.content | trim }}"), "a conversation of spaces and code otherwise"),
        (TOOLS + "{{ pad_token + '' }}", "no conversation of one turn by this chat template: "),
    ],
)
def test_a_template_that_the_reader_renders_otherwise_does_not_leave(tmp_path, monkeypatch, template, words):
    """The file's says something else than the model's own; or it needs what llama.cpp does not give it."""
    loaded, write = made(tmp_path), kind.write
    loaded.tokenizer.chat_template = template

    def write_another(job, path):
        if "pad_token" not in template:
            job.loaded.tokenizer.chat_template = TOOLS
        write(job, path)
        job.loaded.tokenizer.chat_template = template

    monkeypatch.setattr(kind, "write", write_another)
    with pytest.raises(BudgetExceeded, match=f"reads {words}.*nothing was kept"):
        export.export(tmp_path / "base", kinds.Job(loaded), kinds.KINDS["gguf"], tmp_path / "m.gguf", export.Proof())
    assert not (tmp_path / "m.gguf").exists()


def test_where_an_answer_ends(tmp_path):
    """At a token that only the chat template tells, and at one that only the generation config does."""
    loaded, ends = made(tmp_path), ["<END>", "<STOP>"]
    loaded.tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in ends])
    turn, stop = loaded.tokenizer.convert_tokens_to_ids(ends)
    loaded = made(tmp_path / "wide", vocab_size=len(loaded.tokenizer), tokenizer=loaded.tokenizer)
    loaded.tokenizer.chat_template = loaded.tokenizer.chat_template.replace("<|im_end|>", "<END>")
    loaded.model.generation_config.eos_token_id = [loaded.tokenizer.eos_token_id, stop]
    gguf_saving.save(loaded, tmp_path / "m.gguf", {})
    reader = kind.LlamaCpp(tmp_path / "m.gguf", 64)
    assert [i for i in range(len(loaded.tokenizer)) if reader.ends(i)] == [0, loaded.tokenizer.eos_token_id, turn, stop]
    assert kind.differs(reader, loaded) is None
    for token in (turn, stop):
        said = reader.llama.create_chat_completion(
            [{"role": "user", "content": "hi"}], max_tokens=4, logit_bias={token: 1e4}, temperature=0.0
        )["choices"][0]
        assert (said["finish_reason"], said["message"]["content"]) == ("stop", "")
    assert set(models.load(tmp_path / "m.gguf").model.generation_config.eos_token_id) == {
        loaded.tokenizer.eos_token_id, turn, stop
    }  # fmt: skip
    loaded.model.generation_config.eos_token_id = 5
    assert "which ends an answer, as a token to go on from" in (kind.differs(reader, loaded) or "")


def test_templates_that_are_known_by_name(tmp_path):
    loaded = made(tmp_path)
    assert kind.remarks(kinds.Job(loaded)) == []
    loaded.tokenizer.chat_template = "{% set x = '<|im_start|>' %}" + TOOLS.replace(
        "{{ m.content }}", "{{ m.content }}."
    )
    (said,) = kind.remarks(kinds.Job(loaded))
    assert said == "llama.cpp without --jinja takes a chat template of its own list, which renders one turn otherwise"
    loaded.tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    (said,) = kind.remarks(kinds.Job(loaded))
    assert said.endswith("none that is like this one")


def test_the_real_tokenizer_and_its_chats():
    """The packaged SmolLM2: its file, read by llama.cpp and by us."""
    from halfbyte.cli.demo import packaged

    loaded, reader = models.load(packaged(), weights=False), kind.LlamaCpp(Path(packaged()), 64)
    assert kind.differs(reader, loaded) is None
    assert ollama.differs(reader, loaded) is None
    assert len(list(chats.rendered(loaded.tokenizer))) == 7


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3"])
def test_an_adapter_beside_its_base(tmp_path, name, rslora):
    loaded = made(tmp_path, name)
    adapted = adapter(tmp_path, use_rslora=rslora)
    gguf_saving.save(loaded, tmp_path / "m.gguf", {})
    job = kinds.Job(adapted.loaded)
    assert gguf_lora.refuses(job) is None
    gguf_lora.write(job, tmp_path / "lora.gguf")
    theirs = logits(kind.LlamaCpp(tmp_path / "m.gguf", 64, lora_path=str(tmp_path / "lora.gguf")))
    assert (logits(adapted.model) - logits(loaded.model)).abs().max() > 0.01
    torch.testing.assert_close(theirs, logits(adapted.model), rtol=0, atol=1e-4)


def adapter(path, **settings):
    """A run with an adapter on the model in `path`, and its folder there."""
    adapted = run.load(path / "base")
    for w in attach(adapted.model, targets(adapted.model, models.roles(adapted.model)), r=4, **settings).values():
        torch.nn.init.normal_(w.adapters["default"].lora_B, std=0.1)  # pyright: ignore
    (path / "adapter").mkdir()
    adapted.write(path / "adapter", "adapter")
    return adapted


def exported(path, proof=True, said=None):
    lines = [] if said is None else said
    job = export.prepare(export.read(path / "adapter", adapter=True), gguf_lora, None, False, lines.append)
    given = export.Proof(TEXT, 2, 64) if proof else None
    return export.export(path / "adapter", job, gguf_lora, path / "lora.gguf", given, say=lines.append)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_is_read_back_beside_its_base(tmp_path, dtype):
    made(tmp_path, dtype=dtype)
    adapter(tmp_path)
    said = []
    (ours, first), (before, second) = exported(tmp_path, said=said).rows
    assert (ours, before) == ("read back, against halfbyte", "read back, against adapter")
    assert abs(first["kl_mean"]) < 1e-6
    assert abs(second["kl_mean"]) < 1e-6
    assert first["bytes"] == (tmp_path / "lora.gguf").stat().st_size
    assert any(re.fullmatch(r"its base is written beside it in float32 until it is read: \d+ MB", s) for s in said)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "lora.gguf", "lora.ledger.json"]


def test_an_adapter_that_is_read_otherwise_does_not_leave(tmp_path, monkeypatch):
    made(tmp_path)
    adapter(tmp_path)
    write = gguf_lora.write

    def write_another(job, path):
        for a in attached(job.loaded.model).values():
            a.lora_alpha *= 3  # which says what B A is times, and is not what the layer computes with
        write(job, path)

    monkeypatch.setattr(gguf_lora, "write", write_another)
    with pytest.raises(BudgetExceeded, match=r"computes something else than halfbyte does.*nothing was kept"):
        exported(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_an_adapter_trained_beside_codes(tmp_path):
    """It is proved beside the values that the codes stand for; one that was trained through a grid is refused."""
    made(tmp_path)
    base = load(tmp_path / "base", "bfloat16")
    base.train(TEXT, method="qlora", steps=1, batch_size=1, max_length=32, r=2).save(tmp_path / "adapter")
    said = []
    (_, first), _ = exported(tmp_path, said=said).rows
    assert abs(first["kl_mean"]) < 1e-6
    assert any(s.startswith("note: it was trained beside a base in nf4-g64") for s in said)
    shutil.rmtree(tmp_path / "adapter")
    grid = load(tmp_path / "base").train(TEXT, method="qat-lora", to="W4A16", steps=1, batch_size=1, max_length=32, r=2)
    grid.save(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"trained through a grid.*`halfbyte merge` it instead"):
        exported(tmp_path)


def test_qa_lora_beside_codes_in_16_bit_is_what_zero_points_hold(tmp_path):
    made(tmp_path)
    base = load(tmp_path / "base", "bfloat16")
    base.train(TEXT, method="qa-lora", steps=2, batch_size=1, max_length=32, r=2).save(tmp_path / "adapter")
    (_, first), (_, second) = exported(tmp_path).rows
    assert abs(first["kl_mean"]) < 1e-6
    assert abs(second["kl_mean"]) < 1e-6


def test_an_adapter_alone_needs_no_base(tmp_path):
    made(tmp_path)
    adapter(tmp_path)
    assert exported(tmp_path, proof=False).rows == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "lora.gguf"]
