"""ggml's blocks, held against the gguf package."""

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from hypothesis import given
from hypothesis import strategies as st

from halfbyte import kernels
from halfbyte.containers import ggml
from halfbyte.errors import InputError
from halfbyte.formats import FORMATS

TYPES = {n: getattr(gguf.GGMLQuantizationType, n.upper()) for n in ggml.BLOCKS}
names = st.sampled_from(sorted(TYPES))


def gguf_values(blocks: torch.Tensor, name: str) -> torch.Tensor:
    return torch.from_numpy(dequantize(blocks.numpy(), TYPES[name]))


@given(names, st.integers(0, 5), st.integers(1, 3), st.integers(0, 2**32), st.floats(1e-4, 100))
def test_gguf_reads_our_blocks_as_we_do(name, rows, blocks, seed, size):
    w = torch.randn(rows, 256 * blocks, generator=torch.Generator().manual_seed(seed)) * size
    q = kernels.quantize(w + w.mean(), name)
    data = ggml.to_blocks(q)
    assert data.shape == (rows, ggml.row_bytes(FORMATS[name], 256 * blocks))
    if rows:
        assert torch.equal(gguf_values(data, name), q.dequantize())
    back = ggml.from_blocks(data, FORMATS[name], tuple(w.shape), torch.float32)
    for k, part in q.tensors().items():
        assert back.tensors()[k].dtype == part.dtype
        assert torch.equal(back.tensors()[k], part), k


@pytest.mark.parametrize(("name", "block"), [("uint4-g32-affine", "q4_1"), ("uint5-g64-affine", "q5_1")])
def test_integers_with_a_float_that_is_added_are_a_block_where_fp16_holds_it(name, block):
    w = torch.randn(6, 128) + 0.3
    q = kernels.quantize(w.half(), name)
    found = ggml.fitting(q)
    assert found is not None
    assert found.format == FORMATS[block]
    assert torch.equal(found.codes, q.codes)
    assert torch.equal(found.dequantize(), q.dequantize())
    assert torch.equal(gguf_values(ggml.to_blocks(found), block).half(), q.dequantize())
    assert ggml.fitting(kernels.quantize(w, name)) is None  # scales of float32
    q = kernels.quantize(w.half(), name)
    q.parts["zero"] = q.parts["zero"].float() + 1e-6
    assert ggml.fitting(q) is None
    assert ggml.fitting(kernels.quantize(w.half(), name.replace("-affine", ""))) is None


def test_blocks_are_as_large_as_the_gguf_package_says():
    assert {n: (b.numbers, b.size) for n, b in ggml.BLOCKS.items()} == {
        n: gguf.GGML_QUANT_SIZES[t] for n, t in TYPES.items()
    }


@given(names, st.integers(0, 2**32))
def test_any_bytes_are_read_as_gguf_reads_them(name, seed):
    """Every bit of a block means the same to both; only NaN scales are left out."""
    f, rng = FORMATS[name], np.random.default_rng(seed)
    block, blocks = ggml.BLOCKS[name], rng.integers(0, 256, (4, ggml.row_bytes(f, 512)), dtype=np.uint8)
    at = 0
    for field, size in block.fields:  # factors below 2^15 and not NaN: without the highest bit of the exponent
        if field in ("d", "m", "dmin"):
            blocks[:, at + 1 :: block.size] &= 0xBF
        if field == "e":  # ggml halves the factor, so the two smallest are no powers of 2 to it
            blocks[:, at :: block.size] = blocks[:, at :: block.size].clip(2, 250)
        at += size
    data = torch.from_numpy(blocks)
    q = ggml.from_blocks(data, f, (4, 512), torch.float32)
    assert torch.equal(q.dequantize(), gguf_values(data, name))
    assert torch.equal(ggml.to_blocks(q), data)


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q8_0"])
def test_what_gguf_quantizes_is_read_with_its_values(name):
    w = torch.randn(16, 320)
    data = torch.from_numpy(quantize(w.numpy(), TYPES[name]))
    q = ggml.from_blocks(data, FORMATS[name], (16, 320), torch.float32)
    assert torch.equal(q.dequantize(), gguf_values(data, name))
    assert torch.equal(ggml.to_blocks(q), data)
    assert q.nbytes == data.nbytes


def test_three_dimensions_are_rows_of_rows():
    q = kernels.quantize(torch.randn(3, 4, 256), "q4_k")
    data = ggml.to_blocks(q)
    assert data.shape == (12, 144)
    back = ggml.from_blocks(data, FORMATS["q4_k"], (3, 4, 256), torch.float32)
    assert torch.equal(back.dequantize(), q.dequantize())


def test_the_source_dtype_is_kept():
    q = kernels.quantize(torch.randn(2, 64).bfloat16(), "q4_0")
    back = ggml.from_blocks(ggml.to_blocks(q), q.format, (2, 64), torch.bfloat16)
    assert torch.equal(back.dequantize(), q.dequantize())
    assert back.dequantize().dtype == torch.bfloat16


def test_rows_that_are_no_whole_super_blocks_are_refused():
    with pytest.raises(InputError, match=r"q4_k.*256.*288"):
        ggml.row_bytes(FORMATS["q4_k"], 288)
    with pytest.raises(InputError, match=r"q4_0.*32.*40"):
        ggml.from_blocks(torch.zeros(18, dtype=torch.uint8), FORMATS["q4_0"], (1, 40), torch.float32)


def test_other_formats_are_refused():
    with pytest.raises(InputError, match=r"no block for int4-g32.*q4_0"):
        ggml.to_blocks(kernels.quantize(torch.randn(2, 32), "int4-g32"))


@pytest.mark.parametrize(
    "data", [torch.zeros(17, dtype=torch.uint8), torch.zeros(18), torch.zeros(0, dtype=torch.uint8)]
)
def test_wrong_sizes_and_dtypes_are_refused(data):
    with pytest.raises(InputError, match="needs 18 bytes"):
        ggml.from_blocks(data, FORMATS["q4_0"], (1, 32), torch.float32)
