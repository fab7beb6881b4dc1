"""NVFP4 and MXFP4 in compressed-tensors' layout: read by transformers with that library, written by it, and back."""

from __future__ import annotations

import json

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from compressed_tensors.quantization.utils.helpers import generate_gparam
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from halfbyte import InputError, kernels, models
from halfbyte.containers import compressed_fp4
from halfbyte.containers import compressed_tensors as container
from halfbyte.formats import FORMATS
from halfbyte.layers import Codes, ops
from miniatures import folder, logits, make, quantized

PRESETS = {"NVFP4A16": "nvfp4", "MXFP4A16": "mxfp4"}
LAYER = "model.layers.0.mlp.up_proj"
MIXED = [
    {"match": "lm_head"},
    {"match": "@embedding"},
    {"match": r".*\.down_proj", "weight": "mxfp4"},
    {"match": r".*\.self_attn\..*", "weight": "int8-channel"},
    {"match": "@linear", "weight": "nvfp4"},
]


def saved(tmp_path, to, dtype=torch.bfloat16):
    """A quantized miniature and the folder that it was saved in."""
    made = quantized(folder(tmp_path / "float", "llama-untied", dtype), to)
    out = tmp_path / "quantized"
    out.mkdir()
    assert models.save(made.loaded, out) is container
    return made, out


def foreign(path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, **kwargs).eval()


def codes(model):
    return {n: op.weight.stored.q for n, op in ops(model) if isinstance(op.weight.stored, Codes)}


def by_the_library(path, preset):
    """A miniature compressed by the library's own compressor, scales by its own observers' arithmetic."""
    model = make("llama-untied", torch.bfloat16)
    scheme = preset_name_to_scheme(preset, ["Linear"])
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]))
    for m in model.modules():
        if getattr(m, "quantization_scheme", None) is None:
            continue
        args, groups = m.quantization_scheme.weights, m.weight.unflatten(-1, (-1, scheme.weights.group_size))
        whole = None
        if preset == "NVFP4A16":
            whole = generate_gparam(m.weight.min(), m.weight.max())
            m.weight_global_scale.data.copy_(whole)
        m.weight_scale.data = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=whole)[
            0
        ].bfloat16()
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(path)
    compressor.update_config(str(path))
    return path


@pytest.mark.parametrize("to", [*PRESETS, MIXED], ids=lambda to: to if isinstance(to, str) else "mixed")
@pytest.mark.usefixtures("torch_products")
def test_others_compute_the_same_logits_and_we_read_the_same_codes(tmp_path, to):
    made, path = saved(tmp_path, to)
    ours = logits(made.model)
    assert torch.equal(logits(foreign(path)), ours)
    if to is not MIXED:  # transformers 5.24 dequantizes all layers by one scheme
        assert torch.equal(logits(foreign(path, quantization_config=CompressedTensorsConfig(dequantize=True))), ours)
    again = models.load(path)
    held, read = codes(made.model), codes(again.model)
    assert held.keys() == read.keys()
    for name, q in held.items():
        assert (q.format, q.dtype) == (read[name].format, read[name].dtype)
        for part, tensor in q.tensors().items():
            assert torch.equal(tensor.view(torch.uint8), read[name].tensors()[part].view(torch.uint8)), (name, part)
    assert torch.equal(logits(again.model), ours)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.usefixtures("torch_products")
def test_a_folder_that_the_library_made(tmp_path, preset):
    path = by_the_library(tmp_path / "m", preset)
    model, theirs = models.load(path).model, foreign(path)
    expected = logits(theirs)  # from here on, its weights are floats
    found = codes(model)
    assert {q.format.name for q in found.values()} == {PRESETS[preset]}
    stored = load_file(path / "model.safetensors")
    different = total = 0
    for name, q in found.items():
        again = container.encode(name, q)
        assert again.keys() == {n for n in stored if n.startswith(f"{name}.")}
        assert all(
            torch.equal(t.view(torch.uint8), stored[n].view(torch.uint8)) for n, t in again.items() if "global" not in n
        )
        value, meant = q.dequantize(), theirs.get_submodule(name).weight
        # it divides by the stored number where we multiply by its reciprocal: 2^-24 apart, seen where bf16 turns
        torch.testing.assert_close(value, meant, rtol=2**-7, atol=0)
        different, total = different + int((value != meant).sum()), total + value.numel()
    assert different <= (0 if preset == "MXFP4A16" else total / 1000)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0 if not different else 0.02)


@pytest.mark.parametrize("f", PRESETS.values())
def test_what_is_written_is_what_the_library_decompresses(f):
    q = kernels.quantize(torch.randn(32, 64).bfloat16(), f)
    scheme = preset_name_to_scheme(f"{f}A16", ["Linear"])
    compressor = BaseCompressor.get_value_from_registry(compressed_fp4.layout(FORMATS[f]))
    tensors = {n.removeprefix("x."): t for n, t in container.encode("x", q).items()}
    assert torch.equal(compressor.decompress(tensors, scheme)["weight"], q.dequantize())


@pytest.mark.parametrize("preset", PRESETS)
def test_the_config_is_the_preset_of_that_name(tmp_path, preset):
    _, path = saved(tmp_path, preset)
    group = json.loads((path / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    known = preset_name_to_scheme(preset, ["Linear"]).model_dump(mode="json")
    known["weights"]["zp_dtype"] = group["weights"]["zp_dtype"]  # of zero points that there are none of
    assert group == {**known, "format": f"{PRESETS[preset]}-pack-quantized"}


def test_scales_of_nvfp4_are_powers_of_two_and_lose_nothing_by_it():
    w = torch.randn(64, 256)
    q = kernels.quantize(w, "nvfp4")
    outer = q.tensors()["scale.scale"]
    assert torch.frexp(outer)[0].item() == 0.5
    assert torch.equal(q.dequantize(), q.dequantize().bfloat16().float())
    assert (q.dequantize() - w).norm() < 0.1 * w.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_dtype_that_the_reader_cannot_compute_in_is_refused(tmp_path, dtype):
    made = quantized(folder(tmp_path / "float", "llama-untied", dtype), "NVFP4A16")
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="use --dtype bfloat16"):
        models.save(made.loaded, tmp_path / "out")


def test_a_scale_without_an_exact_reciprocal_is_refused():
    q = kernels.quantize(torch.randn(32, 64).bfloat16(), "nvfp4")
    inner = q.parts["scale"].parts
    inner["scale"] = torch.tensor([1.9999998807907104])
    with pytest.raises(InputError, match=r"x: compressed-tensors keeps a scale's reciprocal"):
        container.encode("x", q)


# ---- reading what others wrote, well or badly


def group(**changes):
    return lambda c: c["config_groups"]["group_0"].update(changes)


def weights(**changes):
    return lambda c: c["config_groups"]["group_0"]["weights"].update(changes)


FP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": "local"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (group(input_activations=FP4), "rounds inputs"),
        (group(input_activations={**FP4, "dynamic": True}), "rounds inputs to FP4"),
        (group(input_activations={**FP4, "strategy": "group", "group_size": 32, "dynamic": True}), "inputs to FP4"),
        (weights(group_size=32), "none that halfbyte knows"),
        (weights(strategy="group"), "none that halfbyte knows"),
        (weights(symmetric=False), "none that halfbyte knows"),
        (weights(num_bits=8), "none that halfbyte knows"),
        (weights(type="int"), "none that halfbyte knows"),
    ],
)
def test_arguments_that_mean_something_else_are_refused(tmp_path, change, words):
    _, path = saved(tmp_path, "NVFP4A16")
    config = json.loads((path / "config.json").read_text())
    change(config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=words):
        models.load(path)


def put(part, value):
    return lambda t: t.update({f"{LAYER}.{part}": value(t[f"{LAYER}.{part}"])})


BROKEN = [
    put("weight_packed", lambda t: t[:-1].contiguous()),
    put("weight_packed", lambda t: t.view(torch.int8)),
    put("weight_packed", lambda t: t.flatten()),
    lambda t: t.pop(f"{LAYER}.weight_packed"),
    put("weight_scale", lambda t: t[:, 1:].contiguous()),
    put("weight_scale", lambda t: t.float()),
    put("weight_scale", lambda t: t.view(torch.float8_e5m2)),
]
GLOBAL = [
    put("weight_global_scale", lambda t: t * 0),
    put("weight_global_scale", lambda t: -t),
    put("weight_global_scale", lambda t: t * torch.nan),
    put("weight_global_scale", lambda t: t * torch.inf),
    put("weight_global_scale", lambda t: t * 0 + 1e-40),  # whose reciprocal is infinite
    put("weight_global_scale", lambda t: t.repeat(2)),
    put("weight_global_scale", lambda t: t.double()),
    lambda t: t.pop(f"{LAYER}.weight_global_scale"),
]


@pytest.mark.parametrize(
    ("preset", "change"), [(p, c) for p in PRESETS for c in BROKEN] + [("NVFP4A16", c) for c in GLOBAL]
)
def test_broken_tensors_are_refused_by_name(tmp_path, preset, change):
    _, path = saved(tmp_path, preset)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=LAYER):
        models.load(path)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_the_scale_of_the_tensor_may_be_a_scalar(shape):
    q = kernels.quantize(torch.randn(32, 64).bfloat16(), "nvfp4")
    tensors = container.encode("x", q)
    tensors["x.weight_global_scale"] = tensors["x.weight_global_scale"].reshape(shape)
    again = container.decode("x", FORMATS["nvfp4"], (32, 64), tensors.__getitem__)
    assert torch.equal(again.dequantize(), q.dequantize())
