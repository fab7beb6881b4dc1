"""Functions timed in turns, so that whatever the machine does meanwhile meets all of them, and the machine's limits.

A turn is a rest, some calls that are not timed, and then calls for some milliseconds. The rest lets the threads of the
one before fall asleep: OpenMP's wait busily for some 4 ms, on cores that the next contender needs.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from halfbyte.kernels import pages

Call = Callable[[], object]


@dataclass
class Contender:
    """Calls that do the same work on memory of their own each, taken in turn so that none finds its own in a cache.

    nbytes: what one product must read and write. products: how many a call does (a session of ONNX Runtime and a
    graph of ggml do all copies in one). kind: "halfbyte", "peer" or "limit". family: whom it is compared with.
    """

    name: str
    calls: Sequence[Call]
    nbytes: int
    kind: str = "peer"
    family: str = ""
    products: int = 1
    error: float | None = None


class Pace(NamedTuple):
    """How long a race takes. seconds: of all its turns, if at least 3 rounds fit; the others are of one turn."""

    rounds: int = 7
    seconds: float = 4.0
    turn: float = 0.012
    lead: float = 0.004
    rest: float = 0.005
    rest_of_sessions: float = 0.06


def _spend(calls: Iterator[Call], seconds: float) -> float:
    """Calls until the time is up, at least once; gives back seconds a call."""
    began, done = time.perf_counter(), 0
    while True:
        next(calls)()
        done += 1
        spent = time.perf_counter() - began
        if spent >= seconds:
            return spent / done


def race(contenders: list[Contender], pace: Pace) -> list[float]:
    """Median seconds a product of each contender."""
    cycles = [itertools.cycle(c.calls) for c in contenders]
    cost = []
    for cycle in cycles:
        next(cycle)()
        cost.append(_spend(cycle, pace.lead))
    a_round = sum(pace.rest + max(pace.turn, c) + (pace.lead if c < pace.lead else 0) for c in cost)
    times: list[list[float]] = [[] for _ in contenders]
    gc.collect()
    gc.disable()
    try:
        for _ in range(max(3, min(pace.rounds, round(pace.seconds / a_round)))):
            for i, (cycle, each, found) in enumerate(zip(cycles, cost, times, strict=True)):
                before = contenders[i - 1]  # a session's own threads wait busily for longer than OpenMP's
                time.sleep(pace.rest if before.products == 1 else pace.rest_of_sessions)
                if each < pace.lead:
                    _spend(cycle, pace.lead)
                found.append(_spend(cycle, pace.turn))
    finally:
        gc.enable()
    return [statistics.median(t) / c.products for t, c in zip(times, contenders, strict=True)]


# Reading takes the exclusive or of everything, which no compiler can leave out, each thread in eight places at once, as
# a core then fetches more than in one place (15 GB/s rather than 12 where this was written). Copying streams past the
# caches where the machine can, so that the target's lines are not read first; where it cannot, memcpy decides.
_C = r"""
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif
#define BLOCK 65536

static uint64_t read_some(const uint64_t *p, size_t n) {
    uint64_t a = 0, b = 0, c = 0, d = 0, e = 0, f = 0, g = 0, h = 0;
    n /= 8;
    #pragma omp simd reduction(^:a,b,c,d,e,f,g,h)
    for (size_t i = 0; i < n; i++) {
        a ^= p[i], b ^= p[i + n], c ^= p[i + 2 * n], d ^= p[i + 3 * n];
        e ^= p[i + 4 * n], f ^= p[i + 5 * n], g ^= p[i + 6 * n], h ^= p[i + 7 * n];
    }
    return a ^ b ^ c ^ d ^ e ^ f ^ g ^ h;
}

uint64_t read_all(const uint64_t *p, size_t bytes, int threads) {
    uint64_t all = 0;
    size_t n = bytes / 8 / threads / 64 * 64;
    #pragma omp parallel for num_threads(threads) reduction(^:all)
    for (int t = 0; t < threads; t++) all ^= read_some(p + t * n, n);
    return all;
}

void copy_all(char *to, const char *from, size_t bytes, int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (size_t b = 0; b < bytes / BLOCK; b++) {
#ifdef __AVX2__
        for (size_t i = b * BLOCK; i < (b + 1) * BLOCK; i += 32)
            _mm256_stream_si256((__m256i *)(to + i), _mm256_load_si256((const __m256i *)(from + i)));
#else
        memcpy(to + b * BLOCK, from + b * BLOCK, BLOCK);
#endif
    }
}
"""


def _compiled() -> ctypes.CDLL | None:
    """The C functions, compiled for this machine; None without a compiler that knows OpenMP."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "limits.c"), Path(folder, "limits.so")
        source.write_text(_C)
        flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-o", str(library)]
        if subprocess.run([compiler, str(source), *flags], capture_output=True).returncode:
            return None
        found = ctypes.CDLL(str(library))  # stays mapped when the folder goes
    found.read_all.restype = ctypes.c_uint64
    return found


class Limits:
    """What the machine can read and copy, as contenders, so that every race has the figure of its own minutes.

    how: what measures it, in words.
    """

    def __init__(self, total: int = 1 << 30, slice: int = 32 << 20) -> None:
        threads, compiled = torch.get_num_threads(), _compiled()
        half = total // 2
        memory = pages.copy(torch.ones(total // 8, dtype=torch.int64))  # the limit is that of huge pages
        at = memory.data_ptr()
        parts = memory.split(slice // 8)
        to, of = parts[: len(parts) // 2], parts[len(parts) // 2 :]
        size, n = ctypes.c_size_t(slice), ctypes.c_int(threads)
        pointer = ctypes.c_void_p
        reads: Sequence[Call] = [p.sum for p in parts]
        copies: Sequence[Call] = [partial(a.copy_, b) for a, b in zip(to, of, strict=True)]
        self.how = "torch's sum and copy_ (no C compiler with OpenMP)"
        if compiled:
            self.how = "compiled C: exclusive or of all, streaming stores"
            reads = [partial(compiled.read_all, pointer(at + i), size, n) for i in range(0, total, slice)]
            copies = [
                partial(compiled.copy_all, pointer(at + i), pointer(at + half + i), size, n)
                for i in range(0, half, slice)
            ]
        self.read = Contender("DRAM read", reads, slice, "limit")
        self.copy = Contender("DRAM copy", copies, 2 * slice, "limit")
        self._memory = memory
