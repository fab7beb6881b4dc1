"""Files, masks, packing and batches."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from halfbyte.data import (
    Dataset,
    Row,
    batches,
    encode,
    encode_choices,
    encode_classification,
    encode_prompt,
    eval_batches,
    label_choices,
    read_records,
    records,
    split,
    stacked,
    windows,
)
from halfbyte.errors import InputError

EOS = 2  # <|im_end|>, which is SmolLM2's padding too
RELAXED = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% set text = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' %}{% if loop.first %}{% set text = '<|begin_of_text|>' + text %}"
    "{% endif %}{{ text }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ '<s>' }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ '<bos>' }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'assistant' %}{% set role = 'model' %}{% else %}"
    "{% set role = m['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') "
    "+ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}\n{% if m['role'] == 'user' %}\n{{ '<|user|>\n' + m['content'] + eos_token }}\n"
    "{% elif m['role'] == 'system' %}\n{{ '<|system|>\n' + m['content'] + eos_token }}\n"
    "{% elif m['role'] == 'assistant' %}\n{{ '<|assistant|>\n' + m['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
PLAIN = (  # nothing but a line break ends a turn
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
THINKING = (  # the last turn alone shows its (empty) thoughts, as in Qwen3
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OPENED = THINKING.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>plan' }}")
# template -> (what stands before the assistant's content in the trained text, what ends it)
TEMPLATES = {
    "own": (None, "", "<|im_end|>"),
    "chatml": (CHATML, "", "<|im_end|>"),
    "marked": (MARKED, "", "<|im_end|>"),
    "llama3": (LLAMA3, "", "<|eot_id|>"),
    "mistral": (MISTRAL, " ", "</s>"),
    "gemma": (GEMMA, "", "<end_of_turn>"),
    "zephyr": (ZEPHYR, "", "<|im_end|>"),
    "plain": (PLAIN, " ", "\n"),
}
SYSTEM = {"role": "system", "content": "Be brief."}
CONVERSATIONS = {
    "one turn": [("Hi", "Hello!")],
    "several turns": [("Hi", "Hello!"), ("And now?", "Nothing.\n\nReally."), ("Bye", "Bye")],
    "unicode": [("Grüße 👋🏽", "Žluťoučký kůň 🐎 — 日本語"), ("e\u0301?", "👩‍👩‍👧 \u200b.")],
    "empty": [("", ""), ("Say nothing.", "")],
    "white space": [("x", "a:\n\n  indented\n"), ("y", "b \n")],
    "code": [("Write f.", "```python\ndef f():\n    return '<b>'\n```")],
}


def with_template(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(
        [
            "<|eot_id|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<end_of_turn>",
            "<start_of_turn>",
            "</s>",
        ],
        special_tokens=True,
    )
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def conversation(turns, system=False):
    messages = [SYSTEM] if system else []
    for user, assistant in turns:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return messages


def trained_text(dataset, tokenizer) -> list[str]:
    """What the loss counts, by run of neighbouring targets: the mask as a person would read it."""
    runs = []
    for row in dataset.rows:
        marked = zip(row.input_ids.tolist(), row.targets.tolist(), strict=True)
        for target, run in itertools.groupby(marked, key=lambda pair: pair[1]):
            if target:
                runs.append(tokenizer.decode([token for token, _ in run]))
    return runs


def texts(*values):
    return records([{"text": v} for v in values])


# --- files


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_reads_each_file_type(tmp_path):
    found = read_records(write(tmp_path / "a.jsonl", '{"text": "one"}', "", '{"text": "tw\u2028o"}'))
    assert [r["text"] for r in found] == ["one", "tw\u2028o"]  # a line separator within a string cuts nothing
    assert [r.where for r in found] == [f"{tmp_path / 'a.jsonl'}, line {n}" for n in (1, 3)]
    found = read_records(write(tmp_path / "a.json", '[{"prompt": "p", "completion": "c"}]'))
    assert (found[0].kind, found[0]["completion"]) == ("completion", "c")
    assert read_records(write(tmp_path / "a.txt", "one", "two"))[0]["text"] == "one\ntwo\n"
    assert read_records(write(tmp_path / "a.md", "# Title"))[0].kind == "text"
    (tmp_path / "bom.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\r\n{"text": "y"}\r\n')
    assert [r["text"] for r in read_records(tmp_path / "bom.jsonl")] == ["x", "y"]


MESSAGE = '{"role": "user", "content": "hi"}'


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("3", "an object with keys, not a number"),
        ('["text"]', "an object with keys, not a list"),
        ('{"text": "a", "text": "b"}', 'the key "text" appears twice'),
        ('{"text": "a", "id": 3}', 'unknown key "id"'),
        ('{"prompt": "a"}', 'missing key "completion"'),
        ("{}", 'missing key "'),
        ('{"text": 3}', '"text" must be a string, not a number'),
        ('{"text": null}', '"text" must be a string, not null'),
        ('{"text": " "}', '"text" is empty'),
        ('{"text": "\\ud800"}', '"text" holds half of a surrogate pair'),
        ('{"text": "a", "label": true}', '"label" must be a string, not a boolean'),
        ('{"text": "a", "label": ""}', '"label" is empty'),
        ('{"messages": []}', '"messages" must be a list of at least one'),
        ('{"messages": "hi"}', '"messages" must be a list of at least one'),
        ('{"messages": [' + MESSAGE + ', {"role": "user"}]}', '"messages"[1] must hold "role" and "content"'),
        ('{"messages": [{"role": "user", "content": ["hi"]}]}', '"messages"[0]["content"] must be a string'),
        ('{"messages": [{"role": "", "content": "hi"}]}', '"messages"[0]["role"] is empty'),
        ('{"prompt": "p", "completion": "c"}', "keep each shape in a file of its own"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, complaint):
    path = write(tmp_path / "bad.jsonl", '{"text": "fine"}', line)
    with pytest.raises(InputError) as e:
        read_records(path)
    assert str(e.value).startswith(f"{path}, line 2: ")
    assert complaint in str(e.value)


def test_bad_files_are_named(tmp_path):
    cases = {
        "missing.jsonl": (None, "does not exist"),
        "table.csv": (b"text\nhi\n", "not from '.csv'"),
        "empty.jsonl": (b"\n \n", "is empty"),
        "none.json": (b"[]", "holds no records"),
        "object.json": (b'{"text": "a"}', "is a list of records"),
        "index.json": (b'[{"text": "a"}, {"txt": "b"}]', 'index 1: unknown key "txt"'),
        "latin.txt": ("ein\nfür".encode("latin-1"), "line 2 is not UTF-8"),
        "image.txt": (b"\x89PNG\0\0", "is a binary file"),
    }
    for name, (content, complaint) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name) as e:
            read_records(tmp_path / name)
        assert complaint in str(e.value)
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        read_records(tmp_path / "folder.txt")


def test_records_from_python():
    found = records([{"text": "a", "label": 3}], name="mine")
    assert found[0].fields == {"text": "a", "label": "3"}
    assert records(found) == found
    with pytest.raises(InputError, match=r'^mine, index 1: missing key "'):
        records([{"text": "a"}, {}], name="mine")


def test_split_keeps_equal_records_together():
    found = texts(*"aabbccddee")
    train, held = split(found, 0.2, seed=1)
    assert (len(train), len(held)) == (8, 2)
    assert {r["text"] for r in train}.isdisjoint({r["text"] for r in held})
    assert split(found, 0.2, seed=1) == (train, held)
    assert any(split(found, 0.2, seed=s)[1] != held for s in range(2, 6))
    assert [len(part) for part in split(texts("a", "b"), 0.99, seed=0)] == [1, 1]
    with pytest.raises(InputError, match="two different records"):
        split(texts("a", "a"), 0.5, seed=0)
    with pytest.raises(InputError, match="between 0 and 1"):
        split(found, 1.0, seed=0)


def test_hash_is_of_the_content(smollm2_tokenizer):
    a = encode(records([{"prompt": "p", "completion": "c"}]), smollm2_tokenizer, 16)
    b = encode(records([{"completion": "c", "prompt": "p"}]), smollm2_tokenizer, 8, packing=False)
    c = encode(records([{"completion": "d", "prompt": "p"}]), smollm2_tokenizer, 16)
    assert a.sha256 == b.sha256 != c.sha256


# --- domain text


@RELAXED
@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=6), st.integers(3, 40))
def test_windows_are_the_joined_stream(smollm2_tokenizer, values, context):
    ids = [smollm2_tokenizer(v, add_special_tokens=False)["input_ids"] for v in values]
    stream = [token for part in ids for token in [*part, EOS]][:-1]
    if len(stream) < 2:
        return
    found = windows(texts(*values), smollm2_tokenizer, context)
    joined = torch.cat([row.input_ids for row in found.rows]).tolist()
    assert joined == (stream[:-1] if len(stream) % context == 1 else stream)
    assert all(len(row) == context for row in found.rows[:-1])
    assert found.target_tokens == found.tokens - len(found)  # all but the first of each window
    assert all(not row.segments.any() for row in found.rows)  # the texts of a window see each other


def test_unpacked_texts_end_and_are_split(smollm2_tokenizer):
    found = encode(texts("one two three four", "five"), smollm2_tokenizer, 3, packing=False)
    assert [smollm2_tokenizer.decode(r.input_ids) for r in found.rows] == [
        "one two three",
        " four<|im_end|>",
        "five<|im_end|>",
    ]


def test_windows_need_text(smollm2_tokenizer):
    with pytest.raises(InputError, match="not on completion records"):
        windows(records([{"prompt": "p", "completion": "c"}]), smollm2_tokenizer)


# --- tasks


def test_completion_is_trained_and_the_prompt_is_not(smollm2_tokenizer):
    found = records([{"prompt": "2 + 2 =", "completion": " 4"}, {"prompt": "", "completion": "free text"}])
    assert trained_text(encode(found, smollm2_tokenizer, 32), smollm2_tokenizer) == [
        " 4<|im_end|>",
        " text<|im_end|>",
    ]
    everything = encode(found[:1], smollm2_tokenizer, 32, completion_only_loss=False)
    assert trained_text(everything, smollm2_tokenizer) == [" + 2 = 4<|im_end|>"]  # nothing comes before "2"


@RELAXED
@given(
    st.lists(st.tuples(st.text(max_size=60), st.text(min_size=1, max_size=60)), min_size=1, max_size=8),
    st.integers(3, 24),
    st.booleans(),
)
def test_no_trained_token_is_dropped(smollm2_tokenizer, pairs, length, packing):
    # Q, since SmolLM2 has no token at all for some control characters, and a lone end of text is not trained
    pairs = [("Q" + prompt, completion) for prompt, completion in pairs]
    found = records([{"prompt": p, "completion": c} for p, c in pairs])
    data = encode(found, smollm2_tokenizer, length, packing=packing, completion_only_loss=False)
    plain = [smollm2_tokenizer(text, add_special_tokens=False)["input_ids"] for pair in pairs for text in pair]
    whole = sorted(token for ids in plain for token in ids) + [EOS] * len(pairs)
    kept = [token for row in data.rows for token in row.input_ids.tolist()]
    assert sorted(kept) == sorted(whole)
    assert data.skipped == 0
    assert max(len(row) for row in data.rows) <= length


@RELAXED
@given(st.lists(st.tuples(st.text(max_size=60), st.text(min_size=1, max_size=60)), min_size=1, max_size=8))
def test_masks_hold_the_completions(smollm2_tokenizer, pairs):
    found = records([{"prompt": "Q" + p, "completion": c} for p, c in pairs])
    data = encode(found, smollm2_tokenizer, 4096, packing=False)
    for (_, completion), row in zip(pairs, data.rows, strict=True):
        expected = smollm2_tokenizer(completion, add_special_tokens=False)["input_ids"] + [EOS]
        assert row.input_ids[row.targets].tolist() == expected


def test_long_samples_are_split_and_prompt_windows_counted(smollm2_tokenizer):
    prompt, completion = "one two three four five six seven eight nine", " ten eleven twelve"
    found = records([{"prompt": prompt, "completion": completion}])
    data = encode(found, smollm2_tokenizer, 4)
    decoded = [smollm2_tokenizer.decode(row.input_ids) for row in data.rows]
    assert decoded[0].startswith(" nine ten")  # the first two windows are prompt alone
    assert data.skipped == 2
    assert "".join(decoded) == " nine" + completion + "<|im_end|>"


def test_the_end_of_text_is_never_a_window_of_its_own(smollm2_tokenizer):
    found = records([{"prompt": "one", "completion": " two three four"}])  # 4 tokens and the end of text
    data = encode(found, smollm2_tokenizer, 4, packing=False)
    assert trained_text(data, smollm2_tokenizer) == [" two three", "<|im_end|>"]


def test_special_tokens_begin_a_prompt_and_never_end_it(smollm2_tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(smollm2_tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A <|im_end|>", special_tokens=[("<|endoftext|>", 0), ("<|im_end|>", EOS)]
    )
    assert encode_prompt("Hello", tokenizer) == [0, 19556]
    data = encode(records([{"prompt": "Hello", "completion": " you"}]), tokenizer, 16)
    assert tokenizer.decode(data.rows[0].input_ids) == "<|endoftext|>Hello you<|im_end|>"
    record = records([{"text": "a b c d e f", "label": "x"}])[0]
    assert tokenizer.decode(encode_choices(record, ["x"], tokenizer, 5)[0].input_ids) == "<|endoftext|> e f x<|im_end|>"


def test_nothing_to_train_is_an_error(smollm2_tokenizer):
    with pytest.raises(InputError, match="No token of the 1 records"):
        encode(texts("a"), smollm2_tokenizer, 16)
    with pytest.raises(InputError, match="at least 3"):
        encode(texts("a b c"), smollm2_tokenizer, 2)
    with pytest.raises(InputError, match="holds no records"):
        encode([], smollm2_tokenizer, 16)


def test_a_text_longer_than_the_model_takes_warns_of_nothing(smollm2_tokenizer, caplog, monkeypatch):
    import logging

    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tokenizer = copy.deepcopy(smollm2_tokenizer)
    tokenizer.model_max_length = 8
    windows(texts("word " * 50), tokenizer, 16)
    encode(records([{"prompt": "word " * 50, "completion": "word " * 50}]), tokenizer, 16)
    for template in (CHATML, MARKED):
        tokenizer.chat_template = template
        encode(records([{"messages": conversation([("word " * 50, "word " * 50)])}]), tokenizer, 16)
    labelled = records([{"text": "word " * 50, "label": "a"}, {"text": "word", "label": "b"}])
    assert encode_classification(labelled, tokenizer, 16).truncated == 1
    encode_choices(labelled[0], ["a", "b"], tokenizer, 16)
    assert not caplog.records


# --- conversations


@pytest.mark.parametrize("system", [False, True], ids=["", "system"])
@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
@pytest.mark.parametrize("name", TEMPLATES)
def test_what_the_assistant_writes_is_trained(smollm2_tokenizer, name, turns, system):
    template, lead, end = TEMPLATES[name]
    tokenizer = with_template(smollm2_tokenizer, template)
    messages = conversation(turns, system)
    data = encode(records([{"messages": messages}]), tokenizer, 4096)
    trims = name in {"llama3", "gemma"}
    expected = [lead + (answer.strip() if trims else answer) + end for _, answer in turns]
    if name == "plain":  # the line break after an empty answer is not told from white space
        expected = [text for text in expected if text.strip()]
        if not expected:
            return
    assert trained_text(data, tokenizer)[: len(expected)] == expected
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert data.rows[0].input_ids.tolist() == whole


def test_a_token_that_is_half_header_is_trained(smollm2_tokenizer):
    messages = conversation([("x", "\n  indented")])
    data = encode(records([{"messages": messages}]), smollm2_tokenizer, 64)
    # "\n\n " is one token, and its first line break belongs to the header
    assert trained_text(data, smollm2_tokenizer) == ["\n\n  indented<|im_end|>"]


def test_markers_in_a_template_have_the_last_word(smollm2_tokenizer):
    content_only = MARKED.replace(" + '<|im_end|>' }}{% endgeneration %}", " }}{% endgeneration %}{{ '<|im_end|>' }}")
    tokenizer = with_template(smollm2_tokenizer, content_only)
    data = encode(records([{"messages": conversation([("Hi", "Hello!"), ("Bye", "See you")])}]), tokenizer, 64)
    assert trained_text(data, tokenizer) == ["Hello!", "See you"]


def test_everything_is_trained_on_request(smollm2_tokenizer):
    found = records([{"messages": conversation([("Hi", "Hello!")], system=True)}])
    data = encode(found, smollm2_tokenizer, 64, assistant_only_loss=False)
    assert data.target_tokens == data.tokens - 1


def test_an_unstable_template_gives_a_sample_per_turn(smollm2_tokenizer):
    tokenizer = with_template(smollm2_tokenizer, THINKING)
    messages = conversation([("Hi", "Hello!"), ("Bye", "See you")])
    data = encode(records([{"messages": messages}]), tokenizer, 64, packing=False)
    thoughts = "<think>\n\n</think>\n\n"
    assert trained_text(data, tokenizer) == [f"{thoughts}Hello!<|im_end|>", f"{thoughts}See you<|im_end|>"]
    for row, part in zip(data.rows, (messages[:2], messages), strict=True):
        assert row.input_ids.tolist() == tokenizer.apply_chat_template(part, return_dict=True)["input_ids"]


def test_the_assistant_may_begin(smollm2_tokenizer):
    messages = [{"role": "assistant", "content": "Welcome."}, *conversation([("Hi", "Hello!")])]
    for template in (None, CHATML, LLAMA3, MARKED):
        tokenizer = with_template(smollm2_tokenizer, template)
        end = "<|eot_id|>" if template == LLAMA3 else "<|im_end|>"
        data = encode(records([{"messages": messages}]), tokenizer, 64)
        assert trained_text(data, tokenizer) == ["Welcome." + end, "Hello!" + end]


def test_chat_errors_say_what_to_do(smollm2_tokenizer):
    def complaint(messages, template):
        tokenizer = with_template(smollm2_tokenizer, template)
        if template is None:
            tokenizer.chat_template = None
        with pytest.raises(InputError, match="index 0") as e:
            encode(records([{"messages": messages}]), tokenizer, 64)
        return str(e.value)

    hello = conversation([("Hi", "Hello!")])
    assert "this tokenizer has none" in complaint(hello, None)
    assert 'no message has the role "assistant"' in complaint(hello[:1], CHATML)
    assert "roles must alternate" in complaint([hello[0], *hello], MISTRAL)
    assert "set assistant_only_loss: false" in complaint(hello, OPENED)
    assert "roles must alternate" in complaint(hello[1:], MISTRAL)


# --- labels


def test_labels_are_learnt_as_completions(smollm2_tokenizer):
    labelled = [{"text": "Good film.", "label": "positive"}, {"text": "Bad film.", "label": "negative"}]
    tasks = [{"prompt": r["text"], "completion": " " + r["label"]} for r in labelled]
    a, b = (encode(records(data), smollm2_tokenizer, 32) for data in (labelled, tasks))
    assert torch.equal(a.rows[0].input_ids, b.rows[0].input_ids)
    assert torch.equal(a.rows[0].targets, b.rows[0].targets)
    assert trained_text(a, smollm2_tokenizer) == [" positive<|im_end|>", " negative<|im_end|>"]
    assert label_choices(records(labelled)) == ["negative", "positive"]
    with pytest.raises(InputError, match="index 0: the \"label\" 'positive' is none of 'negative'"):
        encode(records(labelled), smollm2_tokenizer, 32, labels=["negative"])
    with pytest.raises(InputError, match="nothing to tell apart"):
        label_choices(records(labelled[:1]))


def test_choices_lose_the_text_s_left(smollm2_tokenizer):
    record = records([{"text": "one two three four", "label": "good"}])[0]
    rows = encode_choices(record, ["good", "good enough"], smollm2_tokenizer, 5)
    assert [smollm2_tokenizer.decode(row.input_ids) for row in rows] == [
        " two three four good<|im_end|>",
        " three four good enough<|im_end|>",
    ]
    assert [smollm2_tokenizer.decode(row.input_ids[row.targets]) for row in rows] == [
        " good<|im_end|>",
        " good enough<|im_end|>",
    ]
    with pytest.raises(InputError, match="no room for the label 'good enough'"):
        encode_choices(record, ["good enough"], smollm2_tokenizer, 3)


def test_classification(smollm2_tokenizer):
    labelled = records([{"text": "a b c d e f", "label": "yes"}, {"text": "g", "label": "no"}])
    data = encode_classification(labelled, smollm2_tokenizer, 4)
    assert (data.kind, data.labels, data.truncated, data.target_tokens) == (
        "classification",
        ("no", "yes"),
        1,
        2,
    )
    batch = next(eval_batches(data, 2, pad_token_id=EOS))
    assert batch.labels.tolist() == [1, 0]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert (batch.tokens, batch.targets) == (5, 2)
    assert set(batch.inputs) == {"input_ids", "attention_mask"}


# --- batches


def rows_of(*lengths):
    return Dataset(
        [Row(torch.full((n,), 10 + n), torch.arange(n) > 0, torch.zeros(n, dtype=torch.long)) for n in lengths],
        "text",
        "",
    )


@RELAXED
@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 12), st.integers(0, 3))
def test_the_stream_is_resumable_and_fair(size, batch_size, start, seed):
    data = rows_of(*range(2, 2 + size))
    stream = list(itertools.islice(batches(data, batch_size, seed=seed, pad_token_id=0), start + 6))
    resumed = itertools.islice(batches(data, batch_size, seed=seed, pad_token_id=0, start=start), 6)
    for a, b in zip(stream[start:], resumed, strict=True):
        assert torch.equal(a.input_ids, b.input_ids)
        assert torch.equal(a.labels, b.labels)
    firsts = [int(first) for batch in stream for first in batch.input_ids[:, 0]]
    for epoch in range(len(firsts) // size):
        assert len(set(firsts[epoch * size : (epoch + 1) * size])) == size


def test_orders_differ_by_epoch_and_seed():
    data = rows_of(*range(2, 34))
    first, second = (b.input_ids[:, 0].tolist() for b in itertools.islice(batches(data, 32, seed=1, pad_token_id=0), 2))
    assert first != second
    assert first != next(batches(data, 32, seed=2, pad_token_id=0)).input_ids[:, 0].tolist()


def test_padding_is_not_trained_and_the_end_of_text_is(smollm2_tokenizer):
    found = records([{"prompt": "a b c", "completion": " d"}, {"prompt": "e", "completion": " f"}])
    data = encode(found, smollm2_tokenizer, 8, packing=False)
    batch = next(eval_batches(data, 2, pad_token_id=EOS))
    assert batch.input_ids[1, 2:].tolist() == [EOS, EOS, EOS]
    assert batch.labels[1].tolist() == [-100, int(batch.input_ids[1, 1]), EOS, -100, -100]
    assert (batch.tokens, batch.targets) == (8, 4)
    assert batch.attention_mask is None
    assert batch.position_ids is None
    assert batch.to("cpu").input_ids.shape == (2, 5)


def test_bad_batches_are_refused():
    with pytest.raises(InputError, match="no rows"):
        batches(Dataset([], "text", ""), 1, seed=0, pad_token_id=0)
    with pytest.raises(InputError, match="at least 1"):
        eval_batches(rows_of(2), 0, 0)


def test_neighbours_of_one_length_go_together_and_nothing_is_padded():
    alone = list(eval_batches(rows_of(4, 4, 4, 2, 4, 4), 1, 0))
    found = stacked(alone, 2)
    assert [tuple(b.input_ids.shape) for b in found] == [(2, 4), (1, 4), (1, 2), (2, 4)]
    assert sum(b.tokens for b in found) == sum(b.tokens for b in alone)
    assert sum(b.targets for b in found) == sum(b.targets for b in alone)
    for name in ("input_ids", "labels"):
        rows = [row for b in found for row in getattr(b, name)]
        assert all(torch.equal(row, getattr(b, name)[0]) for row, b in zip(rows, alone, strict=True))


def test_eval_batches_are_one_pass_in_order():
    found = list(eval_batches(rows_of(4, 2, 3), 2, 0))
    assert [b.input_ids[:, 0].tolist() for b in found] == [[14, 12], [13]]


# --- packing


def tiny(implementation="sdpa"):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,  # so that attention matters
        attn_implementation=implementation,
    )
    return LlamaForCausalLM(config).eval()


def packed_rows(*rows):
    """Rows of segments of the given lengths, with random tokens; and the segments' tokens."""
    generator = torch.Generator().manual_seed(1)
    made, alone = [], []
    for lengths in rows:
        parts = [torch.randint(0, 64, (n,), generator=generator) for n in lengths]
        segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        targets = torch.cat([torch.arange(n) > 0 for n in lengths])
        made.append(Row(torch.cat(parts), targets, segments))
        alone.append(parts)
    return Dataset(made, "completion", ""), alone


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("rows", "batch_size"),
    [
        ([[3, 4, 2]], 1),
        ([[3, 1, 1, 2]], 1),
        ([[3, 4, 2], [5, 4]], 2),
        ([[3, 4, 6], [5, 2]], 2),  # unequal rows: padding
        ([[9], [2, 3]], 2),  # one row is not packed, the other is padded
        ([[9], [5]], 2),  # none is packed
    ],
)
def test_packed_samples_do_not_see_each_other(rows, batch_size, implementation):
    model = tiny(implementation)
    data, alone = packed_rows(*rows)
    (batch,) = eval_batches(data, batch_size, pad_token_id=0)
    with torch.no_grad():
        logits = model(**batch.inputs).logits
        for row, parts in enumerate(alone):
            at = 0
            for part in parts:
                expected = model(input_ids=part[None]).logits[0]
                torch.testing.assert_close(logits[row, at : at + len(part)], expected, atol=1e-5, rtol=1e-5)
                at += len(part)


def test_packed_loss_is_the_mean_of_the_samples():
    model = tiny()
    data, alone = packed_rows([3, 4, 6], [5, 2])
    (batch,) = eval_batches(data, 2, pad_token_id=0)
    with torch.no_grad():
        loss = model(**batch.inputs, labels=batch.labels).loss
        parts = [part for row in alone for part in row]
        sums = [model(input_ids=p[None], labels=p[None]).loss * (len(p) - 1) for p in parts]
    assert batch.targets == sum(len(p) - 1 for p in parts)
    torch.testing.assert_close(loss, sum(sums) / batch.targets)


def test_a_cache_would_break_packing():
    """Why Batch.inputs holds use_cache=False. Should this fail, transformers no longer needs it."""
    data, _ = packed_rows([3, 4])
    (batch,) = eval_batches(data, 1, pad_token_id=0)
    model = tiny()
    with torch.no_grad():
        right = model(**batch.inputs).logits
        wrong = model(**{**batch.inputs, "use_cache": True}).logits
    assert not torch.allclose(right, wrong, atol=1e-3)


def test_packing_wastes_little_and_breaks_no_sample(smollm2_tokenizer):
    found = records([{"prompt": "p" * (n % 7), "completion": " word" * (n % 5 + 1)} for n in range(40)])
    packed = encode(found, smollm2_tokenizer, 16)
    alone = encode(found, smollm2_tokenizer, 16, packing=False)
    assert packed.tokens == alone.tokens
    assert packed.target_tokens == alone.target_tokens
    assert len(packed) <= 1.2 * packed.tokens / 16 + 1
    segments = [
        tuple(row.input_ids[row.segments == n].tolist())
        for row in packed.rows
        for n in range(int(row.segments[-1]) + 1)
    ]
    assert sorted(segments) == sorted(tuple(row.input_ids.tolist()) for row in alone.rows)


def test_sha256_of_a_file_and_of_its_records(tmp_path, smollm2_tokenizer):
    data = [{"text": "Straße one"}, {"text": "two"}]
    path = write(tmp_path / "a.jsonl", *(json.dumps(d) for d in data))
    assert windows(read_records(path), smollm2_tokenizer).sha256 == windows(records(data), smollm2_tokenizer).sha256
