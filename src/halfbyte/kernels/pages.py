"""Memory that is read over and over: on huge pages, where the system gives them.

A core's table of pages reaches over 4 KB pages of some megabytes only, and its prefetching ends with each page: weights
of a whole model are read faster from pages of 2 MB (5 to 15% where this was written). Tensors lie close together, since
most are smaller than such a page; a block goes back to the system with the last of its tensors.
"""

from __future__ import annotations

import mmap
import threading

import torch
from torch import Tensor

_PAGE, _BLOCK, _LINE = 2 << 20, 32 << 20, 64  # bytes; a block is taken from the system, but not yet its memory
_on = all(hasattr(mmap, name) for name in ("MADV_HUGEPAGE", "MAP_ANONYMOUS"))
_lock = threading.Lock()


class _Block:
    """Memory that is handed out from its first huge page's begin on."""

    def __init__(self, size: int) -> None:
        self.memory = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory.madvise(mmap.MADV_HUGEPAGE)
        self.used = -torch.frombuffer(self.memory, dtype=torch.uint8).data_ptr() % _PAGE
        self.end = self.used + size

    def take(self, n: int) -> Tensor:
        at, self.used = self.used, self.used + -(-n // _LINE) * _LINE
        return torch.frombuffer(self.memory, dtype=torch.uint8, count=n, offset=at)


_block: _Block | None = None


def copy(t: Tensor) -> Tensor:
    """A contiguous copy, on huge pages if there are such; its storage is its own."""
    global _block
    if not _on or t.device.type != "cpu" or t.nbytes == 0:
        return t.clone(memory_format=torch.contiguous_format)
    with _lock:
        try:
            if _block is None or _block.end - _block.used < t.nbytes + _LINE:
                _block = _Block(max(_BLOCK, -(-t.nbytes // _PAGE) * _PAGE))
        except OSError:  # a system that knows them and has none
            return t.clone(memory_format=torch.contiguous_format)
        to = _block.take(t.nbytes)
    return to.view(t.dtype).view(t.shape).copy_(t)
