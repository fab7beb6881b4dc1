"""ONNX files, in onnxruntime: the same logits as the model's, with a cache, in batches, in floats and in codes."""

from __future__ import annotations

import re

import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper

import miniatures
from halfbyte import data, export, kernels, kinds, models
from halfbyte.errors import BudgetExceeded, InputError
from halfbyte.formats import parse
from halfbyte.kinds import onnx as kind
from halfbyte.layers import Codes, Linear, ops
from halfbyte.model import load
from halfbyte.models import onnx_graph, onnx_saving, onnx_weights
from halfbyte.qtensor import QTensor, unpack

TEXT = data.records([{"text": "The quick brown fox jumps over the lazy dog. " * 8}])
IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(1))
_HALF = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
STRONG = {"initializer_range": 0.2}  # tokens look at each other, and not at all alike
WEAK = {"initializer_range": 0.02}  # what rounds the other way is not heard far
ALL = {
    "llama": ("llama", {}),
    "llama-untied": ("llama-untied", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {}),
    "mistral-window": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "phi3": ("phi3", {}),
    "phi3-half": ("phi3", {"rope_parameters": _HALF, "sliding_window": 7}),
    "gemma3": ("gemma3", {"layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 9}),
    "gpt2": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "one-key": ("llama", {"num_key_value_heads": 1}),
}


def made(path, name="llama", dtype=torch.float32, format=None, requantize=False, **own):
    """A miniature's folder, and the job of exporting it."""
    miniature, settings = ALL.get(name, (name, {}))
    base = miniatures.folder(path / "base", miniature, dtype, **{**STRONG, **settings, **own})
    return base, export.prepare(export.read(base), kind, format, requantize)


def opened(job, path, check=True):
    kind.write(job, path / "m.onnx")
    if check:
        onnx.checker.check_model(str(path / "m.onnx"), full_check=True)
    return kind.open(path / "m.onnx", 64)


@torch.no_grad()
def logits(model, ids=IDS, **given):
    return model(input_ids=ids, **given).logits


def initializers(path):
    return {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in onnx.load(path).graph.initializer}


def close(a, b, within):
    torch.testing.assert_close(a, b, rtol=0, atol=within)


def agree(found, wanted, format):
    """To the last digits; but inputs that are rounded may fall on the other side of a step, here and there."""
    if format == "W8A8":
        assert (found - wanted).abs().mean() < 1e-3
        assert (found - wanted).abs().max() < 2e-2
    else:
        close(found, wanted, 1e-3)


@pytest.mark.parametrize("name", ALL)
def test_logits_of_floats(tmp_path, name):
    base, job = made(tmp_path, name)
    reader = opened(job, tmp_path)
    wanted = logits(models.load(base).model)
    assert wanted.std() > 0.5
    close(logits(reader), wanted, 1e-4)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 64},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_rotary_scaling(tmp_path, rope):
    base, job = made(tmp_path, rope_parameters={"rope_theta": 1e3, **rope}, max_position_embeddings=512)
    positions = torch.arange(24).repeat(2, 1) + 300
    close(
        logits(opened(job, tmp_path), position_ids=positions),
        logits(models.load(base).model, position_ids=positions), 1e-4,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3", "gpt2"])
def test_the_cache_gives_what_the_whole_gives(tmp_path, name):
    _, job = made(tmp_path, name)
    reader = opened(job, tmp_path)
    whole, found, past = logits(reader), [], None
    for start, end in [(0, 7), (7, 12), *((i, i + 1) for i in range(12, 24))]:
        out = reader(IDS[:, start:end], past_key_values=past)
        past = out.past_key_values
        found.append(out.logits)
    close(torch.cat(found, 1), whole, 1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3", "gpt2"])
def test_rows_of_a_batch_do_not_see_what_fills_them(tmp_path, name):
    _, job = made(tmp_path, name)
    reader = opened(job, tmp_path)
    left, right = torch.ones(2, 24).long(), torch.ones(2, 24).long()
    left[1, :9] = 0
    right[1, 15:] = 0
    single = logits(reader, IDS[1:, 9:]), logits(reader, IDS[1:, :15])
    close(logits(reader, attention_mask=left)[1:, 9:], single[0], 1e-4)
    close(logits(reader, attention_mask=right)[1:, :15], single[1], 1e-4)
    close(logits(reader, attention_mask=left)[:1], logits(reader, IDS[:1]), 1e-4)
    whole = reader(IDS[:, :20], left[:, :20])
    after = reader(IDS[:, 20:], left, past_key_values=whole.past_key_values)
    close(after.logits[1:], single[0][:, -4:], 1e-4)


CODES = ["W4A16", "W4A16_ASYM", "W8A16", "int4-g32", "int4-g16", "uint4-g64-affine", "uint8-g64-affine", "q4_1",
         "int4-channel", "uint8-channel", "int8-tensor", "W8A8"]  # fmt: skip


@pytest.mark.parametrize("format", CODES)
def test_logits_of_codes(tmp_path, format):
    _, job = made(tmp_path, "llama", format=format, **(WEAK if format == "W8A8" else STRONG))
    reader = opened(job, tmp_path, check=format == "W4A16")
    agree(logits(reader), logits(kind.ours(job).model), format)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("format", ["W4A16", "uint4-g64-affine", "W8A8"])
def test_one_product(tmp_path, format, dtype):
    """To float rounding, inputs in 8 bits and all: tokens of zeros, large and small ones among them."""
    _, job = made(tmp_path, dtype=dtype, format=format)
    graph, name = onnx_saving.Graph(dtype), "model.layers.0.mlp.up_proj"
    weights = onnx_weights.Weights(graph, job.loaded, job.formats, False)
    to = onnx_saving.TYPES[dtype]
    graph.inputs.append(helper.make_tensor_value_info("x", to, ("rows", "tokens", 64)))
    graph.outputs.append(helper.make_tensor_value_info("y", to, None))
    graph("Identity", weights.linear(name, "x"), output="y")
    graph.write(tmp_path / "m.onnx")
    x = torch.randn(2, 50, 64) * torch.logspace(-3, 1, 50)[:, None]
    x[0, 0] = 0
    x[:, :, 7] *= 20
    x = x.to(dtype)
    (y,) = onnxruntime.InferenceSession(tmp_path / "m.onnx").run(None, {"x": x.numpy()})
    with torch.no_grad():
        wanted = dict(ops(job.loaded.model))[name](x).float()
    error = (torch.from_numpy(y).float() - wanted).norm(dim=-1)
    assert (error <= (1e-6 if dtype == torch.float32 else 1e-3) * wanted.norm(dim=-1)).all()


@pytest.mark.parametrize("format", ["int4-channel", "uint4-channel-affine", "int8-channel", "W8A8"])
def test_rows_that_no_block_divides(tmp_path, format):
    own = {"hidden_size": 72, "intermediate_size": 100, "num_hidden_layers": 1}
    _, job = made(tmp_path, "llama", format=format, **own, **WEAK)
    agree(logits(opened(job, tmp_path)), logits(kind.ours(job).model), format)


@pytest.mark.parametrize("name", ["qwen2", "phi3", "gemma3", "gpt2"])
@pytest.mark.parametrize("format", ["W4A16", "W8A8"])
def test_other_architectures_in_codes(tmp_path, name, format):
    base, job = made(tmp_path, name, format=format, **(WEAK if format == "W8A8" else STRONG))
    agree(logits(opened(job, tmp_path)), logits(load(base).quantize(format, solver="rtn").model), format)


@pytest.mark.parametrize("format", ["W4A16", "W4A16_ASYM", "W8A16", "W8A8"])
def test_codes_and_scales_are_those_of_the_folder(tmp_path, format):
    """Bit for bit."""
    base, _ = made(tmp_path, **WEAK)
    small = load(base).quantize(format, solver="rtn").save(tmp_path / "small")
    said = []
    job = export.prepare(export.read(small), kind, None, False, said.append)
    assert said[0] == "14 weights are carried over: codes and scales unchanged"
    opened(job, tmp_path, check=False)
    there, n = initializers(tmp_path / "m.onnx"), 0
    for name, op in ops(models.load(small).model):
        if isinstance(op.weight.stored, Codes):
            q, codes = op.weight.frozen(), there[f"{name}.codes"]
            found = codes.T if format == "W8A8" else unpack(codes.flatten(1), q.format.bits, q.shape[1])
            assert torch.equal(found, q.codes)
            assert torch.equal(there[f"{name}.scale"], q.qparams.scale.flatten())
            n += 1
    assert n == 14
    agree(logits(kind.open(tmp_path / "m.onnx", 64)), logits(load(small).model), format)


def test_longer_groups_repeat_their_scales():
    q = QTensor(parse("int4-g512"), (2, 1024), torch.float32, {
        "codes": torch.arange(1024).to(torch.uint8).reshape(2, 512), "scale": torch.tensor([[1.0, 2], [3, 4]]),
    })  # fmt: skip
    found = onnx_weights.blocks(q)
    assert found["scale"].tolist() == [1, 1, 2, 2, 3, 3, 4, 4]
    assert torch.equal(found["codes"].flatten(1), q.parts["codes"])


@pytest.mark.parametrize("format", ["q8_0", "q4_0", "q4_1", "uint4-g64-affine", "int8-channel"])
def test_embeddings_in_codes_are_looked_up(tmp_path, format):
    """As ggml's and MLX's files have them, for which the head is one too."""
    base, _ = made(tmp_path)
    source = export.read(base)
    embedding = dict(ops(source.model))["model.embed_tokens"]
    embedding.weight.freeze(kernels.quantize(models.load(base).model.model.embed_tokens.weight.value(), format))
    job = export.prepare(source, kind, None, False)
    reader = opened(job, tmp_path)
    assert [n for n in initializers(tmp_path / "m.onnx") if "lm_head" in n or "embed_tokens.weight" in n] == []
    close(logits(reader), logits(kind.ours(job).model), 1e-3)


def test_a_tied_head_is_there_once(tmp_path):
    _, job = made(tmp_path, vocab_size=200)
    opened(job, tmp_path)
    held = [n for n, t in initializers(tmp_path / "m.onnx").items() if t.numel() == 200 * 64]
    assert held == ["model.embed_tokens.weight"]


def test_half_precision(tmp_path):
    base, job = made(tmp_path, "gemma3", format="F16")
    reader = opened(job, tmp_path)
    given = {i.name: i.type for i in reader.session.get_inputs()}
    assert given["past_key_values.0.key"] == "tensor(float16)"
    close(logits(reader), logits(models.load(base).model), 0.1)
    floats = {t.dtype for n, t in initializers(tmp_path / "m.onnx").items() if n.endswith("proj.weight")}
    assert floats == {torch.float16}


@pytest.mark.parametrize("format", ["W4A16", "uint4-g64-affine", "W8A8"])
def test_codes_in_half_precision(tmp_path, format):
    base, job = made(tmp_path, dtype=torch.float16, format=format, **WEAK)
    reader = opened(job, tmp_path)
    there = initializers(tmp_path / "m.onnx")
    scale = there["model.layers.0.mlp.up_proj.scale"]
    assert scale.dtype == (torch.float16 if format == "W4A16" else torch.float32)
    assert torch.equal(scale, scale.half().to(scale.dtype))
    assert (logits(reader) - logits(kind.ours(job).model)).abs().mean() < 0.01 * logits(models.load(base).model).std()


def test_what_readers_do_otherwise_is_said(tmp_path):
    _, job = made(tmp_path, format="W8A8")
    assert [r.partition(":")[0] for r in kind.remarks(job)[1:]] == ["inputs are rounded to 8 bits"]
    for format, more in (("W4A16", []), ("W8A16", ["products of floats with codes of 8 bits need onnxruntime 1.23"])):
        said = kind.remarks(export.prepare(export.read(tmp_path / "base"), kind, format, False))
        assert [r.partition(" or later")[0] for r in said[1:]] == more


def test_bfloat16_becomes_float32(tmp_path):
    _, job = made(tmp_path, dtype=torch.bfloat16, format="W4A16")
    assert any(r.startswith("bfloat16 is written as float32") for r in kind.remarks(job))
    close(logits(opened(job, tmp_path)), logits(kind.ours(job).model), 1e-3)
    with pytest.raises(InputError, match="choose F32 or F16"):
        export.prepare(export.read(tmp_path / "base"), kind, "BF16", False)


@pytest.mark.parametrize(("format", "to"), [("W4A16", None), ("W8A8", None), (None, torch.bfloat16), ("F16", None)])
def test_the_file_is_measured(tmp_path, format, to):
    base = miniatures.folder(tmp_path / "base", "qwen3", to or torch.float32, words=miniatures.bpe())
    job = export.prepare(export.read(base), kinds.kind(None, tmp_path / "m.onnx"), format, False)
    done = export.export(base, job, kind, tmp_path / "m.onnx", export.Proof(TEXT, 2, 64))
    (ours, first), (before, second) = done.rows
    assert (ours, before) == ("read back, against halfbyte", "read back, against base")
    assert abs(first["kl_mean"]) < (1e-4 if format == "F16" else 1e-6)
    assert abs(second["kl_mean"]) < 0.02
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "m.ledger.json", "m.onnx"]


def test_codes_on_another_grid_are_made_anew(tmp_path):
    """Those that a scheme keeps become floats."""
    base, _ = made(tmp_path, vocab_size=96, hidden_size=256, intermediate_size=256)
    source = export.read(base)
    to_gguf = export.prepare(source, kinds.KINDS["gguf"], "Q4_K_M", False)
    export.export(base, to_gguf, kinds.KINDS["gguf"], tmp_path / "m.gguf", None)
    with pytest.raises(InputError, match="add --requantize to make them int4-g128"):
        export.prepare(export.read(tmp_path / "m.gguf"), kind, "W4A16", False)
    job = export.prepare(export.read(tmp_path / "m.gguf"), kind, "W4A16", True)
    reader = opened(job, tmp_path)
    assert initializers(tmp_path / "m.onnx")["model.embed_tokens.weight"].shape == (96, 256)
    close(logits(reader, IDS % 96), logits(kind.ours(job).model, IDS % 96), 1e-3)


@pytest.mark.parametrize("format", ["F32", "F16"])
def test_codes_become_floats_when_asked(tmp_path, format):
    base, _ = made(tmp_path)
    small = load(base).quantize("W8A8", solver="rtn").save(tmp_path / "small")
    job = export.prepare(export.read(small), kind, format, True)
    reader, ours = opened(job, tmp_path), kind.ours(job)
    assert not any(isinstance(op, Linear) and op.input for _, op in ops(ours.model))
    close(logits(reader), logits(ours.model), 1e-3 if format == "F32" else 0.1)


@pytest.mark.parametrize(
    ("name", "own", "format", "words"),
    [
        ("neox", {}, None, "GPTNeoXForCausalLM is not written to ONNX yet; LlamaForCausalLM,"),
        ("gemma3", {"final_logit_softcapping": 30.0}, None, "with final_logit_softcapping = 30.0 is not"),
        ("gemma3", {"use_bidirectional_attention": True}, None, "use_bidirectional_attention = True is not"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, None,
         "rotary scaling of type dynamic"),
        ("llama", {"hidden_act": "tanh"}, None, "the activation tanh"),
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, None, "layers of type chunked_attention"),
        ("llama", {}, "NF4", "no product for nf4-g64"),
        ("llama", {}, "FP8A16", "no product for fp8-e4m3-channel"),
        ("llama", {}, "Q4_K_M", "no product for q5_0"),
        ("llama", {}, "int4-g8", "its groups are no multiple of 16"),
        ("llama", {}, "W3A16", "no product for int3-g64"),
        ("llama", {}, "W4A8", "multiplied with int8-channel alone, not with int4-g64"),
        ("llama", {}, "FP8", "no product for fp8"),
    ],
)  # fmt: skip
def test_what_the_graph_cannot_say_is_refused_before_the_work(tmp_path, name, own, format, words):
    with pytest.raises(InputError, match=rf"cannot be written as onnx: .*{re.escape(words)}"):
        made(tmp_path, name, format=format, **own)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


# ---- static inputs


def rules(input):
    return [{"match": "@embedding"}, {"match": "@head"}, {"match": ".*", "weight": "int8-channel", "input": input}]


def static(path, input="int8-tensor", dtype=torch.float32, name="llama", **own):
    """The folder of a miniature that was calibrated, and the job of exporting it."""
    base = miniatures.folder(path / "base", name, dtype, words=True, **{**WEAK, **own})
    to = "W8A8_STATIC" if input == "int8-tensor" else rules(input)
    (path / "small").mkdir()
    miniatures.calibrated(base, to).write(path / "small", "small")
    return path / "small", export.prepare(export.read(path / "small"), kind, None, False)


def optimized(path):
    """What onnxruntime makes of a file: (the operator, its inputs' types) of each node."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(path.with_suffix(".opt")), 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [n.op_type for n in onnx.load(path.with_suffix(".opt")).graph.node]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "gpt2"])
@pytest.mark.parametrize("input", ["int8-tensor", "uint8-tensor"])
def test_static_inputs(tmp_path, name, input):
    """GPT-2, which compressed-tensors does not hold, is exported from memory."""
    if name == "gpt2":
        base = miniatures.folder(tmp_path / "base", name, words=True, **WEAK)
        made = miniatures.calibrated(base, "W8A8_STATIC" if input == "int8-tensor" else rules(input))
        small, job = None, export.prepare(made.loaded, kind, None, False)
    else:
        small, job = static(tmp_path, input, name=name)
    reader = opened(job, tmp_path)
    agree(logits(reader), logits(kind.ours(job).model), "W8A8")
    if small is not None:
        agree(logits(reader), logits(load(small).model), "W8A8")


def test_static_products_are_those_of_integers(tmp_path):
    """All that have static inputs, also where several share them, as q, k and v do."""
    small, job = static(tmp_path)
    opened(job, tmp_path)
    nodes = optimized(tmp_path / "m.onnx")
    assert nodes.count("MatMulIntegerToFloat") == 14
    assert nodes.count("QuantizeLinear") == 8  # a block: before attention, its output, before the MLP, its product
    assert "DequantizeLinear" not in nodes
    there = initializers(tmp_path / "m.onnx")
    for name, op in ops(models.load(small).model):
        if isinstance(op, Linear) and op.input:
            q, codes = op.weight.frozen(), there[f"{name}.codes"]
            assert codes.dtype == torch.int8
            assert torch.equal((codes.T.short() + 128).to(torch.uint8), q.codes)
            assert torch.equal(there[f"{name}.scale"], q.qparams.scale.flatten())
            assert any(t.shape == () and torch.equal(t, op.input_scale[0]) for t in there.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("input", ["int8-tensor", "uint8-tensor"])
def test_one_static_product(tmp_path, input, dtype):
    """To float rounding, clipped inputs among them."""
    _, job = static(tmp_path, input, dtype)
    graph, name = onnx_saving.Graph(dtype), "model.layers.0.mlp.up_proj"
    weights = onnx_weights.Weights(graph, job.loaded, job.formats, False)
    graph.inputs.append(helper.make_tensor_value_info("x", onnx_saving.TYPES[dtype], ("rows", "tokens", 64)))
    graph.outputs.append(helper.make_tensor_value_info("y", onnx_saving.TYPES[dtype], None))
    graph("Identity", weights.linear(name, "x"), output="y")
    graph.write(tmp_path / "m.onnx")
    op = dict(ops(job.loaded.model))[name]
    x = (torch.randn(2, 50, 64) * 1.5).to(dtype)
    x[0, :3] = torch.tensor([0, 1e3, -1e3])[:, None]
    (y,) = onnxruntime.InferenceSession(tmp_path / "m.onnx").run(None, {"x": x.numpy()})
    with torch.no_grad():
        wanted = op(x).float()
    error = (torch.from_numpy(y).float() - wanted).norm(dim=-1)
    assert (error <= (1e-6 if dtype == torch.float32 else 1e-3) * wanted.norm(dim=-1)).all()


def test_ops_that_share_inputs_may_have_scales_of_their_own(tmp_path):
    _, job = static(tmp_path)
    key = dict(ops(job.loaded.model))["model.layers.0.self_attn.k_proj"]
    key.input_scale *= 0.2
    reader = opened(job, tmp_path)
    assert optimized(tmp_path / "m.onnx").count("QuantizeLinear") == 9
    agree(logits(reader), logits(kind.ours(job).model), "W8A8")


def test_a_float_model_is_calibrated_before_it_is_exported(tmp_path):
    """At once, or refused before anything is written."""
    base = miniatures.folder(tmp_path / "base", words=True, **WEAK)
    job = export.job(export.read(base), kind, "W8A8_STATIC", False)
    with pytest.raises(InputError, match=r"no scale for the inputs of model.* found on text: add --calibration FILE"):
        export.export(base, job, kind, tmp_path / "m.onnx", None)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
    found = export.Found(calibration=TEXT, inputs="mse")
    job = export.job(export.read(base), kind, "W8A8_STATIC", False, found)
    done = export.export(base, job, kind, tmp_path / "m.onnx", export.Proof(TEXT, 2, 64))
    assert abs(done.rows[0][1]["kl_mean"]) < 1e-6
    assert 0 < done.rows[1][1]["kl_mean"] < 0.02


def test_static_inputs_become_floats_when_asked(tmp_path):
    small, _ = static(tmp_path)
    job = export.prepare(export.read(small), kind, "F32", True)
    reader, ours = opened(job, tmp_path), kind.ours(job)
    assert not any(isinstance(op, Linear) and op.input for _, op in ops(ours.model))
    close(logits(reader), logits(ours.model), 1e-3)


def test_what_static_inputs_ask_of_readers_is_said(tmp_path):
    _, job = static(tmp_path)
    assert [r for r in kind.remarks(job) if "session.x64quantprecision is set to 1" in r]


@pytest.mark.parametrize(
    ("weight", "input", "words"),
    [
        ("int4-g32", "int8-tensor", "multiplied with int8-channel alone, not with int4-g32"),
        ("int8-channel", "int4-tensor", "only int8-token, int8-tensor and uint8-tensor are written"),
        ("int8-channel", "fp8-e4m3-tensor", "only int8-token, int8-tensor and uint8-tensor are written"),
        ("int8-channel", "uint8-token", "only int8-token, int8-tensor and uint8-tensor are written"),
    ],
)
def test_other_inputs_are_refused(weight, input, words):
    assert words in onnx_weights.refuses(parse(weight), 64, parse(input))


# ---- more weights than a file holds


@pytest.fixture
def narrow(monkeypatch):
    """Files that hold less than a miniature."""
    monkeypatch.setattr(onnx_saving, "LARGEST", 50_000)


@pytest.mark.parametrize("format", [None, "F16", "W4A16_ASYM", "W8A8"])
@pytest.mark.usefixtures("narrow")
def test_weights_in_a_second_file(tmp_path, format):
    """The same bytes, each weight at a page of its own."""
    _, job = made(tmp_path, format=format, **WEAK)
    job.loaded.checkpoint.materialize(job.loaded.model, torch.float32)
    found = logits(opened(job, tmp_path))
    outside = {t.name: t for t in onnx.load(tmp_path / "m.onnx", load_external_data=False).graph.initializer}
    entries = {n: {e.key: e.value for e in t.external_data} for n, t in outside.items() if t.external_data}
    assert {e["location"] for e in entries.values()} == {"m.onnx.data"}
    assert not any(int(e["offset"]) % 4096 for e in entries.values())
    assert (tmp_path / "m.onnx").stat().st_size < 60_000
    graph = onnx_graph.build(job.loaded, job.formats, job.floats)
    graph.largest = 10**9
    graph.write(tmp_path / "one.onnx")
    assert sorted(p.name for p in tmp_path.glob("*.data")) == ["m.onnx.data"]
    one, two = initializers(tmp_path / "one.onnx"), initializers(tmp_path / "m.onnx")
    assert one.keys() == two.keys()
    assert len(entries) == sum(len(heads) for heads, _ in graph.weights)
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert torch.equal(found, logits(kind.open(tmp_path / "one.onnx", 64)))


@pytest.mark.usefixtures("narrow")
def test_both_files_are_measured_and_replaced_together(tmp_path, monkeypatch):
    tokenizer = miniatures.bpe()
    base = miniatures.folder(tmp_path / "base", "qwen3", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(base)
    out = tmp_path / "m.onnx"

    def write(format, overwrite=True, proof=None):
        job = export.job(export.read(base), kind, format, False)
        return export.export(base, job, kind, out, proof, overwrite)

    done = write("W4A16", False, export.Proof(TEXT, 2, 64))
    assert abs(done.rows[0][1]["kl_mean"]) < 1e-6
    assert done.rows[0][1]["bytes"] == out.stat().st_size + (tmp_path / "m.onnx.data").stat().st_size
    assert any("NAME.data" in r for r in kind.remarks(export.job(export.read(base), kind, None, False)))
    there = sorted(p.name for p in tmp_path.iterdir())
    assert there == ["base", "m.ledger.json", "m.onnx", "m.onnx.data"]
    before = {p: p.read_bytes() for p in (out, tmp_path / "m.onnx.data")}
    with pytest.raises(InputError, match="--overwrite"):
        write("W8A16", False)
    with pytest.raises(BudgetExceeded):
        write("W8A16", True, export.Proof(TEXT, 2, 64, max_kl=-1.0))
    assert {p: p.read_bytes() for p in before} == before
    write("W8A16")
    assert sorted(p.name for p in tmp_path.iterdir()) == there
    assert all(p.read_bytes() != bytes_ for p, bytes_ in before.items())
    kind.open(out, 64)
    monkeypatch.setattr(onnx_saving, "LARGEST", 10**9)
    write("W8A16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "m.ledger.json", "m.onnx"]
    kind.open(out, 64)


def test_parameters_without_a_place_are_refused(tmp_path):
    _, job = made(tmp_path)
    job.loaded.model.model.register_parameter("extra", torch.nn.Parameter(torch.ones(3)))
    assert kind.refuses(job) == "the graph of LlamaForCausalLM has no place for model.extra"
