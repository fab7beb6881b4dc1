"""Our GGUF files beside those that llama.cpp itself writes: bytes, and KL to the float model, mix by mix.

    python benchmarks/mixes.py [--mixes Q4_K_M,Q4_0] [--windows 8] [--calibration 16] [--heldout] [--sizes 80,93.5]

The model is SmolLM2-135M off its grid (see searches.py). All write from the same F32 file; all results are read by
halfbyte, their values computed with in float32: what is compared are the weights alone. With --calibration, both are
also given the importance of inputs from so many windows of the domain's training text (llama.cpp the very numbers that
our own rounding takes), and ours is solved by GPTQ on the same windows; with --sizes also files of at most so many MB
whose formats are chosen by what they cost at each weight. Text is what the demo trains on, windows that
calibration does not see, so that choices made here do not spoil the held-out text; --heldout measures on that, for
figures that are told.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from searches import off_the_grid
from torch import Tensor

from halfbyte import bits, calibrate, data, evaluate, export, kinds, models, run, sample_data
from halfbyte.cli.demo import packaged
from halfbyte.containers.gguf import write as write_gguf
from halfbyte.layers import Linear, ops
from halfbyte.models import gguf, gguf_saving

MIXES = "Q8_0,Q6_K,Q5_K_M,Q5_K_S,Q5_1,Q5_0,Q4_K_M,Q4_K_S,IQ4_NL,Q4_1,Q4_0,Q3_K_L,Q3_K_M,Q3_K_S,Q2_K"

_kept: list[Any] = []  # the callback that keeps llama.cpp quiet: it must outlive the call


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
    """The mean squares of all linear layers' inputs, by GGUF's names."""
    names = [n for n, op in ops(model) if isinstance(op, Linear)]
    batches = list(data.eval_batches(rows, 1, 0))
    arch = gguf.architecture_of(model.config)
    found = calibrate.moments(model, batches, names, "squares")
    return {arch.tensor(f"{n}.weight", model.config): m.squares for n, m in found.items()}


def as_imatrix(path: Path, squares: Mapping[str, Tensor]) -> Path:
    """The same as a file of llama.cpp's."""
    tensors = {f"{n}.in_sum2": s[None] for n, s in squares.items()}
    tensors |= {f"{n}.counts": torch.ones(1, 1) for n in squares}
    heads = {n: ("f32", tuple(t.shape)) for n, t in tensors.items()}
    write_gguf(path, {"general.architecture": "imatrix", "general.type": "imatrix"}, heads, tensors.items())
    return path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mixes", default=MIXES)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--calibration", type=int, default=0)
    parser.add_argument("--heldout", action="store_true")
    parser.add_argument("--sizes", default="", help="MB of files whose formats are chosen by weight, such as 80,93.5")
    args = parser.parse_args()
    loaded = run.load(packaged(), "float32")
    run.dequantize(loaded)
    off_the_grid(loaded.model, models.roles(loaded.model))
    part = "heldout" if args.heldout else "train"
    texts = {"domain": sample_data.domain_text(), "docstrings": sample_data.docstring_task()}
    encoded = {k: data.encode(data.records(v[part][:400]), loaded.tokenizer, 512) for k, v in texts.items()}
    rows = {k: replace(r, rows=r.rows[: args.windows]) for k, r in encoded.items()}
    references = {k: evaluate.Reference(loaded.model, keep=2_000_000_000) for k in rows}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "f32.gguf"
        gguf_saving.save(loaded.loaded, source, {})
        contenders: dict[str, Any] = {"llama.cpp": llama_cpp, "halfbyte": ours}
        if args.calibration:
            train = data.encode(data.records(texts["domain"]["train"]), loaded.tokenizer, 512)
            train = replace(train, rows=train.rows[args.windows :][: args.calibration])
            squares = importance(loaded.model, train)
            text = [{"text": loaded.tokenizer.decode(r.input_ids)} for r in train.rows]
            matrix = as_imatrix(Path(folder) / "imatrix.gguf", squares)
            contenders |= {
                "llama.cpp, matrix": lambda s, o, m: llama_cpp(s, o, m, squares),
                "halfbyte, matrix": lambda s, o, m: ours(s, o, m, imatrix=matrix),
                "halfbyte, gptq": lambda s, o, m: ours(s, o, m, solver="gptq", calibration=text),
            }

        def row(mix: str, by: str, write: Any) -> None:
            out = Path(folder) / "out.gguf"
            out.unlink(missing_ok=True)
            began = time.perf_counter()
            write(source, out)
            seconds = time.perf_counter() - began
            there = run.load(out, "float32")
            run.dequantize(there)
            found = {k: evaluate.measure(there.model, rows[k], references[k]) for k in rows}
            kl = {k: [round(m.kl_mean or 0, 4), round(m.kl_error or 0, 4)] for k, m in found.items()}
            size = round(out.stat().st_size / 1e6, 1)
            print(json.dumps({"mix": mix, "by": by, "MB": size, "seconds": round(seconds, 1), "kl": kl}), flush=True)

        for mix in filter(None, args.mixes.split(",")):
            for who, write in contenders.items():
                row(mix, who, lambda s, o, write=write, mix=mix: write(s, o, mix))
        if args.sizes:
            assert args.calibration, "--sizes needs --calibration"
            sizes = bits.check(loaded.loaded, bits.candidates(None, ".gguf"), True, None, None)
            measured = bits.Measured(calibration=train)
            began = time.perf_counter()
            costs = measured.costs(loaded, sizes, measured.rows(loaded))
            print(json.dumps({"sensitivity": round(time.perf_counter() - began, 1)}), flush=True)
            for size in args.sizes.split(","):
                scheme = costs.within(int(float(size) * 1e6)).scheme
                row(f"{size} MB", "halfbyte, bits chosen, gptq",
                    lambda s, o, scheme=scheme: ours(s, o, scheme, solver="gptq", calibration=text))  # fmt: skip


if __name__ == "__main__":
    with torch.no_grad():
        main()
