"""What a model writes itself: its own distribution, the template's turns, the same rows every time."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import halfbyte
from halfbyte import data, self_samples
from halfbyte.self_samples import sample, turns_of
from halfbyte.steps import Evaluate
from miniatures import bpe, folder, make, sentencepiece, tokenizer


@pytest.fixture(scope="module")
def model(tiny_llama):
    return halfbyte.load(tiny_llama)


def bare(words):
    words = copy.deepcopy(words)
    words.chat_template = None
    return words


def test_rows_are_the_same_every_time_and_others_for_another_seed(model):
    first, again, other = (sample(model.model, model.tokenizer, 3, 40, seed) for seed in (0, 0, 1))
    assert first.sha256 == again.sha256 != other.sha256
    for a, b, c in zip(first.rows, again.rows, other.rows, strict=True):
        assert torch.equal(a.input_ids, b.input_ids)
        assert not torch.equal(a.input_ids, c.input_ids)
    assert not torch.equal(first.rows[0].input_ids, first.rows[1].input_ids)


def test_what_else_is_drawn_from_changes_nothing_and_is_not_changed(model):
    first = sample(model.model, model.tokenizer, 2, 30)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    assert sample(model.model, model.tokenizer, 2, 30).sha256 == first.sha256
    assert torch.equal(torch.random.get_rng_state(), state)


def test_rows_have_the_length_and_tokens_that_the_tokenizer_knows():
    words = tokenizer()
    rows = sample(make("llama"), words, 18, 50)  # 128 rows of the embedding, 99 of them words; two lots of rows
    assert len(rows) == 18
    assert {len(r) for r in rows.rows} == {50}
    assert max(int(r.input_ids.max()) for r in rows.rows) < len(words) < 128
    for batch in data.eval_batches(rows, 4, 0):
        assert (batch.input_ids.shape[1], batch.position_ids) == (50, None)
    assert next(data.batches(rows, 2, seed=0, pad_token_id=0)).targets > 0


def test_templated_rows_begin_with_the_users_header(model):
    rows = sample(model.model, model.tokenizer, 4, 60)
    header = model.tokenizer("<|im_start|>user\n")["input_ids"]
    for r in rows.rows:
        assert r.input_ids[: len(header)].tolist() == header
        assert not r.targets[: len(header)].any()


@pytest.mark.parametrize("words", [bpe(), tokenizer()], ids=["bpe", "characters"])
def test_the_pieces_of_a_template_make_its_conversation(words):
    turns, said = turns_of(words), [words(t, add_special_tokens=False)["input_ids"] for t in ("abc", "def")]
    ids = [*turns.opening, *said[0], *turns.answer, *said[1], *turns.question]
    messages = [{"role": r, "content": t} for r, t in (("user", "abc"), ("assistant", "def"), ("user", ""))]
    whole = words.apply_chat_template(messages, tokenize=False)
    assert whole.startswith(words.decode(ids))


def test_a_blank_before_a_text_is_left_to_its_first_token():
    words = sentencepiece()
    turns = turns_of(words)
    assert [words.decode(ids) for ids in vars(turns).values()] == ["user:", "</s> assistant:", "</s> user:"]


class Script:
    """A causal model that draws what it is told to, with certainty."""

    def __init__(self, drawn: list[int], end: int, size: int) -> None:
        self.drawn, self.size = drawn, size
        self.config = SimpleNamespace(max_position_embeddings=512)
        self.generation_config = SimpleNamespace(eos_token_id=[end])
        self.device = torch.device("cpu")

    def eval(self):
        return self

    def __call__(self, input_ids, **_):
        logits = torch.full((*input_ids.shape, self.size), -1e9)
        logits[..., self.drawn.pop(0)] = 0.0
        return SimpleNamespace(logits=logits)


def scripted(monkeypatch, words, drawn, length):
    monkeypatch.setattr(self_samples.kv_cache, "floats", lambda model: {})
    return sample(Script(drawn, words.eos_token_id, len(words)), words, 1, length).rows[0]


def test_each_end_opens_the_next_turn_and_only_what_was_drawn_counts(monkeypatch):
    words = tokenizer()
    a, b, x, end = (*words("abx")["input_ids"], words.eos_token_id)
    given = len("assistant:")
    drawn = [a, end, *[x] * given, b, end, *[x] * len("user:"), a, a]  # x is where the template has its say
    row = scripted(monkeypatch, words, drawn, len("user:") + len(drawn))
    assert words.decode(row.input_ids) == "user:a</s>assistant:b</s>user:aa"
    assert words.decode(row.input_ids[row.targets]) == "a</s>b</s>aa"


def test_an_end_that_closes_no_turn_opens_a_new_text(monkeypatch):
    words = bpe()
    words.eos_token = "<|endoftext|>"  # while <|im_end|> closes turns
    a, end = words("a")["input_ids"][0], words.eos_token_id
    opening = turns_of(words).opening
    row = scripted(monkeypatch, words, [a, end, *[a] * len(opening), a], 2 * len(opening) + 3)
    assert row.input_ids.tolist() == [*opening, a, end, *opening, a]


def test_without_a_template_rows_begin_with_the_token_between_texts_and_go_on_after_it(monkeypatch):
    words = bare(bpe())
    words.bos_token = words.eos_token
    a, end = words("a")["input_ids"][0], words.eos_token_id
    row = scripted(monkeypatch, words, [a, end, a, a], 5)
    assert row.input_ids.tolist() == [end, a, end, a, a]
    assert row.targets.tolist() == [False, True, True, True, True]


def test_a_template_that_refuses_a_plain_conversation_is_none():
    words = tokenizer()
    words.chat_template = "{{ raise_exception('tools only') }}"
    assert turns_of(words) == turns_of(bare(words))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mixtral"])
def test_tokens_are_drawn_from_the_models_own_distribution(name):
    """Each token's place in the distribution that the whole row, read at once, gives: were it another's, the mean log
    probability of what was drawn would not be that of the distribution's entropy."""
    net, words = make(name), bare(tokenizer())
    with torch.no_grad():
        for p in net.parameters():
            p *= 3.0  # else all tokens are about as likely
    rows = sample(net, words, 32, 60)
    ids = torch.stack([r.input_ids for r in rows.rows])
    with torch.no_grad():
        logp = F.log_softmax(net(ids).logits[:, :-1, : len(words)].double(), -1)
    found = logp.gather(2, ids[:, 1:, None])[..., 0]
    wanted = (logp.exp() * logp).sum(-1)
    spread = ((logp.exp() * logp.square()).sum(-1) - wanted.square()).sum().sqrt()
    assert abs((found - wanted).sum()) < 3 * spread
    uniform = logp.mean(-1)  # what tokens drawn from elsewhere would give
    assert abs((uniform - wanted).sum()) > 10 * spread


def test_what_has_no_room_or_writes_nothing_is_refused(model):
    with pytest.raises(halfbyte.InputError, match=r"512 .*--context 512"):
        sample(model.model, model.tokenizer, 1, 600)
    with pytest.raises(halfbyte.InputError, match="no room"):
        sample(model.model, model.tokenizer, 1, 3)
    with pytest.raises(halfbyte.InputError, match="keeps no keys and values"):
        sample(make("bert"), model.tokenizer, 1, 30)


def test_a_ledgers_row_without_data(tiny_llama, tmp_path):
    ours = halfbyte.load(tiny_llama).quantize("W4A16", 32)
    ours.apply(Evaluate(data="self", against=str(tiny_llama), context=64, max_windows=3))
    row = ours.rows[-1][1]
    assert row["kl_mean"] > 0
    assert row["windows"] == 3
    assert "the reference wrote itself" in row["conventions"]
    theirs = halfbyte.load(tiny_llama, "float32")
    drawn = sample(theirs.model, theirs.tokenizer, 3, 64)
    assert row["tokens"] == drawn.target_tokens
    with pytest.raises(halfbyte.InputError, match="--against MODEL"):
        Evaluate(data="self")


def test_a_classifier_has_no_samples(tmp_path):
    made = halfbyte.load(folder(tmp_path / "bert", "bert", words=True))
    with pytest.raises(halfbyte.InputError, match="--data self"):
        made.apply(Evaluate(data="self", against=made))
