"""Folders that transformers wrote, read by us, and folders that we wrote, read by transformers."""

import json

import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CompressedTensorsConfig

from halfbyte import InputError, models
from halfbyte.layers import Linear, ops, swap
from halfbyte.models import blocks, loading, roles, stacks, tied
from miniatures import EXPERTS, MINIATURES, OTHERS, folder, logits, make, quantized, theirs

CAUSAL = ["llama", "llama-untied", "qwen2", "gemma3", "neox", "opt", "gpt2"]
DTYPES = [torch.float32, torch.bfloat16]


def agree(name, ours, others):
    """To the bit; but gpt-oss' experts add their biases after rounding the products, where we round once."""
    if name == "gpt-oss":
        torch.testing.assert_close(ours, others, rtol=0, atol=1e-6 if ours.dtype == torch.float32 else 2**-7)
    else:
        assert torch.equal(ours, others)


def rewrite(path, change, **config):
    """Changes the tensors and the config of a folder."""
    tensors = load_file(path / "model.safetensors")
    save_file(change(tensors) or tensors, path / "model.safetensors", metadata={"format": "pt"})
    stated = json.loads((path / "config.json").read_text()) | config
    (path / "config.json").write_text(json.dumps(stated))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*MINIATURES, *OTHERS])
def test_we_read_what_transformers_wrote(tmp_path, name, dtype):
    path = folder(tmp_path / "m", name, dtype)
    loaded = models.load(path)
    assert loaded.config.dtype == dtype
    assert {p.dtype for p in loaded.model.parameters()} == {dtype}
    assert loaded.checkpoint is not None  # a tensor at a time, whatever is renamed or fused
    agree(name, logits(loaded.model), logits(theirs(path, name)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*MINIATURES, *OTHERS])
def test_transformers_reads_what_we_wrote(tmp_path, name, dtype):
    loaded = models.load(folder(tmp_path / "m", name, dtype))
    (tmp_path / "out").mkdir()
    assert models.save(loaded, tmp_path / "out") is None
    again = theirs(tmp_path / "out", name)
    assert again.dtype == dtype
    agree(name, logits(again), logits(loaded.model))
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("m", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)


W8A8 = {"weight": "int8-channel", "input": "int8-token"}
KEPT = [{"match": f"@{role}"} for role in ("embedding", "head", "router", "expert")]
QUANTIZED = [
    (name, to)
    for name in MINIATURES
    for to in ({"weight": "int4-g32"}, {"weight": "nf4-g64"}, W8A8)
    if name != "gpt2" or to["weight"] == "nf4-g64"  # in integers its Conv1D has a place in GPTQ's layout alone
    if name != "falcon" or to["weight"] != "nf4-g64"  # bitsandbytes replaces no FalconLinear
    # OPT flattens (rows, tokens) before its MLP, where the library then finds one scale for all tokens; we do not
    if (name, to) != ("opt", W8A8)
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "to"), QUANTIZED, ids=lambda v: v if isinstance(v, str) else v["weight"])
@pytest.mark.usefixtures("torch_products")
def test_every_architecture_is_read_quantized_too(tmp_path, name, to, dtype):
    made = quantized(folder(tmp_path / "m", name, dtype), [*KEPT, {"match": ".*", **to}])
    (tmp_path / "out").mkdir()
    models.save(made.loaded, tmp_path / "out")
    # Falcon cannot be made with packed weights and a tied head: its _init_weights looks for floats
    whole = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if name == "falcon" else {}
    again = theirs(tmp_path / "out", name, **(whole if to is not W8A8 else {}))
    for m in again.modules():
        if isinstance(m, Linear4bit):
            m.support_avx512bf16_for_cpu = False  # it would repack the weights and multiply in bf16
    if to is not W8A8 or dtype == torch.float32:  # in bf16 the library finds the inputs' scales in bf16
        agree(name, logits(again), logits(made.model))
    assert torch.equal(logits(models.load(tmp_path / "out").model), logits(made.model))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_another_dtype_than_the_checkpoints(tmp_path, name):
    path = folder(tmp_path / "m", name, torch.bfloat16)
    loaded = models.load(path, torch.float32)
    assert torch.equal(logits(loaded.model), logits(theirs(path, name, dtype=torch.float32)))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert"])
def test_checkpoints_of_a_bare_model_lack_its_prefix(tmp_path, name):
    path = folder(tmp_path / "m", name)
    whole = logits(models.load(path).model)
    prefix = theirs(path, name).base_model_prefix + "."
    rewrite(path, lambda t: {n.removeprefix(prefix): v for n, v in t.items()})
    assert torch.equal(logits(models.load(path).model), whole)


def test_several_shards(tmp_path):
    model = make("llama-untied")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(models.load(tmp_path).model), logits(model))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3"])
def test_tied_weights_are_one_and_are_saved_once(tmp_path, name):
    loaded = models.load(folder(tmp_path / "m", name))
    model = loaded.model
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert list(tied(model)) == ["lm_head"]
    assert sum(p.numel() for p in model.parameters()) == theirs(tmp_path / "m", name).num_parameters()
    assert roles(model)["lm_head"] == "embedding"


def test_a_checkpoint_that_holds_the_tied_head_alone(tmp_path):
    path = folder(tmp_path / "m")
    before = logits(models.load(path).model)
    rewrite(path, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    assert torch.equal(logits(models.load(path).model), before)


def test_the_roles_of_each_architecture():
    def of(name):
        found = {}
        for n, role in roles(swap(make(name))).items():
            found.setdefault(role, set()).add(n.rpartition(".")[2])
        return found

    assert of("llama-untied")["head"] == {"lm_head"}
    assert of("llama-untied")["embedding"] == {"embed_tokens"}
    assert of("gpt2") == {"conv1d": {"c_attn", "c_proj", "c_fc"}, "embedding": {"wte", "wpe", "lm_head"}}
    assert of("neox")["head"] <= {"embed_out", "lm_head"}
    assert of("bert")["head"] == {"dense", "classifier"}  # the pooler feeds the classifier alone
    for name in EXPERTS:
        assert of(name)["expert"] == {"gate_proj", "up_proj", "down_proj"}
    assert of("t5") == {
        "embedding": {"shared", "embed_tokens", "lm_head", "relative_attention_bias"},
        "linear": {"q", "k", "v", "o", "wi", "wo"},
    }
    assert of("whisper")["convolution"] == {"conv1", "conv2"}
    assert of("vit")["convolution"] == {"projection"}
    assert of("falcon")["linear"] == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}


@pytest.mark.parametrize("name", [*MINIATURES, *OTHERS])
def test_blocks_are_the_layers_in_order(name):
    model = swap(make(name))
    found = blocks(model)
    assert len(found) == 2
    assert all(model.get_submodule(n) is m for n, m in found)
    inside = [n for n, op in ops(model) if isinstance(op, Linear) and any(n.startswith(f"{p}.") for p, _ in found)]
    assert len(inside) >= 8


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_an_encoders_blocks_run_before_a_decoders(name):
    model = swap(make(name))
    encoder, decoder = stacks(model)
    assert (len(encoder), len(decoder)) == (2, 2)
    assert all("encoder" in n for n, _ in encoder)
    assert all("decoder" in n for n, _ in decoder)
    assert blocks(model) == decoder  # the larger one


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_part_of_a_block(name):
    model = swap(make(name))
    assert stacks(model) == [blocks(model)]
    assert len(blocks(model)) == 2


def test_a_model_without_blocks_has_none():
    assert blocks(nn.Sequential(nn.Linear(2, 2))) == []
    assert stacks(nn.Sequential(nn.Linear(2, 2))) == []


def test_without_weights_nothing_is_read(tmp_path):
    loaded = models.load(folder(tmp_path / "m"), weights=False)
    assert all(p.device.type == "meta" for p in loaded.model.parameters())


def test_labels_make_a_classifier_with_a_new_head(tmp_path):
    path = folder(tmp_path / "m", "bert", num_labels=2)
    rewrite(path, lambda t: {n: v for n, v in t.items() if not n.startswith("classifier")})
    model = models.load(path, labels=["bad", "fair", "good"]).model
    assert model.config.id2label == {0: "bad", 1: "fair", 2: "good"}
    assert logits(model).shape == (2, 3)
    assert model.classifier.weight.base().std() == pytest.approx(0.02, rel=0.3)


# ---- what cannot be read


def test_a_missing_tensor_is_named(tmp_path):
    path = folder(tmp_path / "m")
    rewrite(path, lambda t: {n: v for n, v in t.items() if "layers.1.self_attn.k_proj" not in n})
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.k_proj"):
        models.load(path)


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_a_wrong_shape_is_named(tmp_path, name):
    path = folder(tmp_path / "m")
    rewrite(path, lambda t: t.update({name: t[name][:-1].contiguous()}))
    with pytest.raises(InputError, match=name):
        models.load(path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_codes_without_an_explanation_are_refused(tmp_path, dtype):
    path = folder(tmp_path / "m")
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(path, lambda t: t.update({name: t[name].to(dtype)}))
    with pytest.raises(InputError, match=name):
        models.load(path)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "no-such-thing"}, "no-such-thing"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq.*none of its tensors"),
        ({"quantization_config": {"quant_method": "quip", "bits": 4}}, "quantized by 'quip' cannot be read"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Model"}, "model_type": "own"}, "no code from a checkpoint"),
        ({"architectures": ["NoSuchModel"], "model_type": "vit"}, "NoSuchModel"),
    ],
)
def test_configs_that_cannot_be_used(tmp_path, config, says):
    path = folder(tmp_path / "m")
    rewrite(path, lambda t: None, **config)
    with pytest.raises(InputError, match=says):
        models.load(path)


@pytest.mark.parametrize("source", ["no/such/folder", "no-such-file.gguf", "/no/such/path/at/all"])
def test_what_is_not_there(source, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=source):
        models.load(source)


def test_a_folder_without_a_config(tmp_path):
    with pytest.raises(InputError, match=r"config\.json"):
        models.load(tmp_path)


def test_code_in_the_folder_is_never_run(tmp_path):
    path = folder(tmp_path / "m")
    (path / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    rewrite(path, lambda t: None, auto_map={"AutoModelForCausalLM": "modeling.M", "AutoConfig": "modeling.C"})
    models.load(path)  # a known architecture needs none of it
    assert not (tmp_path / "ran").exists()


def test_what_ends_an_answer_is_kept(tmp_path):
    """Of a folder's generation config too, which may name more tokens than the config does."""
    path = folder(tmp_path / "m")
    said = json.loads((path / "generation_config.json").read_text())
    (path / "generation_config.json").write_text(json.dumps({**said, "eos_token_id": [2, 5], "top_k": 20}))
    loaded = models.load(path)
    assert loaded.model.generation_config.eos_token_id == [2, 5]
    (tmp_path / "again").mkdir()
    models.save(loaded, tmp_path / "again")
    again = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert (again["eos_token_id"], again["top_k"]) == ([2, 5], 20)


@pytest.mark.parametrize("text", ["[]", "{", '{"eos_token_id": {}, "max_new_tokens": -1}'])
def test_a_generation_config_that_cannot_be_used(tmp_path, text):
    path = folder(tmp_path / "m")
    (path / "generation_config.json").write_text(text)
    with pytest.raises(InputError, match=r"generation_config\.json"):
        models.load(path)


@pytest.mark.parametrize("experts", [2**40, 10**6, 50])
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_more_experts_than_there_are_tensors_are_not_made(tmp_path, name, experts):
    path = folder(tmp_path / "m", name)
    rewrite(path, lambda t: None, num_local_experts=experts)
    with pytest.raises(InputError, match=r"config\.json"):
        models.load(path)


@pytest.mark.parametrize("change", [lambda t: t[:, :-1], lambda t: t[:2], lambda t: t[0, 0], lambda t: t[0]])
def test_fused_experts_of_a_wrong_shape_are_named(tmp_path, change):
    path = folder(tmp_path / "m", "gpt-oss")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    rewrite(path, lambda t: t.update({name: change(t[name]).contiguous()}))
    with pytest.raises(InputError, match=name):
        models.load(path)


@pytest.mark.parametrize("layers", [2**64, 10**6, 2**31])
def test_more_layers_than_there_are_tensors_are_not_made(tmp_path, layers):
    path = folder(tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers, "layer_types": None}))
    with pytest.raises(InputError, match=r"config\.json"):
        models.load(path)


def test_what_transformers_alone_can_take_apart_it_reads(tmp_path):
    """Dinov2's gated MLP lies in one matrix on disk and in two in memory: no name for a name."""
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8, use_swiglu_ffn=True,
        num_labels=3,
    )  # fmt: skip
    model = transformers.Dinov2ForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "m")
    loaded = models.load(tmp_path / "m")
    assert loaded.checkpoint is None
    assert torch.equal(logits(loaded.model), logits(model))
    (tmp_path / "out").mkdir()
    models.save(loaded, tmp_path / "out")
    again = transformers.Dinov2ForImageClassification.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("name", [*loading.DTYPES, torch.float32, None])
def test_dtypes_by_name(name):
    assert models.parse_dtype(name) == loading.DTYPES.get(name, name)


def test_another_dtype_is_refused():
    with pytest.raises(InputError, match="int8"):
        models.parse_dtype("int8")
