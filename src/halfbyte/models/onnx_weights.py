"""What a model's weights become in an ONNX graph: floats, blocks of codes, or codes that are multiplied in integers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor
from torch.nn.functional import pad

from halfbyte import kernels
from halfbyte.errors import InputError
from halfbyte.formats import SOURCE, Format, Integers
from halfbyte.layers import Codes, Embedding, Linear, Op, ops
from halfbyte.models.loading import Loaded
from halfbyte.models.onnx_saving import Graph, Held
from halfbyte.models.saving import Value, parameters
from halfbyte.qtensor import QParams, QTensor, pack
from halfbyte.scheme import static

_BLOCKS = (256, 128, 64, 32, 16)  # MatMulNBits' sizes
_CONSTANTS = (".input_scale", ".input_zero_point")  # in the graph itself, once for all ops that share them


def refuses(f: Format, inputs: int, input: Format | None = None) -> str | None:
    """Why no node multiplies with weights of a format, a row of `inputs`, in words; None if one does. input: what x is
    rounded to."""
    if not isinstance(f.grid, Integers) or f.bits not in (4, 8) or not isinstance(f.scale, str) or f.flat:
        return f"onnxruntime has no product for {f}: it has them for integers of 4 or 8 bits with plain scales"
    if isinstance(f.zero, Format) or (f.zero is None and not f.grid.signed):
        return f"onnxruntime has no product for {f}: zero points are plain numbers, or in the middle"
    if _block(f, inputs) is None:
        return f"onnxruntime has no product for {f}: its groups are no multiple of {_BLOCKS[-1]}"
    if input is None:
        return None
    if not isinstance(input.grid, Integers) or input.bits != 8 or input.scale != SOURCE or not _rounded(input):
        return f"inputs are rounded to {input}, and only int8-token, int8-tensor and uint8-tensor are written to ONNX"
    if f.bits != 8 or f.zero is not None or f.group != "channel":
        return f"inputs are rounded to {input}, which are multiplied with int8-channel alone, not with {f}"
    return None


def _rounded(input: Format) -> bool:
    """Whether there are nodes that round to an 8-bit format of inputs."""
    symmetric = input.zero is None and isinstance(input.grid, Integers) and input.grid.signed
    return symmetric or input.zero == "integer" if static(input) else symmetric and input.group == "channel"


def _block(f: Format, inputs: int) -> int | None:
    """MatMulNBits' block: the largest that divides a group; a row by channel may end within one."""
    length = f.group if isinstance(f.group, int) else inputs
    found = next((b for b in _BLOCKS if length % b == 0), None)
    return found if found or isinstance(f.group, int) else 32


def blocks(q: QTensor) -> dict[str, Tensor]:
    """MatMulNBits' inputs for q (out, in), codes and scales as they are: "codes" uint8 (out, blocks, bytes), the first
    in the lowest bits; "scale" float32 (out * blocks,); "zero", integer zero points, uint8, packed by rows.

    A float zero is added: "added" float32 (groups, out) is what a weight has beside scale * (code - 2^(bits - 1)), to
    be multiplied with the sums of x over groups.
    """
    f, (out, inputs) = q.format, q.shape
    block, p = _block(f, inputs), q.qparams
    assert block is not None
    count = -(-inputs // block)

    def by_row(t: Tensor) -> Tensor:
        return t.reshape(-1, t.shape[-1]).expand(out, -1)

    def by_block(t: Tensor) -> Tensor:
        return by_row(t).repeat_interleave(count // t.shape[-1], 1)

    codes = pad(q.codes, (0, count * block - inputs))
    made = {"codes": pack(codes, f.bits).reshape(out, count, -1), "scale": by_block(p.scale).reshape(-1)}
    if p.zero is not None and f.zero == "integer":
        made["zero"] = pack(by_block(p.zero).to(torch.uint8), f.bits).reshape(-1)
    elif p.zero is not None:
        made["added"] = by_row(p.zero + p.scale * (1 << (f.bits - 1))).T
    return made


@dataclass(frozen=True)
class Blocks:
    """Blocks of codes in a graph, of a weight (out, in) that has a name. wide: whether they are multiplied in float32
    even if the graph is float16, which would not hold their scales."""

    format: Format
    shape: tuple[int, int]
    name: str
    wide: bool

    def __getitem__(self, part: str) -> str:
        """The name of what `blocks` gives under that name."""
        return f"{self.name}.{part}"

    @property
    def block(self) -> int:
        return _block(self.format, self.shape[1]) or 0

    @property
    def count(self) -> int:
        """Blocks of a row."""
        return -(-self.shape[1] // self.block)

    @property
    def groups(self) -> int:
        """Groups of a row."""
        return self.shape[1] // self.format.group if isinstance(self.format.group, int) else 1

    @property
    def added(self) -> bool:
        """Whether there is a float zero."""
        return self.format.zero not in (None, "integer")


class Weights:
    """The parameters of a model as they enter a graph, each once. formats: op's name -> what its weight is rounded to,
    to nearest. floats: whether all other codes become floats. Raises InputError for what no node computes with."""

    def __init__(self, graph: Graph, loaded: Loaded, formats: Mapping[str, Format], floats: bool) -> None:
        self.graph, self.loaded, self.formats, self.floats = graph, loaded, formats, floats
        self.values: dict[str, Callable[[], Value]] = {name: get for name, _, get in parameters(loaded)}
        self.ops = dict(ops(loaded.model))
        self.names: dict[int, str] = {}  # of weights: that of the first op that has one
        for name, op in self.ops.items():
            self.names.setdefault(id(op.weight), name)
        self.looked_up = {id(op.weight) for op in self.ops.values() if isinstance(op, Embedding)}
        self.placed: dict[str, Any] = {}
        self._rounded: dict[str, tuple[str, str]] = {}
        self._rounded_by: dict[tuple[str, ...], str] = {}

    def unused(self) -> list[str]:
        """Names of the parameters that the graph has no place for."""
        return [name for name in self.values if name not in self.placed and not name.endswith(_CONSTANTS)]

    def _once(self, name: str, place: Callable[[], Any]) -> Any:
        if name not in self.placed:
            self.placed[name] = place()
        return self.placed[name]

    def vector(self, name: str, dtype: torch.dtype | None = None, plus: float = 0.0) -> str:
        """A bias or a norm's weight, in the graph's dtype if none is given; `plus` is added to it."""
        if name not in self.values:
            raise InputError(f"the model has no {name}, which its graph needs.")
        to = dtype or self.graph.dtype
        shape = self.loaded.model.get_parameter(name).shape

        def read() -> list[Tensor]:
            return [_cast(name, _floats(self.values[name]()).float() + plus, to)]

        self._once(name, lambda: self.graph.hold({name: (to, shape)}, read))
        return name

    def embed(self, name: str, ids: str) -> str:
        """Rows of an embedding, by ids int64 (batch, sequence) -> (batch, sequence, width)."""
        g, op = self.graph, self.ops[name]
        f = self._format(op)
        y = g("Gather", self._matrix(op, turned=False), ids) if f is None else self._rows(self._blocks(op, f), ids)
        scale = getattr(op, "embed_scale", None)
        return y if scale is None else g("Mul", y, g.number(scale.item()))

    def linear(self, name: str, x: str) -> str:
        """x (batch, sequence, in) times a weight and with its bias -> (batch, sequence, out)."""
        g, op = self.graph, self.ops[name]
        assert isinstance(op, Linear)
        f = self._format(op)
        if f is None and op.input is not None:
            raise InputError(f"{name}: inputs are rounded to {op.input}, its weight is not.")
        if f is None and id(op.weight) in self.looked_up:
            y = self._tied(op, x)
        elif f is None:
            y = g("MatMul", x, self._matrix(op, turned=True))
        else:
            rounded = self._seen_through if static(op.input) else self._integers
            y = (self._multiply if op.input is None else rounded)(op, f, x)
        return y if op.bias is None else g("Add", y, self.vector(f"{name}.bias"))

    def _format(self, op: Op) -> Format | None:
        """What a weight is in the graph; None for floats. Raises InputError where nothing multiplies with it."""
        name = self.names[id(op.weight)]
        f = self.formats.get(name) or (None if self.floats else op.weight.format)
        if f is None:
            return None
        why = refuses(f, op.weight.shape[-1], getattr(op, "input", None))
        if why is None and isinstance(op.weight.stored, Codes) and "order" in op.weight.stored.q.parts:
            why = "its inputs are in an order of their own"
        odd = f.zero == "integer" or op.weight.shape[1] % _BLOCKS[-1] or getattr(op, "input", None) is not None
        if why is None and id(op.weight) in self.looked_up and odd:
            why = f"the graph does not look up rows of {f}"
        if why is not None:
            raise InputError(f"{name}: {why}.")
        return f

    def _matrix(self, op: Op, turned: bool) -> str:
        """A matrix in floats, (in, out) if turned, else (out, in)."""
        name, to = f"{self.names[id(op.weight)]}.weight", self.graph.dtype

        def read() -> list[Tensor]:
            value = _cast(name, _floats(self.values[name]()), to)
            return [value.T if turned else value]

        shape = tuple(op.weight.shape)[::-1] if turned else tuple(op.weight.shape)
        self._once(name, lambda: self.graph.hold({name: (to, shape)}, read))
        return name

    def _tied(self, op: Linear, x: str) -> str:
        """A product with the floats of an embedding, which are (out, in)."""
        g = self.graph
        flat = g("Gemm", g.reshape(x, -1, op.in_features), self._matrix(op, turned=False), transB=1)
        sizes = g("Concat", g("Shape", x, start=0, end=2), g.integers(op.out_features), axis=0)
        return g("Reshape", flat, sizes)

    def _codes(self, name: str, f: Format) -> QTensor:
        """The weight of an op in a format. What is made so stays so: the search for scales is long, the codes are as
        large as the file."""
        value = self.values[f"{name}.weight"]()
        if isinstance(value, QTensor) and value.format == f:
            return value
        made = kernels.quantize(_floats(value), f)
        self.ops[name].weight.freeze(made)
        return made

    def _blocks(self, op: Op, f: Format) -> Blocks:
        """Places the blocks of a weight, once."""
        g, name, (out, inputs) = self.graph, self.names[id(op.weight)], op.weight.shape
        b = Blocks(f, (out, inputs), name, self._scale_dtype(op, f) != torch.float16 or f.zero not in (None, "integer"))
        held: dict[str, Held] = {
            "codes": (torch.uint8, (out, b.count, b.block * f.bits // 8)),
            "scale": (torch.float32 if b.wide else g.dtype, (out * b.count,)),
        }
        if f.zero == "integer":
            held["zero"] = torch.uint8, (out * -(-b.count * f.bits // 8),)
        if b.added:
            held["added"] = torch.float32, (b.groups, out)

        def read() -> list[Tensor]:
            found = blocks(self._codes(name, f))
            return [found[part].to(dtype) for part, (dtype, _) in held.items()]

        self._once(f"{name}.weight", lambda: g.hold({b[part]: what for part, what in held.items()}, read))
        return b

    def _scale_dtype(self, op: Op, f: Format) -> torch.dtype:
        stored = op.weight.stored
        if isinstance(stored, Codes) and stored.q.format == f:
            return stored.q.leaves()["scale"].dtype
        if f.scale != SOURCE:
            return getattr(torch, str(f.scale))
        return self.loaded.config.dtype if op.weight.device.type == "meta" else op.weight.dtype

    def _multiply(self, op: Linear, f: Format, x: str) -> str:
        """A product with blocks of codes; x is not rounded."""
        b = self._blocks(op, f)
        g, (out, inputs) = self.graph, b.shape
        wide = g.wide(x) if b.wide else x
        zero = [b["zero"]] if b.format.zero == "integer" else []
        y = g("MatMulNBits", wide, b["codes"], b["scale"], *zero,
              domain="com.microsoft", K=inputs, N=out, bits=b.format.bits, block_size=b.block)  # fmt: skip
        if b.added:
            sums = g("ReduceSum", g.reshape(wide, 0, 0, b.groups, -1), g.integers(-1), keepdims=0)
            y = g("Add", y, g("MatMul", sums, b["added"]))
        return g.narrow(y) if b.wide else y

    def _rows(self, b: Blocks, ids: str) -> str:
        """Rows of blocks of codes, by ids, as floats."""
        g, (out, inputs) = self.graph, b.shape
        codes = g("Gather", b["codes"], ids)  # (batch, sequence, blocks, bytes)
        if b.format.bits == 4:
            last = g.integers(-1)
            four, low = (g.constant(torch.tensor(v, dtype=torch.uint8)) for v in (4, 15))
            halves = g("BitwiseAnd", codes, low), g("BitShift", codes, four, direction="RIGHT")
            codes = g("Concat", *(g("Unsqueeze", half, last) for half in halves), axis=-1)
            codes = g.reshape(codes, 0, 0, b.count, b.block)
        middle = g.number(1 << (b.format.bits - 1), torch.float32)
        values = g("Sub", g("Cast", codes, to=TensorProto.FLOAT), middle)
        scale = g("Gather", g.reshape(b["scale"], out, b.count, 1), ids)
        y = g("Mul", values, scale if b.wide else g.wide(scale))
        if b.added:
            added = g("Transpose", g("Gather", b["added"], ids, axis=1), perm=(1, 2, 0))
            y = g("Add", g.reshape(y, 0, 0, b.groups, -1), g("Unsqueeze", added, g.integers(-1)))
        return g.narrow(g.reshape(y, 0, 0, inputs))

    def _integers(self, op: Linear, f: Format, x: str) -> str:
        """A product of 8-bit integers: x rounded by tokens, a weight by channel."""
        g = self.graph
        codes, scale = self._by_channel(op, f, torch.uint8)
        rows, step = self._round(x)
        middle = g.constant(torch.tensor(128, dtype=torch.uint8))
        sums = g("Cast", g("MatMulInteger", rows, codes, middle, middle), to=TensorProto.FLOAT)
        return g.narrow(g("Mul", g("Mul", sums, step), scale))

    def _by_channel(self, op: Linear, f: Format, dtype: torch.dtype) -> tuple[str, str]:
        """A weight's codes (in, out), uint8 around 128 or int8, and its scales, float32 (out,)."""
        name = self.names[id(op.weight)]
        codes, scale = f"{name}.codes", f"{name}.scale"
        held: dict[str, Held] = {codes: (dtype, (op.in_features, op.out_features)),
                                 scale: (torch.float32, (op.out_features,))}  # fmt: skip

        def read() -> list[Tensor]:
            q = self._codes(name, f)
            # two's complement is the offset code with its highest bit turned
            value = q.codes if dtype == torch.uint8 else (q.codes ^ 128).view(torch.int8)
            return [value.T, q.qparams.scale.reshape(-1)]

        self._once(f"{name}.weight", lambda: self.graph.hold(held, read))
        return codes, scale

    def _round(self, x: str) -> tuple[str, str]:
        """x as `layers.Linear` rounds it: codes uint8 around 128, as the weight's are, since onnxruntime's products of
        signed with unsigned may saturate; and a scale for each token, float32 (batch, sequence, 1)."""
        if x not in self._rounded:
            g, f32 = self.graph, torch.float32
            wide = g.wide(x)
            peak = g("ReduceMax", g("Abs", wide), g.integers(-1), keepdims=1)
            step = g("Div", peak, g.number(127.5, f32))  # kernels.search.absmax
            step = g.wide(g.narrow(step))
            by = g("Where", g("Equal", step, g.number(0, f32)), g.number(1, f32), step)
            codes = g("Add", g("Round", g("Div", wide, by)), g.number(128, f32))
            codes = g("Clip", codes, g.number(0, f32), g.number(255, f32))
            self._rounded[x] = g("Cast", codes, to=TensorProto.UINT8), step
        return self._rounded[x]

    def _seen_through(self, op: Linear, f: Format, x: str) -> str:
        """A product of floats that were 8-bit integers, x by one scale for all and a weight by channel: what runs it
        sees that, and multiplies the integers."""
        g = self.graph
        codes, scale = self._by_channel(op, f, torch.int8)
        w = g("DequantizeLinear", codes, scale, axis=1)
        return g.narrow(g("MatMul", self._round_by(op, x), w))

    def _round_by(self, op: Linear, x: str) -> str:
        """x rounded by the stored scale of an op's inputs, in float32; ops with the same scale share the nodes. Codes
        are unsigned, around 128 where there is no zero point: onnxruntime multiplies signed ones that ops share in
        floats."""
        g = self.graph
        p = op.input_qparams or QParams(torch.ones(1))  # what can be written is asked before scales are known, too
        zero = torch.tensor(128.0) if p.zero is None else p.zero[0]
        by = g.constant(p.scale[0].clone()), g.constant(zero.to(torch.uint8))
        key = (x, *by)
        if key not in self._rounded_by:
            self._rounded_by[key] = g("DequantizeLinear", g("QuantizeLinear", g.wide(x), *by), *by)
        return self._rounded_by[key]


def _floats(value: Value) -> Tensor:
    return value.dequantize() if isinstance(value, QTensor) else value


def _cast(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Raises InputError for what the dtype does not hold."""
    if not value.isfinite().all():
        raise InputError(f"{name} holds NaN or infinity.")
    out = value.to(dtype)
    if not out.isfinite().all():
        raise InputError(f"{name}: its largest value, {value.abs().max():.4g}, is more than {dtype} holds; use F32.")
    return out
