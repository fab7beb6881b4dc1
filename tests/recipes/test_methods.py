"""Whole methods on small models: trained, saved, read back, by us and by plain transformers."""

import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit

from halfbyte import InputError, kernels, models, outputs, run
from halfbyte.adapters import attached
from halfbyte.containers.shards import Shards
from halfbyte.formats import FORMATS
from halfbyte.layers import Codes, Linear, ops, weights
from halfbyte.methods import method_steps
from halfbyte.model import load
from halfbyte.steps import Adapt, Freeze, Grid, Merge, Train
from miniatures import IDS, folder, logits, training_logits

TEXT = [{"text": "a small text that is learnt by heart, twice over and once again"}] * 4
SHORT = {"data": TEXT, "steps": 3, "batch_size": 2, "max_length": 24, "learning_rate": 1e-2}
SHAPES = {
    "text": TEXT,
    "messages": [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}] * 4,
    "completion": [{"prompt": "one and ", "completion": "two"}] * 4,
    "label": [{"text": f"number {i}", "label": "odd" if i % 2 else "even"} for i in range(4)],
}
INTEGERS = [f"{u}int{bits}-{group}" for bits in range(2, 9) for u in ("", "u") for group in ("channel", "g32")]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def llama(tmp_path):
    return folder(tmp_path / "llama", words=True)


def trained(base, method, to=None, **changes):
    made = load(base)
    made.train(method=method, to=to, **{**SHORT, **changes})
    return made


def saved(made, path):
    return made.save(path)


def foreign(path, cls=transformers.AutoModelForCausalLM):
    model = cls.from_pretrained(path).eval()
    for m in model.modules():
        if isinstance(m, Linear4bit):
            m.support_avx512bf16_for_cpu = False  # it would repack the weights and multiply in bf16
    return model


# ---- every method: what is saved is what was trained


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("method", "to"),
    [("full", None), ("lora", None), ("qlora", None), ("qlora", "NF4_DQ"), ("qlora", "int4-g32"), ("qat", "W4A16"),
     ("qat", "W8A8"), ("qat-lora", "W4A16_ASYM"), ("scales", "int4-g32"), ("scales", "NF4")],
)  # fmt: skip
def test_a_method_is_trained_saved_and_read_back_bit_for_bit(tmp_path, method, to, dtype):
    base = folder(tmp_path / "base", dtype=dtype, words=True)
    made = trained(base, method, to)
    assert not torch.equal(logits(made.model), logits(run.load(base).model))
    assert not any(p.requires_grad for p in made.model.parameters())
    path = saved(made, tmp_path / "out")
    again = run.load(path)
    assert torch.equal(logits(again.model), logits(made.model))
    if not attached(made.model):
        assert again.loaded.config.dtype == dtype


@pytest.mark.parametrize(
    ("method", "to"), [("full", None), ("qat", "int4-g32"), ("qat", "W8A8"), ("scales", "int4-g32")]
)
@pytest.mark.usefixtures("torch_products")
def test_plain_transformers_computes_what_was_trained(tmp_path, llama, method, to):
    made = trained(llama, method, to)
    assert torch.equal(logits(foreign(saved(made, tmp_path / "out"))), logits(made.model))


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "qat", "qat-lora", "scales"])
def test_every_method_learns(llama, method):
    made = trained(llama, method, "int8-g32" if method in ("qat", "qat-lora", "scales") else None, steps=20)
    curve = made.log.curve
    assert curve[-1]["loss"] < curve[0]["loss"] - 0.05
    trains = {"full": "stored", "qat": "stored", "scales": "scales"}
    assert made.notes["trained"] == trains.get(method, "adapters")


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "qat", "qat-lora", "scales"])
def test_the_same_seed_gives_the_same_model(llama, method):
    to = "int4-g32" if method in ("qat", "qat-lora", "scales") else None
    first, second = (logits(trained(llama, method, to).model) for _ in range(2))
    assert torch.equal(first, second)


# ---- distillation, and codes that a solver began


def far(made, base):
    """KL from the float model, on what is trained on."""
    return made.evaluate(TEXT, against=str(base)).kl_mean


@pytest.mark.parametrize("method", ["qat", "qat-lora", "scales"])
@pytest.mark.parametrize("loss", ["kl", "both"])
def test_a_method_is_held_to_the_float_model(llama, method, loss):
    before = load(llama).quantize("int3-g32")
    made = trained(llama, method, "int3-g32", loss=loss, steps=30, learning_rate=3e-4 if method == "qat" else 3e-3)
    assert made.teacher is not None
    assert made.notes["training"]["loss"] == loss
    if loss == "kl":
        assert far(made, llama) < 0.8 * far(before, llama)


def test_scales_go_on_from_a_solvers_codes(tmp_path, llama):
    made = trained(llama, "scales", "int3-g32", init="gptq", loss="kl", learning_rate=1e-4)
    codes = {n: w.stored.q.codes for n, w in weights(made.model).items() if isinstance(w.stored, Codes)}
    rounded = {n: w.stored.q.codes for n, w in weights(load(llama).quantize("int3-g32").model).items() if n in codes}
    assert any(not torch.equal(c, rounded[n]) for n, c in codes.items())
    assert made.notes["solver"] == "gptq"
    again = run.load(saved(made, tmp_path / "out"))
    assert torch.equal(logits(again.model), logits(made.model))


@pytest.mark.parametrize("to", ["int3-g32", "NF4", "W4A16_ASYM", "W4A8", "FP8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_qat_goes_on_from_a_solvers_codes_and_ships_what_was_trained(tmp_path, to, dtype):
    base = folder(tmp_path / "base", dtype=dtype, words=True)
    begun = load(base).quantize(to, solver="gptq", calibration=TEXT, max_length=24)
    *before, train, last = method_steps("qat", to, SHORT, init="gptq")
    made = load(base).apply(*before, last)
    assert torch.equal(logits(made.model), logits(begun.model))
    made = load(base).apply(*before, train)
    seen = training_logits(made.model)
    assert not torch.equal(seen, logits(begun.model))
    made.apply(last)
    with kernels.using("reference"):
        torch.testing.assert_close(logits(made.model), seen, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05)
    again = run.load(saved(made, tmp_path / "out"))
    assert torch.equal(logits(again.model), logits(made.model))


def test_zeros_that_are_floats_learn_too(llama):
    to = "uint4-g32-affine"
    before = {n: w.stored.q for n, w in weights(load(llama).quantize(to).model).items() if isinstance(w.stored, Codes)}
    after = weights(trained(llama, "scales", to, steps=5).model)
    assert before
    for name, q in before.items():
        now = after[name].stored.q
        assert torch.equal(now.codes, q.codes)
        assert not torch.equal(now.parts["zero"], q.parts["zero"])
        assert now.parts["zero"].dtype == q.parts["zero"].dtype


def test_codes_that_are_there_are_held_to_another_model(tmp_path, llama):
    before = load(llama).quantize("int3-g32")
    path = saved(before, tmp_path / "codes")
    with pytest.raises(InputError, match="--teacher MODEL"):
        trained(path, "scales", "int3-g32", loss="kl")
    made = trained(path, "scales", "int3-g32", loss="kl", teacher=str(llama), steps=20, learning_rate=1e-3)
    assert made.notes["teacher"] == str(llama)
    assert far(made, llama) < far(before, llama)


# ---- full


def test_tied_embeddings_are_trained_once_and_stay_tied(tmp_path, llama):
    made = trained(llama, "full")
    path = saved(made, tmp_path / "out")
    assert "lm_head.weight" not in Shards.of_folder(path)
    again = foreign(path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert made.log.trainable == again.num_parameters()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["full", "qlora"])
def test_every_shape_of_data_goes_through_train(llama, method, shape):
    made = trained(llama, method, data=SHAPES[shape])
    assert made.notes["data_kind"] == shape
    assert len(made.log.curve) == 3


# ---- qlora


def test_qlora_holds_its_base_as_codes_and_no_float_copy(llama):
    seen = {}

    def look(row):
        model = made.model
        coded = {n: w for n, w in weights(model).items() if isinstance(w.stored, Codes)}
        inside = {id(t) for w in coded.values() for t in (*w.stored.parameters(), *w.stored.buffers())}
        sizes = {w.shape.numel() for w in coded.values()}
        floats = [
            (n, t)
            for n, t in [*model.named_parameters(), *model.named_buffers()]
            if t.is_floating_point() and id(t) not in inside and ".adapters." not in n and t.numel() in sizes
        ]
        assert [n for n, _ in floats if "embed" not in n] == []
        assert all(w.stored.q.parts["codes"].dtype == torch.uint8 for w in coded.values())
        assert all(w._seen is None for w in coded.values())  # nothing is kept beside the codes either
        seen["bits"] = [8 * w.stored.q.nbytes / w.shape.numel() for w in coded.values()]
        seen["names"] = set(coded)

    made = load(llama)
    made.train(method="qlora", on_step=look, **SHORT)
    assert {n.rpartition(".")[0].rpartition(".")[2] for n in seen["names"]} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert set(seen["bits"]) == {4.5}


def test_qlora_leaves_the_codes_as_they_are(llama):
    made = trained(llama, "qlora")
    frozen = load(llama).quantize("NF4")
    ours, theirs = weights(made.model), weights(frozen.model)
    for name, w in theirs.items():
        if isinstance(w.stored, Codes):
            assert torch.equal(ours[name].stored.q.codes, w.stored.q.codes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_qlora_merges_into_what_was_trained(tmp_path, dtype):
    made = trained(folder(tmp_path / "base", dtype=dtype, words=True), "qlora")
    expected = {n: w.sum() for n, w in weights(made.model).items()}
    unmerged = logits(made.model)
    made.merge()
    assert all(torch.equal(w.value(), expected[n]) for n, w in weights(made.model).items())
    assert {w.value().dtype for w in weights(made.model).values()} == {dtype}
    assert not attached(made.model)
    # the sum is rounded once to the dtype; the factored path never is
    torch.testing.assert_close(logits(made.model), unmerged, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05)
    again = foreign(saved(made, tmp_path / "out"))
    assert torch.equal(logits(again), logits(made.model))


def test_qlora_merges_into_the_original_where_that_is_asked_for(tmp_path, llama):
    made = trained(llama, "qlora")
    original = weights(load(llama).model)
    deltas = {n: a.delta() for n, a in ((f"{k}.weight", v) for k, v in attached(made.model).items())}
    made.apply(Merge(base="original"))
    for name, w in weights(made.model).items():
        assert torch.equal(w.value(), original[name].base() + deltas[name] if name in deltas else original[name].base())


@pytest.mark.parametrize("to", ["W4A16", "int8-channel", "NF4"])
def test_a_merge_is_quantized_into_the_scheme_that_is_given(tmp_path, llama, to):
    made = trained(llama, "qlora")
    path = saved(made, tmp_path / "adapter")
    again = load(path)
    again.merge(to=to)
    direct = trained(llama, "qlora")
    direct.merge()
    direct.quantize(to)
    assert torch.equal(logits(again.model), logits(direct.model))
    assert torch.equal(logits(load(saved(again, tmp_path / "out")).model), logits(again.model))


def test_training_goes_on_from_an_adapter(tmp_path, llama):
    path = saved(trained(llama, "qlora"), tmp_path / "one")
    made = load(llama)
    made.apply(Freeze(scheme="NF4"), Adapt(path=str(path)))
    assert torch.equal(logits(made.model), logits(load(path).model))
    made.apply(Train(**SHORT))
    assert not torch.equal(logits(made.model), logits(load(path).model))


# ---- qat and qat-lora


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "to", [*(f for f in INTEGERS if f not in list(FORMATS)), "int4-tensor", "W8A8", "W4A16_ASYM", "FP8A16"]
)
@pytest.mark.usefixtures("torch_products")
def test_qat_lora_ships_exactly_what_was_trained(tmp_path, to, dtype):
    """What test_lossless.py says of the formats that are rows, of others; and the adapter's folder gives it too."""
    made = trained(folder(tmp_path / "base", dtype=dtype, words=True), "qat-lora", to, steps=2)
    in_training, in_eval = training_logits(made.model), logits(made.model)
    assert torch.equal(in_training, in_eval)
    adapter = load(saved(made, tmp_path / "adapter"))
    assert torch.equal(logits(adapter.model), in_eval)
    adapter.merge()
    assert torch.equal(logits(adapter.model), in_eval)
    again = load(saved(adapter, tmp_path / "merged"))
    assert torch.equal(logits(again.model), in_eval)
    assert any(isinstance(w.stored, Codes) for w in weights(again.model).values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("to", ["int4-g32", "uint3-channel", "W8A8", "nf4-g64", "W4A16"])
@pytest.mark.usefixtures("torch_products")
def test_qat_ships_exactly_what_was_trained(tmp_path, to, dtype):
    made = load(folder(tmp_path / "base", dtype=dtype, words=True))
    made.apply(Grid(scheme=to), Train(**SHORT))
    in_training = training_logits(made.model)
    made.apply(Freeze())
    assert torch.equal(logits(made.model), in_training)
    assert torch.equal(logits(load(saved(made, tmp_path / "out")).model), in_training)


@pytest.mark.parametrize("how", ["mse", "absmax", "percentile-90"])
def test_a_grid_found_another_way_comes_back_that_way(tmp_path, llama, how):
    made = load(llama)
    made.apply(Grid(scheme="int4-g32", how=how), Adapt(r=4), Train(**SHORT))
    again = load(saved(made, tmp_path / "adapter"))
    assert torch.equal(logits(again.model), logits(made.model))


def test_a_gridded_model_is_not_saved_as_floats(tmp_path, llama):
    made = load(llama)
    made.apply(Grid(scheme="int4-g32"))
    with pytest.raises(InputError, match="freeze"):
        saved(made, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- scales


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_are_trained_and_codes_are_not(tmp_path, dtype):
    base = folder(tmp_path / "base", dtype=dtype, words=True)
    before = {
        n: w.stored.q for n, w in weights(load(base).quantize("int4-g32").model).items() if isinstance(w.stored, Codes)
    }
    made = trained(base, "scales", "int4-g32")
    again = load(saved(made, tmp_path / "out"))
    for name, q in before.items():
        ours, theirs = weights(made.model)[name].stored.q, weights(again.model)[name].stored.q
        assert torch.equal(ours.codes, q.codes)
        assert torch.equal(theirs.codes, q.codes)
        assert torch.equal(ours.parts["scale"], theirs.parts["scale"])
        assert ours.parts["scale"].dtype == dtype
        assert not weights(made.model)[name].stored.learned  # what was trained in float32 is rounded for good
        assert not torch.equal(ours.parts["scale"], q.parts["scale"])
    assert made.log.trainable == sum(q.parts["scale"].numel() for q in before.values())


def test_scales_that_are_quantized_cannot_be_trained(llama):
    with pytest.raises(InputError, match="cannot be trained"):
        trained(llama, "scales", "NF4_DQ")


def test_a_quantized_folder_has_its_scales_trained(tmp_path, llama):
    path = saved(load(llama).quantize("int4-g32"), tmp_path / "int4")
    codes = {n: op.weight.frozen().codes for n, op in ops(load(path).model) if op.weight.format is not None}
    made = trained(path, "scales", "int4-g32")
    assert made.notes["trained"] == "scales"
    assert all(torch.equal(op.weight.frozen().codes, codes[n]) for n, op in ops(made.model) if n in codes)
    assert torch.equal(logits(load(saved(made, tmp_path / "out")).model), logits(made.model))


def test_a_quantized_folder_is_trained_whole_as_floats(tmp_path, llama):
    made = trained(saved(load(llama).quantize("int4-g32"), tmp_path / "int4"), "full")
    assert (made.notes["trained"], made.notes["dequantized"]) == ("stored", ["int4-g32"])
    assert torch.equal(logits(models.load(saved(made, tmp_path / "out")).model), logits(made.model))


# ---- GPT-2: weights that are turned on disk


@pytest.fixture
def gpt2(tmp_path):
    return folder(tmp_path / "gpt2", "gpt2", words=True)


def test_gpt2_full(tmp_path, gpt2):
    made = trained(gpt2, "full")
    assert torch.equal(logits(models.load(saved(made, tmp_path / "out")).model), logits(made.model))
    torch.testing.assert_close(logits(foreign(tmp_path / "out")), logits(made.model), rtol=0, atol=1e-5)


def test_gpt2_lora_merged(tmp_path, gpt2):
    made = trained(gpt2, "lora")
    unmerged = logits(made.model)
    made.merge()
    torch.testing.assert_close(logits(made.model), unmerged, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(foreign(saved(made, tmp_path / "out"))), logits(made.model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["qlora", "qat-lora"])
def test_gpt2_in_nf4(tmp_path, gpt2, method):
    made = trained(gpt2, method, "NF4")
    made.merge(to="NF4")
    path = saved(made, tmp_path / "out")
    stored = models.load(path).model
    assert {n.rpartition(".")[2] for n, op in ops(stored) if isinstance(op.weight.stored, Codes)} == {
        "c_attn", "c_proj", "c_fc",
    }  # fmt: skip
    assert torch.equal(logits(stored), logits(made.model))
    torch.testing.assert_close(logits(foreign(path)), logits(made.model), rtol=0, atol=1e-5)


# ---- BERT: a classification head


def test_a_classification_head_on_a_tiny_bert(tmp_path):
    base = folder(tmp_path / "bert", "bert", words=True)
    made = run.load(base, labels=["even", "odd"])
    Train(**{**SHORT, "data": SHAPES["label"], "steps": 30, "learning_rate": 3e-3})(made)
    assert not made.causal
    assert made.log.curve[-1]["loss"] < made.log.curve[0]["loss"]
    path = outputs.save(made, tmp_path / "out")
    again = run.load(path)
    assert torch.equal(logits(again.model), logits(made.model))
    theirs = foreign(path, transformers.AutoModelForSequenceClassification)
    assert torch.equal(logits(theirs), logits(made.model))
    assert theirs.config.id2label == {0: "even", 1: "odd"}


def test_adapters_would_leave_a_new_head_random(tmp_path):
    made = run.load(folder(tmp_path / "bert", "bert", words=True), labels=["even", "odd"])
    Adapt(r=2)(made)
    with pytest.raises(InputError, match="--method full"):
        Train(**{**SHORT, "data": SHAPES["label"]})(made)


# ---- what does not go together


@pytest.mark.parametrize(
    ("method", "to", "says"),
    [
        ("qat", None, "--to SCHEME"),
        ("scales", None, "--to SCHEME"),
        ("lora", "W4A16", "merge --to"),
        ("loar", None, "qat-lora"),
    ],
)
def test_methods_that_make_no_sense_are_refused(llama, method, to, says):
    with pytest.raises(InputError, match=says):
        trained(llama, method, to)


def test_nothing_to_merge(llama):
    with pytest.raises(InputError, match="no adapter to merge"):
        load(llama).merge()


def test_the_miniature_computes_something(llama):
    """Guards the tests above: equal logits of a model that ignores its input would prove nothing."""
    model = load(llama).model
    with torch.no_grad():
        assert not torch.equal(model(IDS).logits, model(IDS.flip(0)).logits)
    assert all(not isinstance(op.weight.stored, Codes) for _, op in ops(model) if isinstance(op, Linear))
