"""ONNX: a graph, and its file, which is written one weight at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper
from torch import Tensor

from halfbyte.folders import beside

OPSET, IR = 21, 10  # read by onnxruntime 1.18 and all that came after it
TYPES = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.uint8: TensorProto.UINT8,
         torch.int8: TensorProto.INT8, torch.int64: TensorProto.INT64}  # fmt: skip
LARGEST = 1_900_000_000  # bytes of weights in a file: protobuf reads no message of 2 GiB
_PAGE = 4096  # where a weight in a file of its own begins, so that it can be mapped into memory
Held = tuple[torch.dtype, Sequence[int]]  # a weight that is not read yet: dtype and shape


class Graph:
    """Nodes in the order of their calls, constants, and weights that are named and sized but not read before the file
    is written. A value is known by its name; dtype, float32 or float16, is that of floats between nodes. largest: bytes
    of weights that one file may hold."""

    def __init__(self, dtype: torch.dtype, largest: int | None = None) -> None:
        self.dtype = dtype
        self.largest = LARGEST if largest is None else largest
        self.nodes: list[NodeProto] = []
        self.inputs: list[ValueInfoProto] = []
        self.outputs: list[ValueInfoProto] = []
        self.constants: dict[tuple[Any, ...], TensorProto] = {}
        self.weights: list[tuple[list[TensorProto], Callable[[], Sequence[Tensor]]]] = []

    def __call__(self, op: str, *inputs: str, output: str | None = None, domain: str = "", **attributes: Any) -> str:
        """Adds a node of one output, and gives that output's name."""
        output = output or f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], output, domain=domain, **attributes))
        return output

    def split(self, x: str, *sizes: int) -> list[str]:
        """x cut into parts along its last dimension."""
        name = f"Split_{len(self.nodes)}"
        parts = [f"{name}_{i}" for i in range(len(sizes))]
        self.nodes.append(helper.make_node("Split", [x, self.integers(*sizes)], parts, name, axis=-1))
        return parts

    def constant(self, value: Tensor) -> str:
        """A small tensor, which is in the graph itself; equal ones are one."""
        key = (value.dtype, tuple(value.shape), value.numpy().tobytes())
        if key not in self.constants:
            dims, name = list(value.shape), f"constant_{len(self.constants)}"
            self.constants[key] = TensorProto(name=name, dims=dims, data_type=TYPES[value.dtype], raw_data=key[2])
        return self.constants[key].name

    def number(self, value: float, dtype: torch.dtype | None = None) -> str:
        """A scalar, of the graph's dtype if none is given."""
        return self.constant(torch.tensor(value, dtype=dtype or self.dtype))

    def integers(self, *values: int) -> str:
        """An int64 vector: a shape, or axes."""
        return self.constant(torch.tensor(values, dtype=torch.int64))

    def reshape(self, x: str, *sizes: int) -> str:
        """0 keeps a dimension, -1 is what remains."""
        return self("Reshape", x, self.integers(*sizes))

    def wide(self, x: str) -> str:
        """x of the graph's dtype in float32."""
        return x if self.dtype == torch.float32 else self("Cast", x, to=TensorProto.FLOAT)

    def narrow(self, x: str) -> str:
        """float32 x in the graph's dtype."""
        return x if self.dtype == torch.float32 else self("Cast", x, to=TYPES[self.dtype])

    def hold(self, weights: Mapping[str, Held], read: Callable[[], Sequence[Tensor]]) -> None:
        """Names weights by dtype and shape; `read` gives them, in this order, when the file is written."""
        heads = [TensorProto(name=n, dims=list(shape), data_type=TYPES[d]) for n, (d, shape) in weights.items()]
        self.weights.append((heads, read))

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(_nbytes(head) for heads, _ in self.weights for head in heads)

    @property
    def outgrows(self) -> bool:
        """Whether the weights need a file of their own."""
        return self.nbytes > self.largest

    def write(self, path: Path, on_tensor: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Writes what onnx.save would, but reads one weight at a time. Weights of more than `largest` bytes in all go
        into a second file, `folders.beside` the first, which names it."""
        domains = sorted({node.domain for node in self.nodes})
        opsets = [helper.make_opsetid(d, 1 if d else OPSET) for d in domains]
        model = ModelProto(ir_version=IR, producer_name="halfbyte", opset_import=opsets)
        made = helper.make_graph(self.nodes, "decoder", self.inputs, self.outputs, list(self.constants.values()))
        if self.outgrows:
            made.initializer.extend(self._outside(beside(path).name))
            model.graph.CopyFrom(made)
            path.write_bytes(model.SerializeToString())
            with beside(path).open("wb") as file:
                self._stream(file, lambda head: bytes(-file.tell() % _PAGE), on_tensor)
            return
        # a message of protobuf is its fields one after the other, and those that hold messages begin with their length
        graph = made.SerializeToString()
        fronts = {head.name: _front(head) for heads, _ in self.weights for head in heads}
        total = len(graph) + sum(map(len, fronts.values())) + self.nbytes
        with path.open("wb") as file:
            file.write(model.SerializeToString() + _field(ModelProto.GRAPH_FIELD_NUMBER, total) + graph)
            self._stream(file, lambda head: fronts[head.name], on_tensor)

    def _outside(self, file: str) -> Iterator[TensorProto]:
        """The weights as a graph has them whose bytes are in a file of that name, each at the next page."""
        at = 0
        for head in (head for heads, _ in self.weights for head in heads):
            at += -at % _PAGE
            out = TensorProto(data_location=TensorProto.EXTERNAL)
            out.MergeFrom(head)
            for key, value in (("location", file), ("offset", at), ("length", _nbytes(head))):
                out.external_data.add(key=key, value=str(value))
            at += _nbytes(head)
            yield out

    def _stream(
        self, file: BinaryIO, before: Callable[[TensorProto], bytes], on_tensor: Callable[[int, int], None]
    ) -> None:
        """Reads the weights one after the other, and writes the bytes of each, and what stands before it."""
        for i, (heads, read) in enumerate(self.weights):
            for head, value in zip(heads, read(), strict=True):
                assert (TYPES[value.dtype], list(value.shape)) == (head.data_type, list(head.dims)), head.name
                file.write(before(head))
                file.write(value.contiguous().numpy().data)
            on_tensor(i + 1, len(self.weights))


def _nbytes(head: TensorProto) -> int:
    return prod(head.dims) * next(d for d, t in TYPES.items() if t == head.data_type).itemsize


def _front(head: TensorProto) -> bytes:
    """What stands in a graph before the bytes of a weight."""
    said = head.SerializeToString() + _field(TensorProto.RAW_DATA_FIELD_NUMBER, _nbytes(head))
    return _field(GraphProto.INITIALIZER_FIELD_NUMBER, len(said) + _nbytes(head)) + said


def _field(number: int, length: int) -> bytes:
    """How a field of protobuf begins that has a length: its number and kind, then the length, 7 bits a byte."""
    out = bytearray([number << 3 | 2])
    while length > 127:
        out.append(length & 127 | 128)
        length >>= 7
    return bytes([*out, length])
