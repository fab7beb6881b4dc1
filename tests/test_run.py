"""A run: what is written beside the weights, and what is read back."""

import json

import pytest
import torch

from halfbyte import InputError, run
from halfbyte.containers.shards import Shards
from halfbyte.folders import disk_bytes
from halfbyte.model import load
from halfbyte.outputs import save
from halfbyte.plan import inventory
from halfbyte.run import see_through
from halfbyte.scheme import scheme
from halfbyte.steps import Adapt, Evaluate, Freeze
from miniatures import folder, logits

TEXT = [{"text": "a small text that is learnt by heart, twice over and once again"}] * 4
SHORT = {"steps": 2, "batch_size": 2, "max_length": 24, "learning_rate": 1e-2}


@pytest.fixture
def base(tmp_path):
    return folder(tmp_path / "base", words=True)


def test_a_result_carries_all_that_belongs_to_it(tmp_path, base):
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# base\n")
    made = load(base).train(TEXT, method="full", **SHORT)
    made.evaluate(TEXT, stage="trained")
    path = save(made, tmp_path / "out")
    for name in (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
        "halfbyte.json",
    ):
        assert (path / name).is_file()
    again = run.load(path)
    assert again.tokenizer.chat_template == made.tokenizer.chat_template
    assert again.tokenizer("words")["input_ids"] == made.tokenizer("words")["input_ids"]
    card = (path / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    for part in (made.loaded.sha256[:16], made.notes["data_sha256"], "learning_rate", "| trained |", "`base`"):
        assert part in card
    assert str(tmp_path) not in card  # where it lay is nobody's business
    (row,) = json.loads((path / "ledger.json").read_text())
    assert row["stage"] == "trained"
    assert row["bytes"] == disk_bytes(path)


@pytest.mark.parametrize("to", ["W4A16", "NF4", "W8A8", "int8-tensor"])
def test_bits_per_weight_are_those_in_memory(base, to):
    made = load(base).quantize(to)
    tensors = {id(t): t for t in [*made.model.parameters(), *made.model.buffers()]}
    held = sum(t.nbytes for t in tensors.values()) - sum(
        b.nbytes
        for m in made.model.modules()
        for n, b in m.named_buffers(recurse=False)
        if n in m._non_persistent_buffers_set
    )
    parameters = sum(e.parameters for e in inventory(made.model) if not e.tied_to)
    assert made.bits_per_weight() == pytest.approx(8 * held / parameters)


def test_a_model_without_a_tokenizer_is_quantized_but_not_trained(tmp_path):
    made = load(folder(tmp_path / "bare"))
    made.quantize("int4-g32").save(tmp_path / "out")
    with pytest.raises(InputError, match="no tokenizer"):
        load(tmp_path / "bare").train(TEXT, method="lora", **SHORT)


def test_text_is_not_put_to_a_model_that_reads_one_and_writes_another(tmp_path):
    with pytest.raises(InputError, match=r"reads one text and writes another.*--calibration none"):
        load(folder(tmp_path / "t5", "t5", words=True)).evaluate(TEXT)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_model_is_read_in_the_dtype_that_is_asked_for(base, dtype):
    made = run.load(base, dtype)
    assert {str(p.dtype) for p in made.model.parameters()} == {f"torch.{dtype}"}


def test_an_adapter_is_read_in_the_dtype_it_was_trained_in(tmp_path, base):
    made = load(base, "bfloat16").train(TEXT, method="qlora", **SHORT)
    path = made.save(tmp_path / "adapter")
    assert torch.equal(logits(run.load(path).model), logits(made.model))
    assert run.load(path).loaded.config.dtype == torch.bfloat16


@pytest.mark.parametrize(("method", "to"), [("qlora", None), ("qlora", "int4-g32"), ("qat-lora", "W4A16_ASYM")])
def test_an_adapters_base_comes_back_in_the_form_it_was_trained_on(tmp_path, base, method, to):
    made = load(base).train(TEXT, method=method, to=to, **SHORT)
    again = run.load(made.save(tmp_path / "adapter"))
    assert torch.equal(logits(again.model), logits(made.model))
    assert again.notes == made.notes


def test_an_adapter_on_rules_of_ones_own_comes_back(tmp_path, base):
    own = [
        {"match": "@embedding"},
        {"match": r".*\.down_proj", "weight": "int8-channel"},
        {"match": ".*", "weight": "int2-g32"},
    ]
    made = load(base)
    made.apply(Freeze(scheme=own), Adapt(r=4))
    again = run.load(made.save(tmp_path / "adapter"))
    assert torch.equal(logits(again.model), logits(made.model))


@pytest.mark.parametrize("to", ["q4_0", "iq4_nl", "uint4-tensor"])
def test_what_no_folder_holds_is_known_before_the_work(base, to):
    with pytest.raises(InputError, match=to):
        load(base).holds(scheme(to))


def test_codes_that_stay_and_that_no_folder_holds_are_known_before_the_work(base):
    made = load(base)
    made.apply(Freeze(scheme=[{"match": "@embedding", "weight": "q8_0"}, {"match": ".*"}]))
    with pytest.raises(InputError, match=r"embed_tokens.weight \(q8_0\).*OUT.gguf.*--requantize"):
        made.holds(scheme("W4A16"))


@pytest.mark.parametrize("to", ["W4A16", "NF4", "FP8", "W8A8"])
def test_what_a_folder_holds(base, to):
    load(base).holds(scheme(to))


def test_seeing_through_a_grid_changes_no_stored_weight(base):
    made = load(base)
    before = {n: p.clone() for n, p in made.model.named_parameters()}
    see_through(made, scheme("int2-g32"))
    assert not torch.equal(logits(made.model), logits(load(base).model))
    assert all(torch.equal(p, before[n]) for n, p in made.model.named_parameters())


def test_an_evaluation_against_a_model_a_run_and_a_reference_agree(base):
    made = load(base).quantize("int4-g32")
    rows = [made.evaluate(TEXT, against=other).as_dict() for other in (str(base), load(base))]
    assert rows[0] == rows[1]
    assert rows[0]["kl_mean"] > 0
    assert load(base).evaluate(TEXT, against=str(base)).kl_mean == 0


def test_a_budget_stops_the_run_after_its_row_is_written(base):
    made = load(base).quantize("int2-g32")
    with pytest.raises(RuntimeError, match="--max-kl"):
        made.apply(Evaluate(data=TEXT, against=str(base), max_kl=1e-9))
    assert len(made.rows) == 1


def test_the_masters_of_qat_are_kept_beside_its_codes(tmp_path, base):
    made = load(base).train(TEXT, method="qat", to="int4-g32", **SHORT)
    path = made.save(tmp_path / "out")
    masters = Shards([path / "masters" / "masters.safetensors"])
    shapes = {n: masters.shape(n) for n in masters}
    assert shapes == {e.name: e.shape for e in inventory(made.model) if e.before == "int4-g32"}
    assert disk_bytes(path) == (path / "model.safetensors").stat().st_size  # they are not part of the model
