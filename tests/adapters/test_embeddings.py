"""LoRA on embeddings: rows are looked up in it, and PEFT, which holds it turned, computes the same."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from halfbyte import FORMATS, InputError, kinds, run
from halfbyte.adapters import attached
from halfbyte.kinds import gguf_lora
from halfbyte.layers import Grid
from halfbyte.model import load
from halfbyte.steps import Adapt
from miniatures import folder, logits

TEXT = [{"text": "a small text that is learnt by heart, twice over and once again"}] * 4
SHORT = {"data": TEXT, "steps": 3, "batch_size": 2, "max_length": 24, "learning_rate": 1e-2, "r": 4}
NAMES = [("llama-untied", ["embed_tokens", "q_proj"]), ("opt", ["embed_tokens", "q_proj"])]


def untied(path, name, **own):
    return folder(path, name, **({"tie_word_embeddings": False} if name == "opt" else {}), **own)


@pytest.mark.parametrize("start", [True, "pissa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "targets"), NAMES)
def test_trained_and_written_peft_and_we_compute_the_same(tmp_path, name, targets, dtype, start):
    base = untied(tmp_path / "base", name, words=True, dtype=dtype)
    made = run.load(base)
    before = logits(made.model)
    Adapt(target_modules=targets, r=4, init_lora_weights=start)(made)
    assert torch.equal(logits(made.model), before)
    made = load(base).train(target_modules=targets, init_lora_weights=start, **SHORT)
    assert all(a.lora_B.any() for a in attached(made.model).values())
    path = made.save(tmp_path / "adapter")
    held = load_file(path / "adapter_model.safetensors")
    embedding = {k: tuple(t.shape) for k, t in held.items() if "lora_embedding" in k}
    assert sorted(embedding.values()) == [(4, 128), (64, 4)]
    atol = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(
        logits(load(path).model), logits(made.model), rtol=0, atol=1e-5 if start is True else atol
    )
    if dtype == torch.float32:
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path).eval()
        torch.testing.assert_close(logits(theirs), logits(made.model), rtol=0, atol=atol)
    unmerged = logits(made.model)
    torch.testing.assert_close(logits(made.merge().model), unmerged, rtol=0, atol=atol)


@pytest.mark.parametrize(("name", "targets"), NAMES)
def test_we_compute_what_peft_wrote(tmp_path, name, targets):
    base = untied(tmp_path / "base", name)
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it adds the embedding's own weight, and says so
        theirs.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(run.load(tmp_path / "adapter").model), logits(theirs), rtol=0, atol=1e-5)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    held = load_file(file)
    (own,) = [k for k in held if k.endswith("base_layer.weight")]
    turned = next(k for k in held if k.endswith("lora_embedding_A"))
    save_file({**held, turned: torch.ones(1, 4, 128)}, file)
    with pytest.raises(InputError, match="should be a matrix"):
        run.load(tmp_path / "adapter")
    for other in (held[own] + 1, held[own][:-1].clone()):
        save_file({**held, own: other}, file)
        with pytest.raises(InputError, match="another than the base's own"):
            run.load(tmp_path / "adapter")


def test_rows_are_those_of_the_sum(tmp_path):
    made = run.load(folder(tmp_path / "base", "llama-untied"))
    Adapt(target_modules=["embed_tokens"], r=4)(made)
    op, ids = made.model.model.embed_tokens, torch.tensor([[0, 5], [127, 5]])
    with torch.no_grad():
        attached(made.model)["model.embed_tokens"].lora_B.normal_()
    torch.testing.assert_close(op(ids), F.embedding(ids, op.weight.sum()), rtol=0, atol=1e-5)
    op.weight.grid = Grid(FORMATS["int4-g32"])
    assert torch.equal(op.train()(ids), F.embedding(ids, op.weight.value()))


def test_what_cannot_be_is_refused(tmp_path):
    tied = folder(tmp_path / "tied")
    with pytest.raises(InputError, match="embed_tokens shares its weight with lm_head"):
        Adapt(target_modules=["embed_tokens"])(run.load(tied))
    made = run.load(folder(tmp_path / "base", "llama-untied"))
    with pytest.raises(InputError, match="DoRA and QA-LoRA are for what is multiplied"):
        Adapt(target_modules=["embed_tokens"], use_dora=True)(made)
    Adapt(target_modules=["embed_tokens"])(made)
    assert "is looked up" in str(gguf_lora.refuses(kinds.Job(made.loaded)))
