"""Memory on huge pages: tensors in it are like any others, and it goes when they do."""

from __future__ import annotations

import gc
import io
import mmap
import weakref

import pytest
import torch

from halfbyte.kernels import pages


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
@pytest.mark.parametrize("shape", [(), (3,), (5, 7), (0, 4)])
def test_a_copy_is_its_own_and_equal(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    t = torch.randint(0, 100, shape).to(dtype)
    before, other = t.clone(), pages.copy(torch.full((9,), 7))
    c = pages.copy(t)
    assert (c.dtype, c.shape) == (dtype, t.shape)
    assert torch.equal(c.float(), before.float())
    assert c.untyped_storage().nbytes() == t.nbytes  # saving one saves no neighbour
    assert c.data_ptr() % 64 == 0 or t.nbytes == 0
    c.fill_(3)
    assert torch.equal(t.float(), before.float())
    assert (other == 7).all()


def test_what_is_not_contiguous_becomes_so() -> None:
    t = torch.randn(6, 8).T
    c = pages.copy(t)
    assert c.is_contiguous()
    assert torch.equal(c, t)


def test_large_tensors_and_saving() -> None:
    big = torch.arange(5_000_000)
    c, d = pages.copy(big), pages.copy(big[:10])
    assert torch.equal(c, big)
    file = io.BytesIO()
    torch.save(d, file)
    assert len(file.getvalue()) < 4000


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no huge pages")
def test_a_block_goes_with_its_last_tensor() -> None:
    pages.copy(torch.zeros(10))
    first = pages._block
    assert first is not None
    held, gone = pages.copy(torch.ones(4)), weakref.ref(first.memory)
    del first
    pages.copy(torch.zeros(pages._BLOCK // 4))  # another block takes its place
    gc.collect()
    assert gone() is not None
    assert (held == 1).all()
    del held
    gc.collect()
    assert gone() is None
