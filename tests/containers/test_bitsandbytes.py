"""Folders in bitsandbytes' layout, read and written, with transformers and the library as the other side."""

import json
from dataclasses import replace

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from halfbyte import kernels, models
from halfbyte.containers import bitsandbytes as container
from halfbyte.containers.shards import Shards, write_shards
from halfbyte.errors import InputError
from halfbyte.formats import FORMATS, parse
from halfbyte.layers import Codes, ops
from miniatures import folder, logits, quantized

IDS = torch.arange(20).reshape(2, 10)
NAMES = ["nf4-g64", "nf4-g32", "nf4-g64-dq", "fp4-bnb-g64"]


def tiny_llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    # not .to(dtype), which would cast the rotary frequencies too
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def save(model: nn.Module, folder, format_of) -> None:
    """Our writing, by hand; puts the dequantized weights into the model, so that it is what was saved."""
    tensors, sites, kept = {}, {}, []
    for name, p in model.state_dict(keep_vars=True).items():
        f, module = format_of(name), name.removesuffix(".weight")
        if f is None:
            tensors[name] = p.detach()
            kept += [module] if name.endswith("head.weight") else []
            continue
        turned = type(model.get_submodule(module)).__name__ == "Conv1D"
        q = kernels.quantize(p.detach().T if turned else p.detach(), f)
        tensors |= container.encode(module, q)
        sites[module] = (q, None)
        p.data = q.dequantize().T if turned else q.dequantize()
    config = model.config.to_dict() | {"quantization_config": container.config(sites, kept)}
    (folder / "config.json").write_text(json.dumps(config))
    write_shards(folder, tensors.items())


def load(folder, **kwargs):
    model = AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()
    found = [m for m in model.modules() if isinstance(m, Linear4bit)]
    assert found
    for m in found:
        m.support_avx512bf16_for_cpu = False  # it would repack the weights and multiply in bf16
    return model


def projections(f):
    return lambda name: f if "proj" in name else None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_reads_our_folder_with_the_same_logits(tmp_path, name, dtype):
    model = tiny_llama(dtype)
    save(model, tmp_path, projections(name))
    theirs = load(tmp_path, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(theirs(IDS).logits, model(IDS).logits)


def test_a_mixed_model_is_read_by_each_weights_own_state(tmp_path):
    model = tiny_llama()
    kinds = {"q_proj": "nf4-g32", "down_proj": "fp4-bnb-g64", "up_proj": "nf4-g64-dq"}
    save(
        model,
        tmp_path,
        lambda n: next((f for k, f in kinds.items() if k in n), "nf4-g64" if "proj" in n else None),
    )
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(IDS).logits, model(IDS).logits)


def test_layers_may_be_kept(tmp_path):
    model = tiny_llama()
    tensors, sites, kept = {}, {}, ["lm_head"]
    for name, p in model.state_dict(keep_vars=True).items():
        module = name.removesuffix(".weight")
        if "proj" not in name or "layers.1.mlp" in name:
            tensors[name] = p.detach()
            kept += [module] if "proj" in name else []
            continue
        q = kernels.quantize(p.detach(), "nf4-g64")
        p.data = q.dequantize()
        tensors |= container.encode(module, q)
        sites[module] = (q, None)
    config = model.config.to_dict() | {"quantization_config": container.config(sites, kept)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_shards(tmp_path, tensors.items())
    theirs = load(tmp_path)
    assert type(theirs.model.layers[1].mlp.up_proj) is nn.Linear
    assert isinstance(theirs.model.layers[0].mlp.up_proj, Linear4bit)
    with torch.no_grad():
        assert torch.equal(theirs(IDS).logits, model(IDS).logits)


def test_conv1d_is_held_as_a_linear(tmp_path):
    config = GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=128, n_positions=32, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    save(model, tmp_path, lambda n: "nf4-g64" if "c_" in n and n.endswith("weight") else None)
    assert container.refuses(FORMATS["nf4-g64"], "conv1d") is None
    with torch.no_grad():  # x W + b against x W^T + b: another order of the sums
        torch.testing.assert_close(load(tmp_path)(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "double"), [("nf4", False), ("nf4", True), ("fp4", False)])
def test_a_folder_written_by_bitsandbytes_is_read_with_the_same_codes(tmp_path, kind, double):
    tiny_llama(torch.bfloat16).save_pretrained(tmp_path / "dense")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    theirs = load(tmp_path / "dense", quantization_config=config, dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path / "4bit")
    shards = Shards.of_folder(tmp_path / "4bit")
    said = json.loads((tmp_path / "4bit" / "config.json").read_text())["quantization_config"]
    sites = container.formats(said, set(shards), shards.get)
    expected = {n for n, m in theirs.named_modules() if isinstance(m, Linear4bit)}
    assert set(sites) == expected
    for name, (f, input) in sites.items():
        m = theirs.get_submodule(name)
        assert input is None
        q = container.decode(name, f, (m.out_features, m.in_features), shards.get)
        assert f.name == {"nf4": "nf4-g64-dq" if double else "nf4-g64", "fp4": "fp4-bnb-g64"}[kind]
        again = container.encode(name, q)
        for k, t in again.items():
            if "quant_state" in k:
                assert bytes(t.tolist()) == bytes(shards.get(k).tolist())
            else:
                assert torch.equal(t, shards.get(k)), k
        assert torch.equal(q.dequantize(), dequantize_4bit(m.weight.data, m.weight.quant_state))


def test_the_config_is_that_of_transformers():
    q = kernels.quantize(torch.randn(4, 64).bfloat16(), "nf4-g64-dq")
    ours = container.config({"a": (q, None)}, ["lm_head"])
    theirs = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head"],
    )
    assert ours == json.loads(json.dumps(theirs.to_dict()))


@given(st.sampled_from([*NAMES, "nf4-g4096-dq", "fp4-bnb-g128"]), st.integers(1, 5), st.integers(1, 3))
def test_decode_is_the_inverse_of_encode(name, rows, blocks):
    f = parse(name)
    assert isinstance(f.group, int)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q = kernels.quantize(torch.randn(rows, blocks * f.group).to(dtype), f)
        tensors = container.encode("a.b", q)
        assert container.formats({}, set(tensors), tensors.__getitem__) == {"a.b": (f, None)}
        back = container.decode("a.b", f, q.shape, tensors.__getitem__)
        assert (back.format, back.shape, back.dtype) == (q.format, q.shape, q.dtype)
        assert back.tensors().keys() == q.tensors().keys()
        for k, t in q.tensors().items():
            assert torch.equal(back.tensors()[k], t), k


@pytest.mark.parametrize(
    ("name", "role", "reason"),
    [
        ("nf4-g64", "embedding", "kind embedding"),
        ("nf4-g64", "head", "kind head"),
        ("nf4-g64", "router", "kind router"),
        ("int4-g64", "linear", "no layout for int4-g64"),
        ("fp4-e2m1-g64", "linear", "no layout for fp4-e2m1-g64"),
        ("nf4-g63", "linear", "no blocks of 63, only of 32, 64"),
        ("nf4-g16", "linear", "no blocks of 16"),
        ("fp4-bnb-g8192", "linear", "no blocks of 8192"),
        ("q4_0", "linear", "no layout"),
    ],
)
def test_what_is_refused(name, role, reason):
    assert reason in container.refuses(parse(name), role)


def test_what_is_held():
    for name in [*NAMES, "nf4-g4096", "fp4-bnb-g128", "nf4-g128-dq"]:
        assert container.refuses(parse(name), "linear") is None


def test_rows_that_are_no_whole_blocks_are_refused():
    with pytest.raises(InputError, match=r"a\.b: its 96 inputs are no multiple of 64"):
        container.encode("a.b", kernels.quantize(torch.randn(2, 96), "nf4-g64"))


def test_a_kept_name_must_not_hide_a_quantized_module():
    q = kernels.quantize(torch.randn(2, 64), "nf4-g64")
    for kept in ("model.layers.0", "down_proj"):
        with pytest.raises(InputError, match=rf"keep {kept} would keep model\.layers\.0\.down_proj too"):
            container.config({"model.layers.0.down_proj": (q, None)}, [kept])


# ---- LLM.int8


def eight_bit(path, name="llama-untied", dtype=torch.float16):
    """A dense miniature, and the model that bitsandbytes makes of it."""
    dense = folder(path, name, dtype)
    config = BitsAndBytesConfig(load_in_8bit=True)
    theirs = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, dtype=dtype).eval()
    return dense, theirs, {n: m for n, m in theirs.named_modules() if isinstance(m, Linear8bitLt)}


def codes(model):
    return {n: op.weight.stored.q for n, op in ops(model) if isinstance(op.weight.stored, Codes)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_an_8_bit_folder_written_by_bitsandbytes_is_read_with_the_same_codes(tmp_path, dtype):
    _, theirs, layers = eight_bit(tmp_path / "dense", dtype=dtype)
    theirs.save_pretrained(tmp_path / "8bit")
    loaded = models.load(tmp_path / "8bit")
    found, shards = codes(loaded.model), Shards.of_folder(tmp_path / "8bit")
    assert found.keys() == layers.keys()
    for name, q in found.items():
        assert (q.format.name, q.dtype) == ("int8-bnb", dtype)
        held = layers[name].weight
        meant = int8_vectorwise_dequant(held.data, held.SCB)  # which multiplies by 1/127 last
        torch.testing.assert_close(replace(q, dtype=torch.float32).dequantize(), meant, rtol=2**-21, atol=0)
        for key, t in container.encode(name, q).items():
            assert torch.equal(t, shards.get(key)), key
    (tmp_path / "again").mkdir()
    models.save(loaded, tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(theirs))


@pytest.mark.parametrize("name", ["llama-untied", "llama", "gpt2"])
def test_what_we_write_in_8_bits_is_what_bitsandbytes_makes_of_the_same_weights(tmp_path, name):
    dense, theirs, layers = eight_bit(tmp_path / "dense", name)
    made = quantized(dense, "LLM_INT8")
    (tmp_path / "out").mkdir()
    assert models.save(made.loaded, tmp_path / "out") is container
    for layer, q in codes(made.model).items():
        ours, held = container.encode(layer, q), layers[layer].weight
        assert torch.equal(ours[f"{layer}.SCB"], held.SCB)
        other = ours[f"{layer}.weight"] != held.data
        weight = models.load(dense).model.get_submodule(layer).weight.base().double()
        steps = (weight * 127 / held.SCB.double()[:, None])[other]
        assert torch.equal(steps - steps.floor(), torch.full_like(steps, 0.5))  # ties, which fp32 puts on either side
        assert other.float().mean() < 1e-3
        held.data.copy_(ours[f"{layer}.weight"])  # so that the logits can be held against each other
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert len([m for m in again.modules() if isinstance(m, Linear8bitLt)]) == len(layers)
    assert torch.equal(logits(again), logits(theirs))
    assert torch.equal(logits(models.load(tmp_path / "out").model), logits(made.model))


def test_the_reader_rounds_inputs_to_8_bits_and_nothing_else(tmp_path):
    """So its logits differ from ours as those of weights and inputs in 8 bits do."""
    dense, theirs, _ = eight_bit(tmp_path / "dense")
    ours, reader = logits(quantized(dense, "LLM_INT8").model).float(), logits(theirs).float()
    rounded = logits(quantized(dense, "W8A8").model).float()
    assert 0 < (reader - ours).norm() < 1.5 * (rounded - ours).norm()


def test_the_8_bit_config_is_that_of_transformers():
    q = kernels.quantize(torch.randn(4, 64), "int8-bnb")
    theirs = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"])
    assert container.config({"a": (q, None)}, ["lm_head"]) == json.loads(json.dumps(theirs.to_dict()))
    with pytest.raises(InputError, match="8 bits or of 4"):
        container.config({"a": (q, None), "b": (kernels.quantize(torch.randn(4, 64), "nf4-g64"), None)}, [])


@given(st.integers(0, 2**32))
def test_the_largest_of_a_row_is_kept_to_the_bit(seed):
    """Any that bitsandbytes finds: it looks in float16."""
    generator = torch.Generator().manual_seed(seed)
    largest = (torch.rand(64, generator=generator) * 2 ** torch.randint(-14, 15, (64,), generator=generator)).half()
    tensors = {
        "a.weight": torch.randint(-127, 128, (64, 32), dtype=torch.int8, generator=generator),
        "a.SCB": largest.float(),
        "a.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    q = container.decode("a", FORMATS["int8-bnb"], (64, 32), tensors.__getitem__, {"dtype": torch.float16})
    again = container.encode("a", q)
    assert all(torch.equal(again[k], t) for k, t in tensors.items())
    value = tensors["a.weight"].double() * tensors["a.SCB"].double()[:, None] / 127
    torch.testing.assert_close(replace(q, dtype=torch.float32).dequantize().double(), value, rtol=2**-22, atol=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"SCB": torch.ones(3)}, "a.SCB should be float32 of the shape"),
        ({"SCB": torch.ones(4, 1)}, "a.SCB should be float32 of the shape"),
        ({"SCB": torch.ones(4).half()}, "a.SCB should be float32"),
        ({"weight": torch.zeros(4, 63, dtype=torch.int8)}, "a.weight should be int8"),
        ({"weight": torch.zeros(4, 64, dtype=torch.uint8)}, "a.weight should be int8"),
        ({"weight": None}, "missing"),
        ({"weight_format": torch.tensor(1, dtype=torch.uint8)}, "order of a GPU"),
        ({"weight_format": torch.zeros(2, dtype=torch.uint8)}, "order of a GPU"),
    ],
)
def test_broken_8_bit_tensors_are_refused(change, said):
    good = container.encode("a", kernels.quantize(torch.randn(4, 64), "int8-bnb"))
    tensors = good | {f"a.{n}": t for n, t in change.items()}
    with pytest.raises(InputError, match=said):
        read({n: t for n, t in tensors.items() if t is not None}, load_in_8bit=True)


def test_weights_without_constants_are_not_in_8_bits():
    assert container.formats({"load_in_8bit": True}, {"a.weight"}, {}.__getitem__) == {}


# ---- hostile files

STATE = "a.weight.quant_state.bitsandbytes__nf4"


def written(name: str) -> dict[str, torch.Tensor]:
    return container.encode("a", kernels.quantize(torch.randn(4, 64), name))


def as_bytes(text: str | bytes) -> torch.Tensor:
    data = text.encode() if isinstance(text, str) else text
    return torch.tensor(list(data), dtype=torch.uint8)


def read(tensors: dict[str, torch.Tensor], **config) -> None:
    """Formats, then decode, as a loader does, with a reader that raises what Shards raises."""

    def get(name: str) -> torch.Tensor:
        if name not in tensors:
            raise InputError(f"the tensor {name!r} is missing.")
        return tensors[name]

    for name, (f, _) in container.formats(config, set(tensors), get).items():
        container.decode(name, f, (4, 64), get).dequantize()


@pytest.mark.parametrize(
    "text",
    [
        b"", b"\xff\xfe", "[1", "[]", "3", "[" * 60000, '{"a":' * 20000, "null", "{}", "NaN",
        "9" * 6000,
    ],
)  # fmt: skip
def test_a_state_that_is_no_json_object(text):
    with pytest.raises(InputError, match=STATE.replace(".", r"\.")):
        read(written("nf4-g64") | {STATE: as_bytes(text)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quant_type": "nf5"}, "nf5"),
        ({"quant_type": "fp4"}, "fp4"),
        ({"quant_type": None}, "None"),
        ({"quant_type": ["nf4"]}, "nf4"),
        ({"blocksize": 63}, "blocksize of 63"),
        ({"blocksize": 0}, "blocksize of 0"),
        ({"blocksize": -64}, "blocksize of -64"),
        ({"blocksize": "64"}, "blocksize of '64'"),
        ({"blocksize": True}, "blocksize of True"),
        ({"blocksize": {}}, "blocksize of {}"),
        ({"blocksize": 32}, "absmax"),
        ({"dtype": "float64"}, "float64"),
        ({"dtype": ["x"]}, "dtype"),
        ({"shape": [64, 4]}, "shape"),
        ({"shape": None}, "shape"),
        ({"shape": [4, 64, 1]}, "shape"),
        ({"nested_blocksize": 128}, "blocks of 256"),
        ({"nested_offset": float("nan")}, "offset"),
        ({"nested_offset": 1e300}, "offset"),
        ({"nested_offset": "0"}, "offset"),
        ({"nested_offset": 10**400}, "offset"),
    ],
)
def test_a_state_that_says_what_cannot_be(change, said):
    nested = any("nested" in k for k in change)
    tensors = written("nf4-g64-dq" if nested else "nf4-g64")
    state = json.loads(bytes(tensors[STATE].tolist())) | change
    with pytest.raises(InputError, match=said):
        read(tensors | {STATE: as_bytes(json.dumps(state))})


def test_double_quantized_fp4_is_named():
    tensors = written("nf4-g64-dq")
    state = json.loads(bytes(tensors.pop(STATE).tolist())) | {"quant_type": "fp4"}
    with pytest.raises(InputError, match="double quantization of nf4 only"):
        read(tensors | {STATE.replace("nf4", "fp4"): as_bytes(json.dumps(state))})


@pytest.mark.parametrize("name", ["nf4-g64", "nf4-g64-dq"])
def test_tensors_of_the_wrong_size_or_dtype(name):
    good = written(name)
    for key in good:
        shorter = good[key].flatten()[:-1]
        for bad in (shorter, good[key].double(), good[key].flatten()[:0], torch.tensor(7), good[key].int()):
            with pytest.raises(InputError, match=r"a\b"):
                read(good | {key: bad})
        if key != STATE:
            with pytest.raises(InputError, match=rf"{key}.*missing"):
                read({k: t for k, t in good.items() if k != key})


@pytest.mark.parametrize("key", ["quant_map", "nested_quant_map"])
@pytest.mark.parametrize("value", [0.5, float("nan"), float("inf")])
def test_another_map_is_refused(key, value):
    good = written("nf4-g64-dq")
    other = good[f"a.weight.{key}"].clone()
    other[3] = value
    with pytest.raises(InputError, match=rf"a\.weight\.{key}: its values"):
        read(good | {f"a.weight.{key}": other})


def test_packed_codes_of_another_storage_dtype_are_the_same_bytes():
    good = written("nf4-g64")
    stored = good["a.weight"].reshape(-1).view(torch.bfloat16)[:, None]
    f = FORMATS["nf4-g64"]
    a = container.decode("a", f, (4, 64), good.__getitem__)
    b = container.decode("a", f, (4, 64), (good | {"a.weight": stored}).__getitem__)
    assert torch.equal(a.codes, b.codes)
