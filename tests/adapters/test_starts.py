"""How A and B begin: what each start promises, that nothing of the base moves, and that PEFT computes the same."""

import json
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from halfbyte import FORMATS, InputError, adapters, calibrate, kernels, models, run
from halfbyte.adapters import attached
from halfbyte.adapters.lora import Lora
from halfbyte.adapters.starts import STARTS, start
from halfbyte.layers import Codes, Grid, Weight, ops, weights
from halfbyte.model import load
from halfbyte.outputs import save
from halfbyte.recipe import parse_recipe
from halfbyte.steps import Adapt
from miniatures import folder, logits, quantized

MOVED = ["pissa", "pissa_niter_4", "olora"]
ZERO = ["gaussian", "orthogonal"]
TEXT = [{"text": "a small text that is learnt by heart, twice over and once again"}] * 4
SHORT = {"data": TEXT, "steps": 3, "batch_size": 2, "max_length": 24, "learning_rate": 1e-2}


def weight(out: int = 48, n: int = 64, dtype: torch.dtype = torch.float32) -> Weight:
    return Weight(nn.Parameter(torch.randn(out, n).to(dtype), requires_grad=False))


def frozen(w: Weight, to: str = "nf4-g64") -> torch.Tensor:
    """Makes codes of a weight, and gives back what it was."""
    before = w.base().detach().clone()
    w.store(kernels.quantize(before, FORMATS[to]))
    return before


def shaken(lora: Lora) -> Lora:
    with torch.no_grad():
        for p in (lora.lora_A, lora.lora_B):
            p += 0.05 * torch.randn_like(p)
    return lora.eval()


# ---- what each start is


def left_of(w: torch.Tensor, r: int) -> torch.Tensor:
    """The norm of what the best approximation of rank r leaves of w."""
    return torch.linalg.svdvals(w.double())[r:].norm()


@given(st.integers(2, 24), st.integers(2, 24), st.integers(0, 1000), st.booleans())
def test_pissa_takes_the_best_approximation_of_w(out, n, seed, use_rslora):
    torch.manual_seed(seed)
    w, r = weight(out, n), min(out, n) // 2
    lora = Lora(w, r=r, lora_alpha=7, use_rslora=use_rslora, init_lora_weights="pissa")
    product = lora.scaling * lora.lora_B.double() @ lora.lora_A.double()
    torch.testing.assert_close((w.base() - product).norm(), left_of(w.base(), r), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lora.lora_A.norm(dim=1), lora.lora_B.norm(dim=0), rtol=1e-3, atol=1e-4)


def test_pissa_niter_comes_near_to_it():
    w = weight()
    w.store(w.base() @ torch.diag(0.8 ** torch.arange(64)))
    lora = Lora(w, r=8, init_lora_weights="pissa_niter_8")
    left = (w.base() - lora.scaling * lora.lora_B @ lora.lora_A).double().norm()
    torch.testing.assert_close(left, left_of(w.base(), 8), rtol=1e-3, atol=0)


def test_olora_takes_the_first_of_q_and_r():
    w = weight()
    lora = Lora(w, r=4, init_lora_weights="olora")
    torch.testing.assert_close(lora.lora_B.T @ lora.lora_B, torch.eye(4), rtol=0, atol=1e-5)
    assert torch.equal(lora.lora_A[:, :4], lora.lora_A[:, :4].triu())
    whole = Lora(w, r=48, init_lora_weights="olora")
    torch.testing.assert_close(whole.lora_B @ whole.lora_A, w.base(), rtol=0, atol=1e-5)


def test_gaussian_has_the_deviation_of_peft():
    lora = Lora(weight(16, 4096), r=8, init_lora_weights="gaussian")
    assert lora.lora_A.std().item() == pytest.approx(1 / 8, rel=0.05)
    assert not lora.lora_B.any()


def test_orthogonal_begins_at_a_product_of_zero():
    lora = Lora(weight(), r=8, init_lora_weights="orthogonal")
    assert lora.lora_A.abs().max() > 0.05 < lora.lora_B.abs().max()
    torch.testing.assert_close(lora.delta(), torch.zeros(48, 64), rtol=0, atol=1e-7)


@pytest.mark.parametrize("to", ["nf4-g64", "int8-channel", "int2-g32"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_loftq_makes_good_the_most_that_its_rank_can(to, use_rslora):
    w = weight()
    before = frozen(w, to)
    lora = Lora(w, r=8, use_rslora=use_rslora, init_lora_weights="loftq", told=before)
    lost = before - w.base()
    left = (lost - lora.delta()).double().norm()
    torch.testing.assert_close(left, left_of(lost, 8), rtol=1e-4, atol=1e-6)
    assert left < 0.9 * lost.norm()


@pytest.mark.parametrize("name", MOVED)
def test_what_moves_is_what_training_beside_the_residual_base_moves(name):
    """Same gradients, and after the same steps the same sum, as with W - s B0 A0 and the whole s B A."""
    w, x, target = weight(), torch.randn(32, 64), torch.randn(32, 48)
    lora = Lora(w, r=4, lora_alpha=6, init_lora_weights=name).double()
    a, b = (nn.Parameter(p.detach().clone()) for p in (lora.lora_A, lora.lora_B))
    base, x, target = w.base().double(), x.double(), target.double()
    residual = base - lora.scaling * (b @ a).detach()
    ours, theirs = (torch.optim.SGD(p, lr=1e-3) for p in (lora.parameters(), [a, b]))
    for _ in range(5):
        for y, o in ((lora(x, x @ base.T), ours), (x @ (residual + lora.scaling * b @ a).T, theirs)):
            o.zero_grad()
            ((y - target) ** 2).mean().backward()
            o.step()
    torch.testing.assert_close((lora.lora_A, lora.lora_B), (a, b), rtol=0, atol=1e-12)
    assert not torch.allclose(lora.lora_B, lora.lora_B0)


@pytest.mark.parametrize("name", MOVED)
def test_a_small_step_is_not_lost_in_16_bit(name):
    """B A x and B0 A0 x, each rounded to bfloat16, would hide it in their difference."""
    w = weight(dtype=torch.bfloat16)
    lora = Lora(w, r=8, init_lora_weights=name)
    with torch.no_grad():
        lora.lora_B += 1e-4 * torch.randn_like(lora.lora_B)
    x = torch.randn(16, 64).bfloat16()
    given_, wanted = lora.factored(x).double() * lora.scaling, x.double() @ lora.delta().double().T
    assert (given_ - wanted).norm() < 0.02 * wanted.norm()


# ---- a model


@pytest.mark.parametrize("name", MOVED)
@pytest.mark.parametrize("to", [None, "nf4-g64", "int8-channel", "grid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use_dora", [False, True])
def test_at_first_the_model_computes_its_base_exactly(tmp_path, name, to, dtype, use_dora):
    base = folder(tmp_path / "m", dtype=dtype)
    made = run.load(base) if to in (None, "grid") else quantized(base, to)
    if to == "grid":
        for w in weights(made.model).values():
            w.grid = Grid(FORMATS["int4-g32"])
    before = logits(made.model)
    stored = {n: w.base().clone() for n, w in weights(made.model).items()}
    Adapt(r=4, init_lora_weights=name, use_dora=use_dora)(made)
    assert torch.equal(logits(made.model), before)
    made.model.train()
    assert torch.equal(logits(made.model), before) or to == "grid"
    assert all(torch.equal(w.base(), stored[n]) for n, w in weights(made.model).items())
    assert all(torch.equal(w.sum(), stored[n]) for n, w in weights(made.model).items())
    assert {p.dtype for a in attached(made.model).values() for p in a.state_dict().values()} == {torch.float32}
    assert all(a.lora_B.any() for a in attached(made.model).values())


def test_loftq_begins_nearer_to_the_floats_than_the_codes_are(tmp_path):
    base = folder(tmp_path / "m")
    floats, codes = logits(run.load(base).model), logits(quantized(base, "nf4-g64").model)
    made = quantized(base, "nf4-g64")
    Adapt(r=8, init_lora_weights="loftq")(made)
    assert (logits(made.model) - floats).norm() < 0.9 * (codes - floats).norm()
    assert all(isinstance(w.stored, Codes) for w in weights(made.model).values() if w.adapters)
    again = run.load(save(made, tmp_path / "adapter"))
    assert torch.equal(logits(again.model), logits(made.model))


def test_loftq_needs_codes_and_the_floats_that_they_were_made_from(tmp_path):
    base = folder(tmp_path / "m", words=True)
    with pytest.raises(InputError, match="is a float: use --method qlora"):
        Adapt(init_lora_weights="loftq")(run.load(base))
    with pytest.raises(InputError, match=r"loftq .* lora has floats"):
        load(base).train(method="lora", init_lora_weights="loftq", **SHORT)
    codes = save(quantized(base, "NF4"), tmp_path / "codes")
    with pytest.raises(InputError, match="is codes already"):
        load(codes).train(method="qlora", init_lora_weights="loftq", **SHORT)


@pytest.mark.parametrize("name", ["gaussian", "orthogonal", *MOVED, "loftq"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_trained_folder_is_a_plain_lora_that_computes_the_same(tmp_path, name, use_rslora):
    base = folder(tmp_path / "base", words=True)
    method = "qlora" if name == "loftq" else "lora"
    settings = {**SHORT, "r": 4, "lora_alpha": 6, "use_rslora": use_rslora, "init_lora_weights": name}
    made = load(base).train(method=method, **settings)
    assert made.log.curve[-1]["loss"] < made.log.curve[0]["loss"]
    path = made.save(tmp_path / "adapter")
    said = json.loads((path / "adapter_config.json").read_text())
    assert said["init_lora_weights"] is True
    assert said["r"] == (8 if name in MOVED else 4)
    torch.testing.assert_close(logits(load(path).model), logits(made.model), rtol=0, atol=1e-5)
    if method == "lora":
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path).eval()
        torch.testing.assert_close(logits(theirs), logits(made.model), rtol=0, atol=1e-5)
    unmerged = logits(made.model)
    torch.testing.assert_close(logits(made.merge().model), unmerged, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_peft_computes_what_moved_and_was_written(tmp_path, name, use_dora):
    base = folder(tmp_path / "base", name)
    made = run.load(base)
    Adapt(r=4, init_lora_weights="pissa", use_dora=use_dora)(made)
    for a in attached(made.model).values():
        shaken(a)
    path = save(made, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path).eval()
    torch.testing.assert_close(logits(theirs), logits(made.model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_the_sum_and_the_folder_are_those_of_pefts_own_conversion(tmp_path, name):
    """Trained from the same numbers by PEFT, which converts them to a LoRA of twice the rank: the same weights."""
    base = folder(tmp_path / "base")
    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=name),
    )
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "begun")
    theirs.peft_config["default"].init_lora_weights = name
    torch.manual_seed(3)
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if "lora_" in n:
                p += 0.05 * torch.randn_like(p)
    expected = logits(theirs.eval())
    theirs.save_pretrained(tmp_path / "plain")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of what it does itself
        theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "begun"))
    for path in ("plain", "converted"):  # the residual base is found anew from the base, as PEFT does it
        made = run.load(tmp_path / path)
        torch.testing.assert_close(logits(made.model), expected, rtol=0, atol=1e-5)
    again = save(run.load(tmp_path / "plain"), tmp_path / "ours")
    back = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), again).eval()
    torch.testing.assert_close(logits(back), expected, rtol=0, atol=1e-5)


def test_a_folder_whose_base_is_a_residual_goes_on_no_codes(tmp_path):
    base = folder(tmp_path / "base")
    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"),
    )
    theirs.save_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match="pissa, takes a part out of the base"):
        Adapt(path=str(tmp_path / "plain"))(quantized(base, "nf4-g64"))


@pytest.mark.parametrize("name", [True, *ZERO, *MOVED])
def test_a_start_is_the_same_each_time(tmp_path, name):
    base = folder(tmp_path / "m")
    states = []
    for _ in range(2):
        made = run.load(base, seed=5)
        torch.rand(7)  # whatever ran before
        Adapt(r=4, init_lora_weights=name)(made)
        states.append({n: t for n, t in made.model.state_dict().items() if ".adapters." in n})
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(t, states[1][n]) for n, t in states[0].items())


# ---- what is refused, and when


@pytest.mark.parametrize("name", ["pisa", "pissa_niter_", "pissa_niter_-1", False, "", 1.5, None, "True"])
def test_a_start_that_there_is_not_is_refused_before_a_model_is_read(name):
    with pytest.raises(InputError, match="pissa"):
        Adapt(init_lora_weights=name)
    with pytest.raises(InputError, match="init-lora-weights"):
        parse_recipe({"model": "nowhere", "steps": [{"adapt": {"init_lora_weights": name}}]})


@pytest.mark.parametrize("settings", [{"r": 5}, {"r": 4, "rank_pattern": {"q_proj": 3}}])
def test_orthogonal_refuses_an_odd_rank(settings):
    with pytest.raises(InputError, match="even"):
        Adapt(init_lora_weights="orthogonal", **settings)


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_2", "olora"])
def test_more_directions_than_there_are_are_refused(name):
    with pytest.raises(InputError, match="--r 49 is more than the 48"):
        Lora(weight(), r=49, init_lora_weights=name)


@pytest.mark.parametrize("name", ["pissa", "olora", "eva"])
def test_they_are_refused_before_there_is_an_adapter_or_a_pass_over_text(tmp_path, name, monkeypatch):
    made = run.load(folder(tmp_path / "base", words=True))
    monkeypatch.setattr(calibrate, "inputs", None)
    with pytest.raises(InputError, match="--r 65 is more than the 64 directions of a layer of 64 inputs"):
        Adapt(init_lora_weights=name, calibration=TEXT, rank_pattern={"layers.1.self_attn.o_proj": 65})(made)
    assert not attached(made.model)


@pytest.mark.parametrize("name", [[], {}, 1, 0, False, None, "no such"])
def test_what_is_no_start_is_refused(name):
    with pytest.raises(InputError, match=r"--init-lora-weights .*: it is true"):
        start(name)
    with pytest.raises(InputError, match=r"--init-lora-weights .*: it is true"):
        Adapt(init_lora_weights=name)


def test_every_row_says_what_it_is():
    assert all(row.make.__doc__ for row in STARTS.values())
    assert start("pissa_niter_7").moves


# ---- EVA


def test_eva_begins_at_the_directions_in_which_the_inputs_vary_most():
    x = torch.randn(200, 64) @ torch.diag(0.9 ** torch.arange(64)) @ torch.linalg.qr(torch.randn(64, 64))[0]
    lora = Lora(weight(), r=4, init_lora_weights="eva", told=x.T @ x / len(x))
    _, _, vh = torch.linalg.svd(x.double(), full_matrices=False)
    torch.testing.assert_close((lora.lora_A.double() @ vh[:4].T).abs(), torch.eye(4).double(), rtol=0, atol=1e-4)
    assert not lora.lora_B.any()


@pytest.mark.parametrize("name", ["llama-untied", "gpt2", "mixtral"])
def test_eva_sees_what_each_layer_is_fed(tmp_path, name):
    """Of every layer, inside a block or not, A spans the same as the singular vectors of all its inputs."""
    made = run.load(folder(tmp_path / "base", name, words=True), seed=1)
    targets = {"llama-untied": ["q_proj", "down_proj", "lm_head"], "gpt2": ["c_proj"], "mixtral": ["down_proj"]}[name]
    step = Adapt(init_lora_weights="eva", r=4, target_modules=targets, calibration=TEXT, samples=2, max_length=24)
    fed, found = {}, dict(ops(made.model))
    batches = step._batches(made, step._rows(made))
    before = logits(made.model)
    for op_name in adapters.targets(made.model, models.roles(made.model), targets):
        found[op_name].register_forward_pre_hook(lambda m, args, n=op_name: fed.setdefault(n, []).append(args[0]))
    for batch in batches:
        made.model(**batch.inputs)
    seen = {n: torch.cat([x.flatten(0, -2) for x in xs]).double() for n, xs in fed.items()}
    step(made)
    assert torch.equal(logits(made.model), before)
    assert attached(made.model).keys() == seen.keys()
    for op_name, lora in attached(made.model).items():
        a = lora.lora_A.double()
        torch.testing.assert_close(a @ a.T, torch.eye(4).double(), rtol=0, atol=1e-5)
        kept, most = (seen[op_name] @ a.T).square().sum(), torch.linalg.svdvals(seen[op_name])[:4].square().sum()
        torch.testing.assert_close(kept, most, rtol=1e-4, atol=0)


def test_eva_without_text_is_refused(tmp_path):
    for text in ({}, {"calibration": "none"}):
        with pytest.raises(InputError, match="eva is found on text"):
            Adapt(init_lora_weights="eva", **text)
    with pytest.raises(InputError, match="eva is found on text"):
        Lora(weight(), init_lora_weights="eva")


def test_eva_is_found_on_what_is_trained_on(tmp_path):
    base = folder(tmp_path / "base", words=True)
    made = load(base).train(method="qlora", init_lora_weights="eva", r=4, **SHORT)
    assert made.log.curve[-1]["loss"] < made.log.curve[0]["loss"]
    path = made.save(tmp_path / "adapter")
    assert torch.equal(logits(load(path).model), logits(made.model))
