"""Packing, and what a quantized tensor knows of itself."""

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfbyte import kernels
from halfbyte.errors import InputError
from halfbyte.formats import FORMATS
from halfbyte.qtensor import QTensor, check_parts, grouped, pack, ungrouped, unpack


@given(st.integers(2, 8), st.integers(0, 70), st.lists(st.integers(0, 3), max_size=2), st.integers(0, 2**32))
def test_unpack_is_the_inverse_of_pack(bits, n, leading, seed):
    codes = torch.randint(0, 1 << bits, (*leading, n), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.is_contiguous()
    assert packed.shape == (*leading, -(-n * bits // 8))
    assert torch.equal(unpack(packed, bits, n), codes)


def test_the_first_code_is_in_the_lowest_bits():
    assert pack(torch.tensor([1, 2], dtype=torch.uint8), 4).tolist() == [0x21]
    assert pack(torch.tensor([1, 2, 3, 0, 1, 0, 0, 0], dtype=torch.uint8), 2).tolist() == [0b00111001, 1]
    assert pack(torch.tensor([0b101, 0b111, 0b001], dtype=torch.uint8), 3).tolist() == [0b01111101, 0]


@given(
    st.sampled_from([n for n in FORMATS if n not in ("q4_k",)]),
    st.sampled_from([(), (1,), (3,), (2, 3)]),
    st.integers(0, 3),
)
def test_grouped_loses_nothing(name, leading, blocks):
    w = torch.randn(*leading, 128 * blocks)
    rows = grouped(w, FORMATS[name])
    assert len(rows) == prod(FORMATS[name].groups(tuple(w.shape)))
    assert torch.equal(ungrouped(rows, tuple(w.shape)), w)


@pytest.mark.parametrize("name", list(FORMATS))
def test_bits_per_weight(name):
    """The bytes are those that the format's definition says, with nothing beside them."""
    f, rows, n = FORMATS[name], 4, 1024
    q = kernels.quantize(torch.randn(rows, n), f)
    assert q.nbytes == sum(t.nbytes for t in q.tensors().values())
    groups = prod(f.groups((rows, n)))
    size = {"source": 4, "float32": 4, "float16": 2, "float8_e8m0fnu": 1}
    if isinstance(f.scale, str):
        expected = rows * n * f.bits // 8 + groups * size[f.scale]
        expected += 0 if f.zero is None else groups * {"integer": 1, "float16": 2, "source": 4}[str(f.zero)]
        assert q.nbytes == expected


@pytest.mark.parametrize(
    ("name", "bits"),
    [("nf4-g64-dq", 4.127), ("nf4-g64", 4.5), ("q4_k", 4.5), ("q4_0", 4.5), ("q8_0", 8.5), ("mxfp4", 4.25)],
)
def test_known_bits_per_weight(name, bits):
    w = torch.randn(256, 1024)
    n = w.numel()
    q = kernels.quantize(w, name, kernels.qparams(w, name, "minmax"))
    assert q.nbytes * 8 / n == pytest.approx(bits, abs=1e-3)


def test_rows_are_the_rows():
    for name in (
        "int4-g32",
        "uint4-g32",
        "int3-g32",
        "nf4-g64",
        "fp8-e4m3-channel",
        "q4_1",
        "q6_k",
        "uint4-g32-affine",
    ):
        q = kernels.quantize(torch.randn(10, 256), name)
        assert q.has_rows
        index = torch.tensor([[3, 3], [0, 9]])
        assert torch.equal(q.rows(index).dequantize(), q.dequantize()[index])


@pytest.mark.parametrize(
    ("name", "shape"),
    [("nf4-g64-dq", (4, 64)), ("int8-tensor", (4, 64)), ("nf4-g64", (4, 63)), ("int4-g32", (2, 4, 32))],
)
def test_rows_that_cannot_be_taken_alone(name, shape):
    assert not kernels.quantize(torch.randn(shape), name).has_rows


@pytest.mark.parametrize("name", ["int4-g32", "uint4-g32", "q4_k", "nf4-g64-dq", "nvfp4"])
def test_tensors_by_name_and_back(name):
    q = kernels.quantize(torch.randn(4, 256), name)
    back = q.with_tensors({k: t.clone() for k, t in q.tensors().items()})
    assert torch.equal(back.dequantize(), q.dequantize())
    assert torch.equal(q.to("cpu").dequantize(), q.dequantize())
    assert q.to("meta").parts["codes"].device.type == "meta"


def test_parts_of_the_wrong_size_or_dtype_are_refused():
    f, shape = FORMATS["uint4-g32"], (2, 64)
    good = kernels.quantize(torch.randn(shape), f).tensors()
    check_parts(QTensor(f, shape, torch.float32, {**good}))
    for bad in (
        {"codes": good["codes"][:1]},
        {"codes": good["codes"].int()},
        {"scale": good["scale"][:, :1]},
        {"zero": good["zero"].reshape(-1)},
    ):
        with pytest.raises(InputError, match=r"uint4-g32 of shape \(2, 64\) needs"):
            check_parts(QTensor(f, shape, torch.float32, {**good, **bad}))
