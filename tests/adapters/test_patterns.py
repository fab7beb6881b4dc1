"""rank_pattern and alpha_pattern: by PEFT's rule, written so that PEFT reads them, and read from what PEFT wrote."""

import json
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from transformers import AutoModelForCausalLM

from halfbyte import InputError, adapters, kinds, run
from halfbyte.adapters import attached
from halfbyte.containers import gguf
from halfbyte.kinds import gguf_lora
from halfbyte.layers import Linear, ops
from halfbyte.outputs import save
from halfbyte.recipe import parse_recipe
from halfbyte.steps import Adapt
from miniatures import folder, logits

PATTERNS = [
    {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6}},
    {"rank_pattern": {r"layers\.0\..*": 2}, "alpha_pattern": {"o_proj": 3.5, "model.layers.1.self_attn.v_proj": 1}},
    {"alpha_pattern": {"^model.layers.0.self_attn.k_proj": 64}, "use_rslora": True},
    {"rank_pattern": {"q_proj": 2, "layers.0.self_attn.q_proj": 8}},  # of which the first counts
]


def adapted(base, **settings):
    made = run.load(base)
    Adapt(r=4, lora_alpha=8, **settings)(made)
    with torch.no_grad():
        for a in attached(made.model).values():
            a.lora_B += 0.05 * torch.randn_like(a.lora_B)
    made.model.eval()
    return made


KEYS = ["q_proj", "proj", "self_attn.q_proj", "layers.1.self_attn.q_proj", r"layers\.0\..*", ".*", "a.0.b", "^q_proj"]


@given(st.lists(st.sampled_from(KEYS), unique=True), st.sampled_from(["model.layers.0.self_attn.q_proj", "q_proj",
       "model.layers.1.self_attn.q_proj", "model.layers.11.self_attn.q_proj", "a.0.b", "a.0xb"]))  # fmt: skip
def test_the_rule_is_pefts(keys, name):
    pattern = {k: i for i, k in enumerate(keys)}
    settings = adapters.own({"r": -1, "lora_alpha": -1, "rank_pattern": pattern, "alpha_pattern": {}}, name)
    assert settings == {"r": pattern.get(get_pattern_key(pattern.keys(), name), -1), "lora_alpha": -1}


@pytest.mark.parametrize("settings", PATTERNS)
@pytest.mark.parametrize("start", [True, "pissa"])
def test_peft_computes_what_we_wrote(tmp_path, settings, start):
    base = folder(tmp_path / "base")
    made = adapted(base, init_lora_weights=start, **settings)
    out = save(made, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out).eval()
    torch.testing.assert_close(logits(theirs), logits(made.model), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(run.load(out).model), logits(made.model), rtol=0, atol=1e-5)
    scales = {n: a.scaling for n, a in attached(made.model).items()}
    assert {n: a.scaling for n, a in attached(run.load(out).model).items()} == pytest.approx(scales)
    again = save(run.load(out), tmp_path / "again")
    assert (again / "adapter_config.json").read_text() == (out / "adapter_config.json").read_text()


@pytest.mark.parametrize("settings", PATTERNS[:3])  # PEFT sorts keys when it writes, and cannot read the last itself
def test_we_compute_what_peft_wrote(tmp_path, settings):
    base = folder(tmp_path / "base")
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, **settings)
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "adapter")
    made = run.load(tmp_path / "adapter")
    torch.testing.assert_close(logits(made.model), logits(theirs), rtol=0, atol=1e-5)
    ranks = {n: m.r["default"] for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert {n: a.r for n, a in attached(made.model).items()} == ranks


def test_what_is_written_is_short(tmp_path):
    """The ending where all layers of that ending are alike, the whole name where they are not."""
    made = adapted(folder(tmp_path / "base"), rank_pattern={"q_proj": 2, "layers.1.mlp.down_proj": 6})
    said = json.loads((save(made, tmp_path / "adapter") / "adapter_config.json").read_text())
    assert said["rank_pattern"] == {"q_proj": 2, "model.layers.1.mlp.down_proj": 6}
    assert said["alpha_pattern"] == {}
    assert (said["r"], said["lora_alpha"]) == (4, 8)


def test_a_key_that_meets_no_layer_is_refused(tmp_path):
    with pytest.raises(InputError, match="'qproj' meets no layer"):
        adapted(folder(tmp_path / "base"), rank_pattern={"q_proj": 2, "qproj": 4})


def test_in_a_recipe(tmp_path):
    base = folder(tmp_path / "base")
    adapt = {"r": 4, "rank_pattern": {"v_proj": 1}, "init_lora_weights": "gaussian"}
    made = parse_recipe({"model": str(base), "output": str(tmp_path / "out"), "steps": [{"adapt": adapt}]}).run()
    assert {a.r for n, a in attached(made.model).items() if n.endswith("v_proj")} == {1}
    assert run.load(tmp_path / "out").notes["adapter"]["rank_pattern"] == {"v_proj": 1}


@pytest.mark.parametrize("pattern", [{"q_proj": 0}, {"q_proj": "2"}, ["q_proj"], {"(": 2}])
def test_patterns_that_make_no_sense_are_refused_before_a_model_is_read(pattern):
    with pytest.raises(InputError, match="rank_pattern"):
        Adapt(rank_pattern=pattern)


@pytest.mark.parametrize("settings", [*PATTERNS, {"init_lora_weights": "olora"}])
def test_in_ggufs_file_every_layer_is_times_what_it_was(tmp_path, settings):
    """Readers compute alpha / r B A, with the file's alpha and each layer's r."""
    made = adapted(folder(tmp_path / "base"), **settings)
    job = kinds.Job(made.loaded)
    assert gguf_lora.refuses(job) is None
    gguf_lora.write(job, tmp_path / "lora.gguf")
    file = gguf.File(tmp_path / "lora.gguf")
    by_name = {n: op for n, op in ops(made.model) if isinstance(op, Linear)}
    for name, a in attached(made.model).items():
        if not name.endswith(("q_proj", "k_proj")):  # whose rows stand otherwise in a file
            tensor = gguf_lora.gguf.architecture_of(made.loaded.config).tensor(f"{name}.weight", made.loaded.config)
            down, up = (file.get(f"{tensor}.lora_{k}", torch.float32) for k in "ab")
            read = file.metadata["adapter.lora.alpha"] / len(down) * up @ down
            torch.testing.assert_close(read, a.delta(), rtol=1e-4, atol=1e-6)
            assert by_name[name].weight.shape == read.shape
