"""Folders in the compressed-tensors layout, read by plain transformers with that library, and back by us."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from halfbyte import InputError, kernels, models
from halfbyte.containers import CONTAINERS, container_for
from halfbyte.containers import compressed_tensors as container
from halfbyte.formats import FORMATS, parse
from halfbyte.layers import Codes, ops
from halfbyte.scheme import scheme
from miniatures import IDS, calibrated, folder, logits, make, quantized

INTEGERS = [f"{u}int{bits}-{group}" for bits in range(2, 9) for u in ("", "u") for group in ("channel", "g32")]
FORMATS_HELD = [*INTEGERS, "int8-tensor", "int4-tensor", "int4-g64", "uint4-g64", "fp8-e4m3-channel", "fp8-e4m3-tensor"]
KEPT = [{"match": "@embedding"}, {"match": "@head"}]
DEQUANTIZE = CompressedTensorsConfig(dequantize=True)
DTYPES = [torch.float32, torch.bfloat16]
MIXED = [
    {"match": "lm_head", "weight": "int8-channel"},
    {"match": "@embedding"},
    {"match": r".*\.down_proj", "weight": "int4-g64"},
    {"match": r".*\.layers\.0\.self_attn\..*", "weight": "uint4-g32"},
    {"match": r".*\.layers\.1\.self_attn\.q_proj"},
    {"match": "@linear", "weight": "fp8-e4m3-channel"},
]

MIXED_GROUPS = [
    {"match": r".*\.down_proj", "weight": "int4-g64"},
    {"match": r".*\.o_proj", "weight": "int4-channel"},
    {"match": "@linear", "weight": "int4-g32"},
    {"match": ".*"},
]


def saved(tmp_path, to, dtype=torch.float32, name="llama-untied"):
    """A quantized miniature and the folder that it was saved in."""
    made = quantized(folder(tmp_path / "float", name, dtype), to)
    out = tmp_path / "quantized"
    out.mkdir()
    assert models.save(made.loaded, out) is container
    return made, out


def foreign(path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, **kwargs).eval()


def codes(model):
    return {n: op.weight.stored.q for n, op in ops(model) if isinstance(op.weight.stored, Codes)}


def assert_same_codes(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, q in ours.items():
        assert q.format == theirs[name].format
        assert q.dtype == theirs[name].dtype
        for part, tensor in q.tensors().items():
            assert torch.equal(tensor, theirs[name].tensors()[part]), (name, part)


def name_of(to):
    return to if isinstance(to, str) else "mixed"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("to", [*FORMATS_HELD, MIXED, MIXED_GROUPS], ids=name_of)
@pytest.mark.usefixtures("torch_products")
def test_others_compute_the_same_logits_and_we_read_the_same_codes(tmp_path, to, dtype):
    made, path = saved(tmp_path, to, dtype)
    ours = logits(made.model)
    assert torch.equal(logits(foreign(path)), ours)
    if to is not MIXED:  # transformers 5.24 dequantizes all layers by one scheme, so that kinds cannot be mixed there
        assert torch.equal(logits(foreign(path, quantization_config=DEQUANTIZE)), ours)
    again = models.load(path)
    assert_same_codes(codes(made.model), codes(again.model))
    assert torch.equal(logits(again.model), ours)


@pytest.mark.parametrize("to", ["W8A8", "FP8", "W4A8"])
@pytest.mark.usefixtures("torch_products")
def test_inputs_are_rounded_at_run_time_as_the_reader_rounds_them(tmp_path, to):
    made, path = saved(tmp_path, to)
    weights = {"W8A8": "int8-channel", "FP8": "fp8-e4m3-channel", "W4A8": "int4-g64"}[to]
    float_inputs, _ = saved(tmp_path / "float-inputs", weights)
    ours, theirs = logits(made.model), logits(foreign(path))
    # in fp32 the arithmetic is the same, operation by operation
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, logits(float_inputs.model))
    again = models.load(path).model
    assert {str(op.input) for n, op in ops(again) if n in codes(again)} == {
        "fp8-e4m3-token" if to == "FP8" else "int8-token"
    }
    assert torch.equal(logits(again), ours)


@pytest.mark.parametrize("to", ["W8A8", "FP8"])
def test_in_bf16_the_readers_scales_of_inputs_are_rounded_to_bf16(tmp_path, to):
    """The library finds a token's scale in bf16, we in fp32: a difference no larger than rounding inputs makes."""
    made, path = saved(tmp_path, to, torch.bfloat16)
    ours, theirs = logits(made.model).float(), logits(foreign(path)).float()
    unrounded = logits(foreign(path, quantization_config=DEQUANTIZE)).float()
    assert (ours - theirs).norm() < 1.5 * (theirs - unrounded).norm()


STATIC = {
    "W8A8_STATIC": "W8A8_STATIC",
    "W8A8_STATIC asymmetric": [*KEPT, {"match": "@linear", "weight": "int8-channel", "input": "uint8-tensor"}],
    "FP8 static": [*KEPT, {"match": "@linear", "weight": "fp8-e4m3-channel", "input": "fp8-e4m3-tensor"}],
}


def saved_static(tmp_path, to, dtype=torch.float32):
    """As `saved`, with inputs whose scales were found on text."""
    made = calibrated(folder(tmp_path / "float", "llama-untied", dtype, words=True), STATIC[to])
    out = tmp_path / "quantized"
    out.mkdir()
    assert models.save(made.loaded, out) is container
    return made, out


@pytest.mark.parametrize("to", STATIC)
@pytest.mark.usefixtures("torch_products")
def test_static_inputs_are_rounded_as_the_reader_rounds_them(tmp_path, to):
    made, path = saved_static(tmp_path, to)
    said = json.loads((path / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    args = {k: said["input_activations"][k] for k in ("num_bits", "type", "symmetric", "strategy", "dynamic")}
    kind, symmetric = "float" if "FP8" in to else "int", "asymmetric" not in to
    assert args == {"num_bits": 8, "type": kind, "symmetric": symmetric, "strategy": "tensor", "dynamic": False}
    there = {n.removeprefix(f"{LAYER}."): t for n, t in load_file(path / "model.safetensors").items() if LAYER in n}
    zero = set() if symmetric else {"input_zero_point"}
    assert there.keys() == {"weight", "weight_scale", "input_scale"} | zero
    ours = logits(made.model)
    # in fp32 the arithmetic is the same, operation by operation
    assert torch.equal(logits(foreign(path)), ours)
    assert not torch.equal(logits(foreign(path, quantization_config=DEQUANTIZE)), ours)
    again = models.load(path).model
    assert_same_codes(codes(made.model), codes(again))
    for (_, op), (_, other) in zip(ops(made.model), ops(again), strict=True):
        if getattr(op, "input", None) is not None:
            assert other.input == op.input
            assert all(torch.equal(t, other.get_buffer(n)) for n, t in op.named_buffers(recurse=False))
    assert torch.equal(logits(again), ours)


@pytest.mark.parametrize("to", STATIC)
def test_in_bf16_the_reader_divides_static_inputs_in_bf16(tmp_path, to):
    made, path = saved_static(tmp_path, to, torch.bfloat16)
    ours, theirs = logits(made.model).float(), logits(foreign(path)).float()
    unrounded = logits(foreign(path, quantization_config=DEQUANTIZE)).float()
    assert (ours - theirs).norm() < 1.5 * (theirs - unrounded).norm()


@pytest.mark.parametrize("name", ["llama", "llama-untied"])
def test_kept_layers_are_ignored_by_name(tmp_path, name):
    _, path = saved(tmp_path, "int4-g32", name=name)
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head"]
    assert config["quantization_status"] == "compressed"
    assert all(g["format"] == "pack-quantized" for g in config["config_groups"].values())
    assert "lm_head.weight_packed" not in load_file(path / "model.safetensors")


def test_a_tied_head_stays_tied(tmp_path):
    _, path = saved(tmp_path, "int4-g32", name="llama")
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    theirs = foreign(path)
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight


def test_patterns_cover_their_layers_and_no_others(tmp_path):
    _, path = saved(tmp_path, MIXED)
    groups = json.loads((path / "config.json").read_text())["quantization_config"]["config_groups"]
    targets = {t for g in groups.values() for t in g["targets"]}
    assert r"re:model\.layers\.\d+\.mlp\.down_proj$" in targets  # one pattern for all of a kind
    assert r"re:model\.layers\.1\.self_attn\.q_proj$" not in targets


@pytest.mark.parametrize(
    "f", ["nf4-g64", "q4_0", "q4_k", "fp4-e2m1-g32", "fp8-e5m2-channel", "uint4-tensor", "fp8-e4m3-g32"]
)
def test_formats_without_a_layout_are_refused(f):
    assert container.refuses(parse(f), "linear")


@pytest.mark.parametrize("role", ["convolution", "embedding"])
def test_roles_without_a_place_are_refused(role):
    assert role in container.refuses(FORMATS["int4-g32"], role)
    with pytest.raises(InputError, match=rf"(?s)wte.*{role}"):
        container_for({"wte": (FORMATS["int4-g32"], role)})


def test_scales_that_a_layout_would_round_are_told_before_they_are_found():
    """GPTQ's keeps float16; GPT-2's Conv1D has no other."""
    sites = {"h.0.mlp.c_fc": (FORMATS["int4-g32"], "conv1d")}
    with pytest.raises(InputError, match=r"scales in float16, not in float32: add --dtype float16"):
        container_for(sites, dtypes={torch.float32})
    assert container_for(sites, dtypes={torch.bfloat16}).METHOD == "gptq"
    own = CONTAINERS["gptq"]
    assert container_for({"q": (FORMATS["int4-g32"], "linear")}, own, dtypes={torch.float32}).METHOD != "gptq"
    assert container_for({"q": (FORMATS["int4-g32"], "linear")}, own, dtypes={torch.float16}).METHOD == "gptq"


def test_zero_points_that_are_added_go_into_mlxs_layout():
    affine = (FORMATS["uint4-g64-affine"], "linear")
    assert container_for({"q": affine}).METHOD == "mlx"
    assert container_for({"q": (FORMATS["uint4-g64"], "linear")}).METHOD == "compressed-tensors"
    with pytest.raises(InputError, match=r"no folder layout.*no groups of channel"):
        container_for({"q": (FORMATS["uint4-channel-affine"], "linear")})


def test_gpt2_whose_inputs_are_rounded_is_refused_before_anything_is_written(tmp_path):
    made = quantized(folder(tmp_path / "float", "gpt2"), "W8A8")
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="conv1d"):
        made.holds(scheme("W8A8"))
    with pytest.raises(InputError, match="conv1d"):
        models.save(made.loaded, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


# ---- reading what others wrote, well or badly

LAYER = "model.layers.0.mlp.up_proj"


def write_config(path, change):
    config = json.loads((path / "config.json").read_text())
    change(config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))


def write_tensors(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("to", ["int4-g32", "uint4-g32", "int8-channel", "uint8-channel"])
@pytest.mark.usefixtures("torch_products")
def test_codes_that_the_library_wrote_in_whole_bytes(tmp_path, to):
    """`int-quantized` holds narrow codes in int8 too, and zero points as they are."""
    made, path = saved(tmp_path, to)
    held = codes(made.model)

    def widen(tensors):
        for name, q in held.items():
            half = 1 << (q.format.bits - 1)
            tensors.pop(f"{name}.weight_packed")
            tensors.pop(f"{name}.weight_shape")
            tensors[f"{name}.weight"] = (q.codes.short() - half).to(torch.int8)
            if "zero" in q.parts:
                tensors[f"{name}.weight_zero_point"] = (q.parts["zero"].short() - half).to(torch.int8)

    write_tensors(path, widen)
    write_config(path, lambda c: [g.update(format="int-quantized") for g in c["config_groups"].values()])
    assert torch.equal(logits(foreign(path)), logits(made.model))  # the library takes it for the same model
    assert_same_codes(held, codes(models.load(path).model))


def arguments(**changes):
    return lambda c: c["config_groups"]["group_0"]["weights"].update(changes)


@pytest.mark.parametrize(
    "change",
    [
        arguments(num_bits=16),
        arguments(num_bits=None),
        arguments(type="complex"),
        arguments(type="float", group_size=64),  # 4-bit floats come in groups of 16 or 32
        arguments(strategy="block", block_structure=[128, 128]),
        arguments(strategy="tensor_group"),
        arguments(group_size=0),
        arguments(group_size="32"),
        arguments(actorder="group"),
        lambda c: c.pop("config_groups"),
        lambda c: c.update(config_groups=[]),
        lambda c: c.update(config_groups={"W4A16": ["Linear"]}),
        lambda c: c["config_groups"]["group_0"].pop("weights"),
        lambda c: c["config_groups"]["group_0"].update(targets=["Conv2d"]),
        lambda c: c["config_groups"]["group_0"].update(targets=["re:("]),
        lambda c: c["config_groups"]["group_0"].update(targets=["re:" + "(" * 3000]),
        lambda c: c["config_groups"]["group_0"].update(targets=["re:a{99999999999999999999}"]),
        lambda c: c["config_groups"]["group_0"].update(targets=["re:(.+)+[=]"]),  # re would try 2^n ways
        lambda c: c["config_groups"]["group_0"].update(targets=None),
        lambda c: c["config_groups"]["group_0"].update(output_activations={"num_bits": 8, "type": "int"}),
        lambda c: c["config_groups"]["group_0"].update(
            input_activations={"num_bits": 8, "type": "int", "strategy": "token", "dynamic": False}
        ),
        lambda c: c["config_groups"]["group_0"].update(
            input_activations={"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": True}
        ),
        lambda c: c["config_groups"]["group_0"].update(
            input_activations={"num_bits": 4, "type": "int", "strategy": "tensor", "dynamic": "local"}
        ),
        lambda c: c.update(transform_config={"config_groups": {"rotate": {"type": "hadamard"}}}),
        lambda c: c.update(sparsity_config={"format": "sparse-24-bitmask"}),
    ],
)  # fmt: skip
def test_arguments_that_mean_something_else_are_refused(tmp_path, change):
    _, path = saved(tmp_path, "int4-g32")
    write_config(path, change)
    with pytest.raises(InputError, match="quantization_config"):
        models.load(path)


def remove(part):
    return lambda t: t.pop(f"{LAYER}.{part}")


def put(part, value):
    return lambda t: t.update({f"{LAYER}.{part}": value(t[f"{LAYER}.{part}"])})


@pytest.mark.parametrize(
    "change",
    [
        remove("weight_scale"),
        remove("weight_packed"),
        remove("weight_zero_point"),
        put("weight_scale", lambda t: t[:, :1].contiguous()),
        put("weight_scale", lambda t: t.int()),
        put("weight_scale", lambda t: t.flatten()[:0]),
        put("weight_packed", lambda t: t[:, :-1].contiguous()),
        put("weight_packed", lambda t: t[:-1].contiguous()),
        put("weight_packed", lambda t: t.float()),
        put("weight_packed", lambda t: t.flatten()),
        put("weight_packed", lambda t: t[0, 0].clone()),
        put("weight_zero_point", lambda t: t[:-1].contiguous()),
        put("weight_zero_point", lambda t: t.float()),
        put("weight_zero_point", lambda t: t.flatten()),
        put("weight_shape", lambda t: t + 1),
        put("weight_shape", lambda t: t[:1].contiguous()),
        put("weight_shape", lambda t: t.repeat(100)),
        lambda t: t.update({f"{LAYER}.weight_g_idx": torch.arange(64)}),
    ],
)  # fmt: skip
def test_broken_tensors_are_refused_by_name(tmp_path, change):
    _, path = saved(tmp_path, "uint4-g32")
    write_tensors(path, change)
    with pytest.raises(InputError, match=LAYER):
        models.load(path)


@pytest.mark.parametrize(
    ("to", "change"),
    [
        ("fp8-e4m3-channel", put("weight", lambda t: t.float())),
        ("fp8-e4m3-channel", put("weight", lambda t: t[:-1].contiguous())),
        ("fp8-e4m3-channel", remove("weight_scale")),
        ("W8A8", put("weight", lambda t: t.float())),
        ("W8A8", put("weight", lambda t: t[:-1].contiguous())),
    ],
)
def test_broken_whole_bytes_are_refused_by_name(tmp_path, to, change):
    _, path = saved(tmp_path, to)
    write_tensors(path, change)
    with pytest.raises(InputError, match=LAYER):
        models.load(path)


@pytest.mark.parametrize(
    "change",
    [
        remove("input_scale"),
        remove("input_zero_point"),
        put("input_scale", lambda t: t.repeat(2)),
        put("input_scale", lambda t: t.double()),
        put("input_scale", lambda t: -t),
        put("input_scale", lambda t: t * 0),
        put("input_scale", lambda t: t * torch.nan),
        put("input_scale", lambda t: t / 0),
        put("input_zero_point", lambda t: t.float()),
        put("input_zero_point", lambda t: t.repeat(2)),
    ],
)  # fmt: skip
def test_broken_scales_of_inputs_are_refused_by_name(tmp_path, change):
    _, path = saved_static(tmp_path, "W8A8_STATIC asymmetric")
    write_tensors(path, change)
    with pytest.raises(InputError, match=f"{LAYER}.input_"):
        models.load(path)


def test_a_scale_of_inputs_may_be_a_scalar(tmp_path):
    made, path = saved_static(tmp_path, "W8A8_STATIC")
    write_tensors(path, put("input_scale", lambda t: t[0].clone()))
    assert torch.equal(logits(models.load(path).model), logits(made.model))


def test_what_is_written_is_what_the_library_would_pack():
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    for bits in range(2, 9):
        q = kernels.quantize(torch.randn(7, 45), f"uint{bits}-channel")
        signed, zero = (t.short() - (1 << (bits - 1)) for t in (q.codes, q.parts["zero"]))
        out = container.encode("x", q)
        assert torch.equal(out["x.weight_packed"], pack_to_int32(signed.to(torch.int8), bits))
        assert torch.equal(out["x.weight_zero_point"], pack_to_int32(zero.to(torch.int8), bits, packed_dim=0))


def test_the_model_as_made_here_is_the_one_compared(tmp_path):
    """Guards the other tests: quantizing has to change the logits of this miniature."""
    float_model = make("llama-untied")
    float_model.save_pretrained(tmp_path / "m")
    assert not torch.equal(float_model(IDS).logits, logits(quantized(tmp_path / "m", "int4-g32").model))
