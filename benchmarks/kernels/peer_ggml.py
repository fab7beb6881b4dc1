"""ggml's matrix products, through the shared libraries that llama-cpp-python brings.

By ctypes, since its Python names only llama's functions. Prototypes are those of ggml.h, ggml-backend.h, ggml-alloc.h
and ggml-cpu.h as of llama-cpp-python 0.3.36 (ggml 0.25); no struct but ggml_init_params is looked into.
"""

from __future__ import annotations

import ctypes as ct
import importlib.util
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

P, I, L, S = ct.c_void_p, ct.c_int, ct.c_int64, ct.c_size_t
_F32 = 0
TYPES = {"Q4_0": 2, "Q8_0": 8, "Q4_K": 12}  # enum ggml_type


class _InitParams(ct.Structure):
    _fields_ = [("mem_size", S), ("mem_buffer", P), ("no_alloc", ct.c_bool)]


_BASE = {
    "ggml_init": (P, _InitParams),
    "ggml_free": (None, P),
    "ggml_log_set": (None, P, P),
    "ggml_new_tensor_2d": (P, P, I, L, L),
    "ggml_mul_mat": (P, P, P, P),
    "ggml_new_graph_custom": (P, P, S, ct.c_bool),
    "ggml_graph_overhead_custom": (S, S, ct.c_bool),
    "ggml_tensor_overhead": (S,),
    "ggml_build_forward_expand": (None, P, P),
    "ggml_row_size": (S, I, L),
    "ggml_quantize_chunk": (S, I, P, P, L, L, L, P),
    "ggml_backend_cpu_buffer_type": (P,),
    "ggml_backend_buft_name": (ct.c_char_p, P),
    "ggml_backend_alloc_ctx_tensors_from_buft": (P, P, P),
    "ggml_backend_buffer_free": (None, P),
    "ggml_backend_tensor_set": (None, P, P, S, S),
    "ggml_backend_tensor_get": (None, P, P, S, S),
    "ggml_backend_supports_op": (ct.c_bool, P, P),
    "ggml_backend_graph_compute": (I, P, P),
    "ggml_backend_reg_dev_get": (P, P, S),
    "ggml_backend_reg_get_proc_address": (P, P, ct.c_char_p),
}
_CPU = {
    "ggml_backend_cpu_init": (P,),
    "ggml_backend_cpu_set_n_threads": (None, P, I),
    "ggml_backend_cpu_reg": (P,),
}


class _Library:
    """The functions of ggml that are used, a CPU backend, and the memory types that repack weights."""

    def __init__(self) -> None:
        found = importlib.util.find_spec("llama_cpp")  # not imported: only its libraries are wanted
        if found is None or found.origin is None:
            raise ImportError("llama-cpp-python is not installed")
        folder = Path(found.origin).parent / "lib"
        for name, functions in (("ggml-base", _BASE), ("ggml-cpu", _CPU)):
            files = sorted(folder.glob(f"lib{name}.*"))
            if not files:
                raise ImportError(f"llama-cpp-python brings no lib{name}")
            library = ct.CDLL(str(files[0]))
            for function, (result, *arguments) in functions.items():
                prototype = getattr(library, function)
                prototype.restype, prototype.argtypes = result, arguments
                setattr(self, function.removeprefix("ggml_"), prototype)
        self._quiet = ct.CFUNCTYPE(None, I, ct.c_char_p, P)(lambda level, text, data: None)
        self.log_set(self._quiet, None)  # it says for every weight that it was repacked
        self.backend = self.backend_cpu_init()
        self.plain = self.backend_cpu_buffer_type()
        register = self.backend_cpu_reg()
        extra = self.backend_reg_get_proc_address(register, b"ggml_backend_dev_get_extra_bufts")
        types = ct.CFUNCTYPE(ct.POINTER(P), P)(extra)(self.backend_reg_dev_get(register, 0)) if extra else [None]
        self.repacking = []
        while types[len(self.repacking)]:
            self.repacking.append(types[len(self.repacking)])

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(f"this ggml has no {name}")

    def context(self, tensors: int) -> int:
        """A context for so many tensors and a graph of them, without their data."""
        size = tensors * self.tensor_overhead() + self.graph_overhead_custom(tensors, False)
        return self.init(_InitParams(size, None, True))


_library = cache(_Library)


@dataclass
class Copies:
    """A weight (n, k) several times in memory. where: the name of the memory type, such as CPU_REPACK."""

    context: int
    tensors: list[int]
    n: int
    k: int
    nbytes: int
    where: str


def _free(g: _Library, context: int, buffer: int) -> None:
    g.backend_buffer_free(buffer)
    g.free(context)


def _repacked(g: _Library, kind: int, n: int, k: int) -> int:
    """The memory type that llama.cpp would take for this weight: the first whose products the backend knows."""
    for memory in g.repacking:
        context = g.context(3)
        weight = g.new_tensor_2d(context, kind, k, n)
        buffer = g.backend_alloc_ctx_tensors_from_buft(context, memory)
        product = g.mul_mat(context, weight, g.new_tensor_2d(context, _F32, k, 1))
        known = buffer and g.backend_supports_op(g.backend, product)
        if buffer:
            g.backend_buffer_free(buffer)
        g.free(context)
        if known:
            return memory
    raise RuntimeError(f"ggml repacks no weight of this type with {n} rows of {k}")


def quantized(w: Tensor, kind: str, copies: int, repack: bool) -> Copies:
    """w (n, k) in one of ggml's types, as llama.cpp would have it in memory."""
    g, (n, k), number = _library(), w.shape, TYPES[kind]
    block = 256 if kind.endswith("_K") else 32
    if k % block:
        raise ValueError(f"blocks of {block} do not divide {k} inputs")
    memory = _repacked(g, number, n, k) if repack else g.plain
    nbytes = n * g.row_size(number, k)
    source, packed = w.float().contiguous(), torch.empty(nbytes, dtype=torch.uint8)
    g.quantize_chunk(number, source.data_ptr(), packed.data_ptr(), 0, n, k, None)
    context = g.context(copies)
    tensors = [g.new_tensor_2d(context, number, k, n) for _ in range(copies)]
    buffer = g.backend_alloc_ctx_tensors_from_buft(context, memory)
    for t in tensors:
        g.backend_tensor_set(t, packed.data_ptr(), 0, nbytes)
    found = Copies(context, tensors, n, k, nbytes, g.backend_buft_name(memory).decode())
    weakref.finalize(found, _free, g, context, buffer)
    return found


class Product:
    """x (m, k) times all copies, one graph. Calling it gives the last product, a view of what the next call reuses."""

    def __init__(self, weight: Copies, x: Tensor) -> None:
        g = _library()
        g.backend_cpu_set_n_threads(g.backend, torch.get_num_threads())
        self.context = g.context(2 * len(weight.tensors) + 1)
        self.graph = g.new_graph_custom(self.context, 2 * len(weight.tensors) + 1, False)
        operand = g.new_tensor_2d(self.context, _F32, weight.k, x.shape[0])
        self.last = 0
        for t in weight.tensors:
            self.last = g.mul_mat(self.context, t, operand)
            g.build_forward_expand(self.graph, self.last)
        buffer = g.backend_alloc_ctx_tensors_from_buft(self.context, g.plain)
        source = x.float().contiguous()
        g.backend_tensor_set(operand, source.data_ptr(), 0, source.nbytes)
        self.out = torch.empty(x.shape[0], weight.n)
        self.weight = weight  # the graph points into it
        self.compute = partial(g.backend_graph_compute, g.backend, self.graph)
        self.read = partial(g.backend_tensor_get, self.last, self.out.data_ptr(), 0, self.out.nbytes)
        weakref.finalize(self, _free, g, self.context, buffer)

    def __call__(self) -> Tensor:
        if status := self.compute():
            raise RuntimeError(f"ggml's graph ended with status {status}")
        self.read()
        return self.out
