"""Adapters of experts: PEFT, to which these are fused parameters, computes what we wrote, and we what it wrote."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from halfbyte import InputError, run
from halfbyte.adapters import attached, join
from halfbyte.outputs import save
from halfbyte.steps import Adapt, Merge
from miniatures import EXPERTS, folder, logits, theirs

ALL, DOWN, UP = (
    r".*experts\..*_proj|.*q_proj",
    r".*experts\..*down_proj",
    r".*layers\.1\.mlp\.experts\..*(gate|up)_proj",
)
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def adapted(base, **settings):
    made = run.load(base)
    Adapt(**{"r": 4, "lora_alpha": 6, **settings})(made)
    with torch.no_grad():
        for a in attached(made.model).values():
            a.lora_B += 0.05 * torch.randn_like(a.lora_B)
    made.model.eval()
    return made


@pytest.mark.parametrize("targets", [ALL, DOWN, UP])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"r": 3, "use_rslora": True},
        {"rank_pattern": {"down_proj": 2, r"layers\.1\.mlp\.experts.*": 6}, "alpha_pattern": {r".*\.up_proj": 6}},
        {"init_lora_weights": "pissa"},
    ],
)
@pytest.mark.parametrize("name", EXPERTS)
def test_peft_computes_what_we_wrote_and_so_do_we(tmp_path, name, settings, targets):
    if "rank_pattern" in settings and targets != ALL:
        settings = {"rank_pattern": {r"layers\.1\.mlp\.experts.*": 6}}
    base = folder(tmp_path / "base", name)
    made = adapted(base, target_modules=targets, **settings)
    out = save(made, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that it does this for parameters
        peft = PeftModel.from_pretrained(theirs(base, name), out).eval()
    torch.testing.assert_close(logits(peft), logits(made.model), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(made.model), logits(run.load(base).model), atol=1e-3)
    again = run.load(out)
    torch.testing.assert_close(logits(again.model), logits(made.model), rtol=0, atol=1e-5)
    ours = {n: a.state() for n, a in attached(made.model).items()}
    for op, a in attached(again.model).items():
        assert all(torch.equal(t, ours[op][k]) for k, t in a.state().items())
    assert attached(again.model).keys() == ours.keys()
    assert "peft" not in made.notes
    files = [(p / "adapter_model.safetensors").read_bytes() for p in (out, save(again, tmp_path / "again"))]
    assert files[0] == files[1]


@pytest.mark.parametrize("parameters", [FUSED, FUSED[:1], FUSED[1:]])
@pytest.mark.parametrize("name", EXPERTS)
def test_we_compute_what_peft_wrote(tmp_path, name, parameters):
    base = folder(tmp_path / "base", name)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], target_parameters=parameters,
                        init_lora_weights=False)  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(theirs(base, name), config).eval()
        peft.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(run.load(tmp_path / "adapter").model), logits(peft), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": r".*experts\.[01]\.down_proj"},
        {"target_modules": r".*experts\..*up_proj"},
        {"target_modules": DOWN, "use_dora": True},
        {"target_modules": DOWN, "lora_dropout": 0.5},
        {"target_modules": DOWN, "rank_pattern": {r".*experts\.0\..*": 2}},
    ],
)
def test_what_peft_has_no_parameter_for_stays_apart(tmp_path, settings):
    made = adapted(folder(tmp_path / "base", "mixtral"), **settings)
    found = attached(made.model)
    assert join(made.model, found) == (found, [])
    again = run.load(save(made, tmp_path / "adapter"))
    torch.testing.assert_close(logits(again.model), logits(made.model))
    assert again.notes["peft"].startswith("PEFT may not load this folder")
    Merge()(again)
    save(again, tmp_path / "merged")
    assert "peft" not in again.notes


Q = "base_model.model.model.layers.0.mlp.experts"


@pytest.mark.parametrize(
    ("changes", "tensors", "says"),
    [
        ({}, {f"{Q}.lora_A.weight": torch.ones(15, 128)}, "experts of the rank 4"),
        ({}, {f"{Q}.lora_A.weight": torch.ones(128)}, "experts of the rank 4"),
        ({}, {f"{Q}.lora_B.weight": torch.ones(16, 64)}, "experts of the rank 4"),
        ({}, {f"{Q}.lora_A.weight": torch.ones(16, 64)}, "down_proj.lora_A.weight has the shape"),
        ({"r": 10**12, "rank_pattern": {}}, {}, "experts of the rank 1000000000000"),
        ({"r": 0, "rank_pattern": {}}, {f"{Q}.lora_{k}.weight": torch.ones(0, 0) for k in "AB"}, "of the rank 0"),
        ({"target_parameters": None}, {}, "no linear layer"),
        (
            {},
            {f"{Q}.base_layer.lora_A.weight": None, f"{Q}.base_layer.lora_B.weight": None},
            "gate_up_proj has no lora",
        ),
        ({"target_parameters": ["experts.down_proj"]}, {}, "no linear layer"),
        ({"target_parameters": "experts.down_proj"}, {}, "target_parameters should be a list"),
        ({"target_parameters": ["gate_up_proj", "down_proj", "gate.weight"]}, {}, ""),
    ],
)
def test_broken_folders_are_refused(tmp_path, changes, tensors, says):
    out = save(adapted(folder(tmp_path / "base", "mixtral"), target_modules=ALL), tmp_path / "adapter")
    config, file = out / "adapter_config.json", out / "adapter_model.safetensors"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    save_file({n: t for n, t in {**load_file(file), **tensors}.items() if t is not None}, file)
    if not says:
        run.load(out)
        return
    with pytest.raises(InputError, match=says):
        run.load(out)
