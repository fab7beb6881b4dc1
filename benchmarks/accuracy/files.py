"""GGUF files: our quantizer, our solver and our choice of formats beside llama.cpp's and ik_llama.cpp's quantizers.

All write from the same F32 file; all results are read by halfbyte and their values computed with in float32: what is
compared are the weights alone.
"""

from __future__ import annotations

import ctypes
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import ik
from setting import Setting
from torch import Tensor

from halfbyte import bits, calibrate, data, export, kinds, run
from halfbyte.containers.gguf import write as write_gguf
from halfbyte.layers import Linear, ops
from halfbyte.models import gguf, gguf_saving

MIXES = "Q8_0,Q5_K_M,Q4_K_M,Q4_K_S,Q3_K_M,Q4_0,Q2_K"
IK_MIXES = "Q5_K_M,Q4_K_M,IQ4_K,Q3_K_M,IQ4_KS,IQ4_KT,IQ3_K,IQ2_K"
SIZES = "144.810976,117,112.103392,105.454048,102.03952,93.510112,91.726816,88.201696,85.1,80"  # MB: those of the mixes

_kept: list[Any] = []  # the callback that keeps llama.cpp quiet: it must outlive the call


@dataclass(frozen=True)
class Written:
    """A file's row, before it is measured. what: the mix, or the size asked for."""

    what: str
    by: str
    calibration: str
    write: Callable[[Path, Path], None]


def llama_cpp(source: Path, out: Path, mix: str, squares: Mapping[str, Tensor] | None = None) -> None:
    """llama.cpp's own quantizer, with the mean squares of inputs by GGUF's names, if any."""
    library: Any = import_module("llama_cpp")
    if not _kept:
        _kept.append(library.llama_log_callback(lambda level, text, user: None))
        library.llama_log_set(_kept[0], None)
    params = library.llama_model_quantize_default_params()
    params.ftype, params.nthread = getattr(library, f"LLAMA_FTYPE_MOSTLY_{mix}"), 2
    if squares:
        entry = library.llama_cpp.llama_model_imatrix_data
        held = {n: s.contiguous() for n, s in squares.items()}
        rows = [
            entry(n.encode(), ctypes.cast(s.data_ptr(), ctypes.POINTER(ctypes.c_float)), s.numel())
            for n, s in held.items()
        ]
        params.imatrix = (entry * (len(rows) + 1))(*rows, entry(None, None, 0))
    status = library.llama_model_quantize(str(source).encode(), str(out).encode(), params)
    assert status == 0, status


def ours(source: Path, out: Path, mix: Any, **settings: Any) -> None:
    kind = kinds.KINDS["gguf"]
    job = export.job(export.read(source), kind, mix, False, export.Found(**settings))
    export.export(source, job, kind, out, None)


def importance(model: Any, rows: data.Dataset) -> dict[str, Tensor]:
    """The mean squares of all linear layers' inputs, by GGUF's names; those of a head that shares the embeddings'
    weight under its name, where llama.cpp looks for them."""
    names = [n for n, op in ops(model) if isinstance(op, Linear)]
    batches = list(data.eval_batches(rows, 1, 0))
    arch = gguf.architecture_of(model.config)
    found = calibrate.moments(model, batches, names, "squares")
    named = {arch.tensor(f"{n}.weight", model.config): m.squares for n, m in found.items()}
    if model.config.tie_word_embeddings and "output.weight" in named:
        named["token_embd.weight"] = named.pop("output.weight")
    return named


def as_imatrix(path: Path, squares: Mapping[str, Tensor]) -> Path:
    """The same as a file of llama.cpp's."""
    tensors = {f"{n}.in_sum2": s[None] for n, s in squares.items()}
    tensors |= {f"{n}.counts": s.new_ones(1, 1) for n, s in squares.items()}
    heads = {n: ("f32", tuple(t.shape)) for n, t in tensors.items()}
    write_gguf(path, {"general.architecture": "imatrix", "general.type": "imatrix"}, heads, tensors.items())
    return path


def by_mix(setting: Setting, folder: Path, mixes: str, text: str, plain: bool) -> Iterator[Written]:
    """The same mix by llama.cpp and by us; without a matrix too, if `plain`."""
    rows = setting.calibration(text)
    squares = importance(setting.reference.model, rows)
    matrix = as_imatrix(folder / f"{text}.imatrix.gguf", squares)
    for mix in filter(None, mixes.split(",")):
        if plain:
            yield Written(mix, "llama.cpp", "", lambda s, o, m=mix: llama_cpp(s, o, m))
            yield Written(mix, "halfbyte", "", lambda s, o, m=mix: ours(s, o, m))
        yield Written(mix, "llama.cpp, matrix", text, lambda s, o, m=mix: llama_cpp(s, o, m, squares))
        yield Written(mix, "halfbyte, matrix", text, lambda s, o, m=mix: ours(s, o, m, imatrix=matrix))
        yield Written(
            mix, "halfbyte, gptq", text,
            lambda s, o, m=mix: ours(s, o, m, solver="gptq", calibration=rows, samples=len(rows)),
        )  # fmt: skip


def by_ik(setting: Setting, program: Path, mixes: str, text: str) -> Iterator[Written]:
    """ik_llama.cpp's mixes with a matrix; its file is kept for its size, and read as the floats it stands for."""
    squares = importance(setting.reference.model, setting.calibration(text))
    for mix in filter(None, mixes.split(",")):
        yield Written(mix, "ik_llama.cpp, matrix", text, lambda s, o, m=mix: ik.quantize(program, s, o, m, squares))


def by_size(setting: Setting, sizes: str, text: str, solver: str) -> Iterator[Written]:
    """Files of at most so many MB, their formats chosen by what they cost at each weight."""
    rows = setting.calibration(text)
    measured = bits.Measured(calibration=rows, samples=len(rows))
    choices = bits.check(setting.reference.loaded, bits.candidates(None, ".gguf"), True, None, None)
    costs = measured.costs(setting.copy(), choices, measured.rows(setting.reference))
    for size in filter(None, sizes.split(",")):
        scheme = costs.within(int(float(size) * 1e6)).scheme
        yield Written(
            f"{float(size):g} MB", f"halfbyte, bits chosen, {solver}", text,
            lambda s, o, c=scheme: ours(s, o, c, solver=solver, calibration=rows, samples=len(rows)),
        )  # fmt: skip


def measured(setting: Setting, rows: Callable[[Path], Iterator[Written]], program: Path | None) -> Iterator[dict]:
    """Writes and measures one row after the other."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, out = folder / "f32.gguf", folder / "out.gguf"
        gguf_saving.save(setting.reference.loaded, source, {})
        for row in rows(folder):
            out.unlink(missing_ok=True)
            began = time.perf_counter()
            row.write(source, out)
            seconds, size = time.perf_counter() - began, out.stat().st_size / 1e6
            readable = out
            if row.by.startswith("ik") and program is not None:
                readable = folder / "read.gguf"
                ik.as_f32(program, out, readable)
            there = run.load(readable, "float32")
            run.dequantize(there)
            yield {
                "what": row.what, "by": row.by, "calibration": row.calibration, "MB": round(size, 1),
                "seconds": round(seconds, 1), **setting.measured(there),
            }  # fmt: skip
