"""Quantization-aware methods: what is learned beside what, from where, and how fast."""

import pytest
import torch

from halfbyte import InputError, resume
from halfbyte.layers import Codes, Weight, weights
from halfbyte.methods import merge_steps, method_steps
from halfbyte.model import load
from halfbyte.steps import Adapt, Freeze, Grid, Merge, Teacher, Transform
from miniatures import folder, logits

TEXT = [{"text": "a small text that is learnt by heart, twice over and once again"}] * 4
SHORT = {"data": TEXT, "steps": 3, "batch_size": 2, "max_length": 24, "learning_rate": 1e-2}


@pytest.fixture
def llama(tmp_path):
    return folder(tmp_path / "llama", words=True)


def train(base, method, to, **changes):
    return load(base).train(method=method, to=to, **{**SHORT, **changes})


# ---- the gradient of low-rank factors, without that of the whole matrix


def gradients(model):
    model.zero_grad()
    model.train()
    out = model(input_ids=torch.arange(3, 23).reshape(2, 10))
    (out.logits.float() ** 2).mean().backward()
    return out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if ".adapters." in n}


@pytest.mark.parametrize("to", ["uint4-g32", "int8-channel", "nf4-g64", "W8A8", "FP8A16"])
def test_factors_get_the_gradient_that_the_whole_matrix_would_give_them(llama, to, monkeypatch):
    made = load(llama).apply(Grid(scheme=to), Adapt(r=4))
    for w in weights(made.model).values():
        for a in w.adapters.values():
            torch.nn.init.normal_(a.lora_B, std=0.02)
            a.requires_grad_(True)
    assert any(w.factored for w in weights(made.model).values())
    seen, direct = gradients(made.model)

    def straight(self):
        """grid(W0 + s B A), whose gradient is as if the grid were not there, through the whole matrix."""
        whole = self.sum()
        return whole if self.grid is None else whole + (self.grid(whole) - whole).detach()

    monkeypatch.setattr(Weight, "factored", False)
    monkeypatch.setattr(Weight, "value", straight)
    same, through = gradients(made.model)
    torch.testing.assert_close(same, seen, rtol=0, atol=1e-5)
    for name, g in through.items():
        torch.testing.assert_close(direct[name], g, rtol=0, atol=1e-4 * g.abs().max().item())


def test_where_a_grid_clips_on_purpose_the_whole_gradient_is_asked_for(llama):
    made = load(llama).apply(Grid(scheme="int4-g32", how="percentile-90"), Adapt(r=4))
    assert not any(w.factored for w in weights(made.model).values())


def test_dropout_behind_a_grid_is_refused(llama):
    with pytest.raises(InputError, match="lora-dropout"):
        train(llama, "qat-lora", "int4-g32", lora_dropout=0.1)


# ---- where it begins


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("to", ["int3-g32", "W4A8", "NF4"])
def test_qat_lora_goes_on_from_a_solvers_codes(tmp_path, to, dtype):
    base = folder(tmp_path / "base", dtype=dtype, words=True)
    begun = load(base).quantize(to, solver="gptq", calibration=TEXT, max_length=24)
    *before, training, merge, freeze = method_steps("qat-lora", to, {**SHORT, "r": 4}, init="gptq")
    made = load(base).apply(*before, merge, freeze)
    assert torch.equal(logits(made.model), logits(begun.model))
    made = load(base).apply(*before, training)
    learned = [w.grid for w in weights(made.model).values() if w.grid is not None]
    assert learned
    assert all(g.scale is not None for g in learned)
    assert made.log.trainable > sum(g.scale.numel() for g in learned)
    trained = logits(made.model)
    made.apply(merge, freeze)
    assert torch.equal(logits(made.model), trained)
    assert not torch.equal(trained, logits(begun.model))
    assert torch.equal(logits(load(made.save(tmp_path / "out")).model), trained)


@pytest.mark.parametrize(("method", "to"), [("qat", "NVFP4A16"), ("qat-lora", "NF4_DQ")])
def test_scales_that_are_codes_stay_as_the_solver_found_them(tmp_path, method, to):
    base = folder(tmp_path / "base", dtype=torch.bfloat16, words=True)
    begun = load(base).quantize(to, solver="gptq", calibration=TEXT, max_length=24)
    made = train(base, method, to, init="gptq", learning_rate=3e-2)
    pairs = [
        (a.stored.q.tensors(), b.stored.q.tensors())
        for a, b in zip(weights(begun.model).values(), weights(made.model).values(), strict=True)
        if isinstance(a.stored, Codes) and isinstance(b.stored, Codes)
    ]
    assert pairs
    for a, b in pairs:
        assert all(torch.equal(a[n], b[n]) for n in a if n != "codes")
    assert any(not torch.equal(a["codes"], b["codes"]) for a, b in pairs)
    assert torch.equal(logits(load(made.save(tmp_path / "out")).model), logits(made.model))


def test_where_no_scale_can_be_trained_the_solver_does_not_begin(llama, monkeypatch):
    monkeypatch.setattr("halfbyte.run.freeze", lambda *a, **k: pytest.fail("the work had begun"))
    with pytest.raises(InputError, match="quantized themselves"):
        train(llama, "scales", "NF4_DQ", init="gptq")


@pytest.mark.parametrize("transforms", [["smooth"], ["hadamard", "smooth"]])
@pytest.mark.parametrize(("method", "init"), [("qat", None), ("qat", "rtn"), ("qat-lora", "gptq"), ("scales", None)])
def test_training_goes_on_from_a_model_made_ready_for_its_codes(tmp_path, llama, method, init, transforms):
    text = {"calibration": TEXT, "max_length": 24}
    ready = load(llama).apply(*(Transform(name=n, scheme="W8A8", untie=True, **text) for n in transforms))
    ready.apply(Freeze(scheme="W8A8", solver=init or "rtn", **(text if init == "gptq" else {})))
    plain = load(llama).quantize("W8A8")
    to = {"init": init, "transforms": transforms, "untie": "hadamard" in transforms}
    *before, training = [
        s
        for s in method_steps(method, "W8A8", {**SHORT, "loss": "kl"}, **to)
        if not isinstance(s, Merge) and not (isinstance(s, Freeze) and s.scheme is None)
    ]
    made = load(llama).apply(*before)
    assert torch.equal(logits(made.model), logits(ready.model))
    assert not torch.equal(logits(made.model), logits(plain.model))
    assert torch.equal(logits(made.teacher), logits(load(llama).model))
    made.apply(training, *merge_steps(made) if method == "qat-lora" else [Freeze()] if method == "qat" else [])
    trained = logits(made.model)
    assert not torch.equal(trained, logits(ready.model))
    read = load(made.save(tmp_path / "out"))
    assert torch.equal(logits(read.model), trained)
    assert [note["name"] for note in made.notes["transforms"]] == transforms


@pytest.mark.parametrize("held", ["int8-g32", "NF4"])
def test_qat_lora_holds_its_base_as_codes(tmp_path, llama, held):
    path = load(llama).quantize(held).save(tmp_path / "held")
    made = train(path, "qat-lora", "int4-g32", r=4)
    coded = {n: w for n, w in weights(made.model).items() if isinstance(w.stored, Codes)}
    assert coded
    assert all(w.grid.format.name == "int4-g32" for w in coded.values())
    trained = logits(made.model)
    again = load(made.save(tmp_path / "adapter"))
    assert torch.equal(logits(again.model), trained)
    again.merge()
    assert torch.equal(logits(again.model), trained)
    read = load(again.save(tmp_path / "merged"))
    assert torch.equal(logits(read.model), trained)
    assert {w.stored.q.format.name for w in weights(read.model).values() if isinstance(w.stored, Codes)} == {"int4-g32"}


def test_codes_as_a_base_are_a_teacher_too(tmp_path, llama):
    path = load(llama).quantize("int8-g32").save(tmp_path / "held")
    made = train(path, "qat-lora", "int3-g32", r=8, loss="kl", steps=30, learning_rate=3e-3)
    plain = load(path)
    plain.quantize("int3-g32")
    assert made.evaluate(TEXT, against=str(path)).kl_mean < 0.8 * plain.evaluate(TEXT, against=str(path)).kl_mean


# ---- how fast


def scales(model):
    return {n: w.grid.scale.detach().clone() for n, w in weights(model).items() if w.grid is not None}


def test_scales_have_a_rate_of_their_own(llama):
    *before, training, _ = method_steps("qat", "int4-g32", {**SHORT, "steps": 1, "warmup_ratio": 0}, init="rtn")
    moved = {}
    for ratio in (1.0, 0.1):
        made = load(llama).apply(*before)
        begun = scales(made.model)
        made.apply(training.model_copy(update={"scale_lr_ratio": ratio}))
        moved[ratio] = max((s - begun[n]).abs().max().item() for n, s in scales(made.model).items())
    assert moved[0.1] == pytest.approx(0.1 * moved[1.0], rel=0.05)


def test_norms_learn_beside_scales_where_that_is_asked_for(tmp_path, llama):
    norms = lambda model: {n: p.clone() for n, p in model.named_parameters() if "norm" in n}  # noqa: E731
    before = norms(load(llama).model)
    for asked in (False, True):
        made = train(llama, "scales", "int4-g32", norms=asked)
        after = norms(made.model)
        assert before
        assert all(torch.equal(p, after[n]) != asked for n, p in before.items())
    read = load(made.save(tmp_path / "out"))
    assert torch.equal(logits(read.model), logits(made.model))
    for method in ("qat", "qat-lora"):
        with pytest.raises(InputError, match="--method scales"):
            train(llama, method, "int4-g32", norms=True)


# ---- a warm-up without fake quantization


@pytest.mark.parametrize("to", ["int2-g32", "W8A8"])
def test_the_first_steps_see_no_grid(llama, to):
    """Three steps of which none sees the grid are three steps of full fine-tuning."""
    asleep = train(llama, "qat", to, steps=4, lr_scheduler_type="constant", fake_quant_after_n_steps=3)
    full = train(llama, "full", None, steps=4, lr_scheduler_type="constant")
    awake = train(llama, "qat", to, steps=4, lr_scheduler_type="constant")
    losses = [[row["loss"] for row in m.log.curve] for m in (asleep, full, awake)]
    assert losses[0][:3] == losses[1][:3]
    assert losses[0][3] != losses[1][3]
    assert losses[0][0] != losses[2][0]
    assert not any(w.grid is not None and w.grid.asleep for w in weights(asleep.model).values())


@pytest.mark.parametrize("method", ["full", "scales", "lora"])
def test_a_warm_up_without_a_grid_is_refused(llama, method):
    with pytest.raises(InputError, match="fake-quant-after-n-steps"):
        train(llama, method, "int4-g32" if method == "scales" else None, fake_quant_after_n_steps=1)


def test_a_warm_up_as_long_as_the_training_is_refused(llama):
    with pytest.raises(InputError, match="none of 3 steps"):
        train(llama, "qat", "int4-g32", fake_quant_after_n_steps=3)


# ---- a teacher that is run once


@pytest.mark.parametrize("method", ["qat", "qat-lora", "scales"])
def test_a_cached_teacher_teaches_the_same(llama, method):
    made = [train(llama, method, "int3-g32", loss="kl", steps=5, cache_teacher=c) for c in (False, True)]
    asked, cached = ([row["loss"] for row in m.log.curve] for m in made)
    assert cached == pytest.approx(asked, rel=1e-3)
    assert made[1].teacher is None


def test_of_a_teacher_its_likeliest_tokens_teach_the_same_where_these_are_all(llama):
    # scales alone, since a last digit that moves a code moves the loss by far more
    likeliest = [train(llama, "scales", "int3-g32", loss="kl", steps=5, **c) for c in (
        {}, {"cache_teacher": True, "teacher_top_k": 10_000}, {"cache_teacher": True, "teacher_top_k": 2}
    )]  # fmt: skip
    asked, all_of_them, two = ([row["loss"] for row in m.log.curve] for m in likeliest)
    assert all_of_them == pytest.approx(asked, rel=1e-4)
    assert two[0] < 0.9 * asked[0]
    assert likeliest[1].teacher is None


def test_a_cache_without_a_teacher_is_refused(llama):
    with pytest.raises(InputError, match="--loss kl"):
        train(llama, "qat", "int3-g32", cache_teacher=True)


def test_rows_are_remembered_whatever_they_are_beside(llama):
    """Packed and single rows in one batch, in another company in each pass."""
    long = [{"prompt": f"{i} " + "a long one " * 6, "completion": "that fills its row"} for i in range(6)]
    short = [{"prompt": f"{i} ", "completion": "short"} for i in range(5)]
    losses = []
    for cache in (False, True):
        made = train(
            llama, "qat", "int4-g32", data=long + short, max_length=96, steps=20, loss="kl", cache_teacher=cache
        )
        losses.append([row["loss"] for row in made.log.curve])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


# ---- a teacher stays what it was


def taught(base, method, to, train_settings, adapt=None):
    """What the teacher says before and after the training."""
    steps = method_steps(method, to, {**SHORT, "loss": "kl", **train_settings}, adapt)
    made = load(base)
    at = next(i for i, s in enumerate(steps) if isinstance(s, Teacher))
    made.apply(*steps[: at + 1])
    before = logits(made.teacher)
    made.apply(*steps[at + 1 :])
    return before, logits(made.teacher), logits(load(base).model)


@pytest.mark.parametrize(
    ("method", "settings", "adapt"),
    [
        ("scales", {"norms": True}, None),
        ("scales", {}, None),
        ("qat", {}, None),
        ("qat-lora", {}, None),
        ("qat-lora", {}, {"modules_to_save": ["norm", "lm_head"]}),
    ],
)
def test_a_teacher_is_not_trained(tmp_path, method, settings, adapt):
    base = folder(tmp_path / "base", "llama-untied", words=True)
    before, after, floats = taught(base, method, "int4-g32", settings, adapt)
    assert torch.equal(before, after)
    assert torch.equal(before, floats)


def test_an_adapter_that_is_trained_on_is_its_own_teachers(tmp_path, llama):
    path = train(llama, "lora", None, r=4).save(tmp_path / "lora")
    before, after, _ = taught(path, "qat-lora", "int4-g32", {})
    assert torch.equal(before, after)
    gridded = train(llama, "qat-lora", "int4-g32", r=4).save(tmp_path / "qat-lora")
    with pytest.raises(InputError, match="seen through a grid already"):
        taught(gridded, "qat-lora", "int4-g32", {})


def test_a_grid_over_codes_is_merged_exactly_whatever_adapts_them(tmp_path, llama):
    path = load(llama).quantize("uint4-g32-affine").save(tmp_path / "codes")
    made = train(path, "qat-lora", "int4-g32", r=4, use_qalora=True)
    trained = logits(made.model)
    made.merge()
    assert torch.equal(logits(made.model), trained)


# ---- what does not go together is refused before a model is read


@pytest.mark.parametrize(
    ("method", "to", "settings", "init", "says"),
    [
        ("qat-lora", "W4A16", {"lora_dropout": 0.1}, "gptq", "lora-dropout"),
        ("qat", "W4A16", {"norms": True}, None, "--method scales"),
        ("qat", "W4A16", {"steps": 3, "fake_quant_after_n_steps": 3}, None, "none of 3 steps"),
        ("full", None, {"fake_quant_after_n_steps": 1}, None, "nothing is seen through a grid"),
        ("qat", "W4A16", {"cache_teacher": True}, None, "--loss kl"),
        ("qat", "W4A16", {"loss": "kl", "teacher_top_k": 64}, None, "--cache-teacher"),
        ("full", None, {"r": 8}, None, "does not take r"),
        ("lora", None, {"init_lora_weights": "eva", "eval_split": 0.1}, None, "--eval-data FILE"),
        ("qat", "W4A16", {"eval_split": 0.1}, "gptq", "--eval-data FILE"),
        ("qa-lora", "Q4_K_M", {}, None, "--method qa-lora --to Q4_K_M"),
    ],
)
def test_what_does_not_go_together(method, to, settings, init, says):
    with pytest.raises(InputError, match=says):
        method_steps(method, to, {"data": "nowhere.jsonl", **settings}, init=init)


@pytest.mark.parametrize(
    ("method", "to", "settings", "given", "says"),
    [
        ("qat-lora", "W8A8", {}, {"transforms": ["smooth"]}, "add --init SOLVER"),
        ("lora", None, {}, {"transforms": ["hadamard"]}, "for --method qat"),
        ("qat", "W8A8", {}, {"transforms": ["rotate"]}, "no such transform"),
        ("qat", "W8A8", {}, {"untie": True}, "--untie"),
        ("qat", "W8A8", {"eval_split": 0.1}, {"transforms": ["smooth"]}, "--transform smooth --eval-split"),
    ],
)
def test_transforms_that_do_not_go_with_a_method(method, to, settings, given, says):
    with pytest.raises(InputError, match=says):
        method_steps(method, to, {"data": "nowhere.jsonl", **settings}, **given)


@pytest.mark.parametrize(
    ("method", "to", "settings", "says"),
    [
        ("full", None, {"scale_lr_ratio": 4.0}, "no scale is learned"),
        ("qat", "int4-g32", {"scale_lr_ratio": 4.0}, "no scale is learned"),
        ("qat", "int4-g32", {"loraplus_lr_ratio": 4.0}, "no LoRA is trained"),
    ],
)
def test_a_rate_of_what_is_not_trained_is_refused(llama, method, to, settings, says):
    with pytest.raises(InputError, match=says):
        train(llama, method, to, **settings)


def test_what_a_killed_run_left_beside_its_checkpoint_is_removed(tmp_path):
    left = tmp_path / resume.SCRATCH
    left.mkdir()
    (left / "states").write_bytes(b"old")
    with resume.scratch(tmp_path / "checkpoint") as where:
        assert list(where.iterdir()) == []
        (where / "states").write_bytes(b"new")
    assert list(tmp_path.iterdir()) == []


# ---- products in bfloat16


@pytest.mark.parametrize("method", ["full", "qat", "qat-lora", "scales"])
def test_products_in_bfloat16_train_a_model_that_stays_float32(tmp_path, llama, method):
    to = None if method == "full" else "int4-g32"
    losses = []
    for bf16 in (False, True):
        made = train(llama, method, to, steps=5, learning_rate=1e-3, bf16=bf16)
        losses.append([row["loss"] for row in made.log.curve])
        assert {p.dtype for p in made.model.parameters()} == {torch.float32}
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
