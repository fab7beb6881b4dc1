"""The peers, one function each: (w, copies) -> the weight as that library holds it, so many times in memory.

w is bfloat16 (out, in). A peer that is not installed, or cannot take the shape, raises, and the reason is reported.
Those that multiply by rounding inputs to 8 bits say "int8 inputs"; halfbyte's `linear` never does that on its own.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from race import Call
from torch import Tensor
from torch.nn.functional import linear

Products = Callable[
    [Tensor], Sequence[Call]
]  # an input -> a call a copy (or one call for all), each giving the product


@dataclass
class Weights:
    """One weight, several times in memory.

    nbytes: of one copy, as the peer stores it. reference: what products must come to, up to the tolerance (relative,
    in norm). sees: the input as the kernel gets it, where it is rounded on the way. at_once: all copies in one call.
    """

    family: str
    nbytes: int
    copies: int
    reference: Tensor
    tolerance: float
    linear: Products
    linear_grad: Products | None = None
    at_once: bool = False
    kind: str = "peer"
    sees: Callable[[Tensor], Tensor] = field(default=lambda x: x)


Builder = Callable[[Tensor, int], Weights]
# A peer's product is held against the weight before it was quantized, so the tolerance is the quantization's own error
# on Gaussian weights (4 bits 0.1, 8 bits and inputs of 8 bits 0.01) with room; a wrong layout gives 1 or more.
TOLERANCE = {"4-bit": 0.2, "8-bit": 0.03, "16-bit": 0.01}


def _grouped(w: Tensor, group: int, bits: int = 4) -> tuple[Tensor, Tensor]:
    """Codes 0 .. 2^bits-1 of (out, groups, group) and the scales (out, groups, 1), symmetric around 2^(bits-1)."""
    if w.shape[1] % group:
        raise ValueError(f"groups of {group} do not divide {w.shape[1]} inputs")
    middle = 1 << (bits - 1)
    rows = w.float().unflatten(1, (-1, group))
    scale = rows.abs().amax(-1, keepdim=True) / (middle - 0.5)
    return (rows / scale).round().clamp(-middle, middle - 1) + middle, scale


def torch_float(dtype: torch.dtype, w: Tensor, copies: int) -> Weights:
    """No quantization: F.linear, and its gradient, in bfloat16 (oneDNN) or float32 (MKL)."""
    ws = [w.to(dtype, copy=True) for _ in range(copies)]

    def products(x: Tensor) -> Sequence[Call]:
        return [partial(linear, x.to(dtype), v) for v in ws]

    def grads(dy: Tensor) -> Sequence[Call]:
        return [partial(torch.matmul, dy.to(dtype), v) for v in ws]

    return Weights("16-bit", ws[0].nbytes, copies, w, TOLERANCE["16-bit"], products, grads)


def torch_int4(group: int, w: Tensor, copies: int) -> Weights:
    """_weight_int4pack_mm_for_cpu: bfloat16 inputs, a bfloat16 scale and zero a group."""
    codes, scale = _grouped(w, group)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes.flatten(1).int(), 1)
    scales = torch.stack((scale[..., 0].T, torch.zeros_like(scale[..., 0].T)), -1).bfloat16().contiguous()
    parts = [(packed.clone(), scales.clone()) for _ in range(copies)]

    def products(x: Tensor) -> Sequence[Call]:
        return [partial(torch._weight_int4pack_mm_for_cpu, x, p, group, s) for p, s in parts]

    return Weights("4-bit", packed.nbytes + scales.nbytes, copies, w, TOLERANCE["4-bit"], products)


def torch_int8(w: Tensor, copies: int) -> Weights:
    """_weight_int8pack_mm: bfloat16 inputs, a scale a row."""
    codes, scale = _grouped(w, w.shape[1], 8)
    packed, scales = (codes.flatten(1) - 128).to(torch.int8), scale.flatten().bfloat16()
    parts = [(packed.clone(), scales.clone()) for _ in range(copies)]

    def products(x: Tensor) -> Sequence[Call]:
        return [partial(torch._weight_int8pack_mm, x, p, s) for p, s in parts]

    return Weights("8-bit", packed.nbytes + scales.nbytes, copies, w, TOLERANCE["8-bit"], products)


def dynamic_int8(engine: str, w: Tensor, copies: int) -> Weights:
    """torch's dynamic quantization, what quantize_dynamic makes of a Linear: float32 in and out, int8 inside."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch wants to drop it; it is its fastest CPU path all the same
            scale = w.float().abs().amax(1) / 127
            zero = torch.zeros(len(scale), dtype=torch.long)
            codes = torch.quantize_per_channel(w.float(), scale, zero, 0, torch.qint8)
        packed = [torch.ops.quantized.linear_prepack(codes, None) for _ in range(copies)]
    finally:
        torch.backends.quantized.engine = before

    def products(x: Tensor) -> Sequence[Call]:
        return [partial(torch.ops.quantized.linear_dynamic, x.float(), p, False) for p in packed]

    return Weights("8-bit", w.numel() + 8 * w.shape[0], copies, w, TOLERANCE["8-bit"], products)


def bitsandbytes_nf4(w: Tensor, copies: int) -> Weights:
    """Linear4bit on bfloat16, on its packed CPU path where the machine has AVX512-BF16.

    Its backward multiplies by dequantize_4bit of the weight, as is done here from a weight not packed.
    """
    import bitsandbytes as bnb
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    layer = bnb.nn.Linear4bit(w.shape[1], w.shape[0], bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    held: dict[str, Any] = {"requires_grad": False, "quant_type": "nf4", "compress_statistics": False}
    layer.weight = bnb.nn.Params4bit(w.clone(), **held)
    layer = layer.to("cpu").eval()
    packed, state = quantize_4bit(w, blocksize=64, quant_type="nf4")
    layer(w[:1])  # packs
    layers = [copy.deepcopy(layer) for _ in range(copies)]

    def products(x: Tensor) -> Sequence[Call]:
        return [partial(one, x) for one in layers]

    def grads(dy: Tensor) -> Sequence[Call]:
        def one(p: Tensor, s: object) -> Tensor:
            return dy @ dequantize_4bit(p, s)  # pyright: ignore[reportArgumentType]

        return [partial(one, packed.clone(), copy.deepcopy(state)) for _ in range(copies)]

    weight: Any = layer.weight
    nbytes = packed.nbytes + weight.quant_state.absmax.nbytes
    return Weights("4-bit", nbytes, copies, w, TOLERANCE["4-bit"], products, grads)


def bitsandbytes_hub(w: Tensor, copies: int) -> Weights:
    """The same where it has found its other kernel, which it fetches from a model hub by the package `kernels`."""
    from bitsandbytes.backends.cpu import ops

    if getattr(ops, "gemm_4bit_forward_kernel", None) is None:
        raise ImportError("bitsandbytes could not fetch kernels-community/quantization-bitsandbytes from the hub")
    return bitsandbytes_nf4(w, copies)


def _of_its_own(array: NDArray[Any], number: int, of: int) -> NDArray[Any]:
    own = array.copy()
    if number < of:
        own.reshape(-1).view("u1")[number] ^= 1
    return own


def onnxruntime(bits: int, block: int, accuracy: int, w: Tensor, copies: int) -> Weights:
    """MatMulNBits: float32 inputs as they are (accuracy_level 1) or rounded to int8 in blocks (4). A node a copy in
    one model, so that the call of a session counts once for all of them.

    Each differs from the others in one value: of those that are equal a session keeps one, and its reading would be a
    cache's. The last, whose product is checked, is as it should be."""
    import onnxruntime as ort
    from onnx import TensorProto, helper

    codes, scale = _grouped(w, block, bits)
    codes = codes.to(torch.uint8)
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4) if bits == 4 else codes
    parts = {"b": (packed.numpy(), TensorProto.UINT8), "s": (scale[..., 0].contiguous().numpy(), TensorProto.FLOAT)}
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    declared, nodes, outputs, values = [], [], [], {}
    for i in range(copies):
        for name, (array, kind) in parts.items():
            # data that is handed over below; inside of the model it would have to be serialized, and 2 GB is the most
            tensor = TensorProto(name=f"{name}{i}", data_type=kind, dims=array.shape)
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="memory")
            declared.append(tensor)
            values[tensor.name] = ort.OrtValue.ortvalue_from_numpy(_of_its_own(array, 1 + i, copies))
        attributes: dict[str, Any] = {
            "K": w.shape[1],
            "N": w.shape[0],
            "bits": bits,
            "block_size": block,
            "accuracy_level": accuracy,
        }
        inputs = ["x", f"b{i}", f"s{i}"]
        nodes.append(helper.make_node("MatMulNBits", inputs, [f"y{i}"], domain="com.microsoft", **attributes))
        outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ("m", w.shape[0])))
    operand = helper.make_tensor_value_info("x", TensorProto.FLOAT, ("m", w.shape[1]))
    graph = helper.make_graph(nodes, "products", [operand], outputs, declared)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options.add_external_initializers(list(values), list(values.values()))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def products(x: Tensor) -> Sequence[Call]:
        feeds = {"x": x.float().numpy()}
        return [lambda: torch.from_numpy(session.run(outputs[-1:], feeds)[0])]

    outputs = [o.name for o in outputs]
    family = f"{bits}-bit"
    nbytes = sum(array.nbytes for array, _ in parts.values())
    return Weights(family, nbytes, copies, w, TOLERANCE[family], products, at_once=True)


def ggml(kind: str, repack: bool, w: Tensor, copies: int) -> Weights:
    """ggml_mul_mat, from the order of a GGUF file or as llama.cpp repacks it at load; inputs are rounded to int8 in
    blocks. A node a copy in one graph."""
    import peer_ggml

    weight = peer_ggml.quantized(w, kind, copies, repack)
    family = "8-bit" if kind == "Q8_0" else "4-bit"

    def products(x: Tensor) -> Sequence[Call]:
        return [peer_ggml.Product(weight, x)]

    return Weights(family, weight.nbytes, copies, w, TOLERANCE[family], products, at_once=True)


class Entrant(NamedTuple):
    """A builder, and about how many bits it takes a weight: what decides how many copies fit."""

    bits: int
    build: Builder


PEERS: dict[str, Entrant] = {
    "torch bf16": Entrant(16, partial(torch_float, torch.bfloat16)),
    "torch fp32": Entrant(32, partial(torch_float, torch.float32)),
    **{f"torch int4 g{g}": Entrant(4, partial(torch_int4, g)) for g in (128, 64, 32)},
    "bitsandbytes NF4": Entrant(4, bitsandbytes_nf4),
    "bitsandbytes NF4, kernel of the hub": Entrant(4, bitsandbytes_hub),
    **{f"ONNX Runtime int4 b{b}": Entrant(4, partial(onnxruntime, 4, b, 1)) for b in (128, 32)},
    **{f"ONNX Runtime int4 b{b}, int8 inputs": Entrant(4, partial(onnxruntime, 4, b, 4)) for b in (128, 32)},
    **{f"ggml {kind}, int8 inputs": Entrant(4, partial(ggml, kind, False)) for kind in ("Q4_0", "Q4_K")},
    **{f"ggml {kind} repacked, int8 inputs": Entrant(4, partial(ggml, kind, True)) for kind in ("Q4_0", "Q4_K")},
    "torch int8": Entrant(8, torch_int8),
    "FBGEMM dynamic int8": Entrant(8, partial(dynamic_int8, "fbgemm")),
    "oneDNN dynamic int8": Entrant(8, partial(dynamic_int8, "onednn")),
    # its 8 bits with float32 inputs are left out: they take some forty times as long as these
    **{f"ONNX Runtime int8 b{b}, int8 inputs": Entrant(8, partial(onnxruntime, 8, b, 4)) for b in (128, 32)},
    "ggml Q8_0, int8 inputs": Entrant(8, partial(ggml, "Q8_0", False)),
}


def chosen(*names: str) -> dict[str, Entrant]:
    """These peers."""
    return {name: PEERS[name] for name in names}


class Codec(NamedTuple):
    """How a library quantizes and dequantizes, unlike products on any float dtype.

    quantize gives codes, scales, and what else dequantize takes. fake: both in one, with a gradient.
    """

    family: str
    quantize: Callable[[Tensor], tuple[Tensor, Tensor, object]] | None = None
    dequantize: Callable[[Tensor, Tensor, object], Tensor] | None = None
    fake: Callable[[Tensor], Tensor] | None = None
    has_gradient: bool = True


def bitsandbytes_codec() -> Codec:
    from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit

    def quantize(w: Tensor) -> tuple[Tensor, Tensor, object]:
        packed, state = quantize_4bit(w, blocksize=64, quant_type="nf4")
        return packed, state.absmax, state

    def dequantize(packed: Tensor, scale: Tensor, state: object) -> Tensor:
        assert isinstance(state, QuantState)
        return dequantize_4bit(packed, state)

    return Codec("nf4", quantize, dequantize, lambda w: dequantize(*quantize(w)), has_gradient=False)


def torchao_codec(bits: int, group: int | None) -> Codec:
    """Its affine primitives, which all of its integer formats are made of. Codes are one to a byte, also of 4 bits."""
    from torchao.quantization import quant_primitives as ao

    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1

    def found(w: Tensor) -> tuple[Any, Tensor, Tensor]:
        block: Any = (1, group or w.shape[1])
        return block, *ao.choose_qparams_affine(w, ao.MappingType.SYMMETRIC, block, torch.int8, low, high)

    def quantize(w: Tensor) -> tuple[Tensor, Tensor, object]:
        block, scale, zero = found(w)
        return ao.quantize_affine(w, block, scale, zero, torch.int8, low, high), scale, (block, zero, w.dtype)

    def dequantize(codes: Tensor, scale: Tensor, rest: tuple) -> Tensor:
        block, zero, dtype = rest
        return ao.dequantize_affine(codes, block, scale, zero, torch.int8, low, high, output_dtype=dtype)

    def fake(w: Tensor) -> Tensor:
        block, scale, zero = found(w.detach())
        return ao._fake_quantize_affine(w, block, scale, zero, torch.int8, low, high)

    return Codec(f"int{bits}", quantize, dequantize, fake)  # pyright: ignore[reportArgumentType]


def torch_fake(bits: int, group: int | None) -> Codec:
    """fake_quantize_per_channel_affine, a group as a channel of its own, with the scales found in the same call."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1

    def fake(w: Tensor) -> Tensor:
        rows = w.reshape(-1, group or w.shape[1])
        scale = rows.detach().abs().amax(1).float() / (high + 0.5)
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(rows, scale, zero, 0, low, high).view(w.shape)

    return Codec(f"int{bits}", fake=fake)


CODECS: dict[str, Callable[[], Codec]] = {
    "bitsandbytes NF4": bitsandbytes_codec,
    "torchao int4 g128": partial(torchao_codec, 4, 128),
    "torchao int8": partial(torchao_codec, 8, None),
    "torch per channel int4 g128": partial(torch_fake, 4, 128),
    "torch per channel int8": partial(torch_fake, 8, None),
}
