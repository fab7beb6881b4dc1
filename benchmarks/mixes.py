"""Our GGUF files beside those that llama.cpp itself writes: bytes, and KL to the float model, mix by mix.

    python benchmarks/mixes.py [--mixes Q4_K_M,Q4_0] [--windows 8] [--heldout]

The model is SmolLM2-135M off its grid (see searches.py). Both write from the same F32 file; both results are read by
halfbyte, their values computed with in float32: what is compared are the weights alone. Text is what the demo trains
on, so that choices made here do not spoil the held-out text; --heldout uses that, for figures that are told.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from searches import off_the_grid

from halfbyte import data, evaluate, export, kinds, models, run, sample_data
from halfbyte.cli.demo import packaged
from halfbyte.models import gguf_saving

MIXES = "Q8_0,Q6_K,Q5_K_M,Q5_K_S,Q5_1,Q5_0,Q4_K_M,Q4_K_S,IQ4_NL,Q4_1,Q4_0,Q3_K_L,Q3_K_M,Q3_K_S,Q2_K"


_kept: list[Any] = []  # the callback that keeps llama.cpp quiet: it must outlive the call


def llama_cpp(source: Path, out: Path, mix: str) -> None:
    """llama.cpp's own quantizer."""
    library: Any = import_module("llama_cpp")
    if not _kept:
        _kept.append(library.llama_log_callback(lambda level, text, user: None))
        library.llama_log_set(_kept[0], None)
    params = library.llama_model_quantize_default_params()
    params.ftype, params.nthread = getattr(library, f"LLAMA_FTYPE_MOSTLY_{mix}"), 2
    status = library.llama_model_quantize(str(source).encode(), str(out).encode(), params)
    assert status == 0, status


def ours(source: Path, out: Path, mix: str) -> None:
    job = export.prepare(export.read(source), kinds.KINDS["gguf"], mix, False)
    export.export(source, job, kinds.KINDS["gguf"], out, None)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mixes", default=MIXES)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--heldout", action="store_true")
    args = parser.parse_args()
    loaded = run.load(packaged(), "float32")
    run.dequantize(loaded)
    off_the_grid(loaded.model, models.roles(loaded.model))
    part = "heldout" if args.heldout else "train"
    texts = {"domain": sample_data.domain_text()[part], "docstrings": sample_data.docstring_task()[part][:400]}
    rows = {k: data.encode(data.records(v), loaded.tokenizer, 512) for k, v in texts.items()}
    for r in rows.values():
        r.rows[:] = r.rows[: args.windows]
    references = {k: evaluate.Reference(loaded.model, keep=2_000_000_000) for k in rows}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "f32.gguf"
        gguf_saving.save(loaded.loaded, source, {})
        for mix in args.mixes.split(","):
            for who, write in (("llama.cpp", llama_cpp), ("halfbyte", ours)):
                out = Path(folder) / f"{mix}.gguf"
                out.unlink(missing_ok=True)
                began = time.perf_counter()
                write(source, out, mix)
                seconds = time.perf_counter() - began
                there = run.load(out, "float32")
                run.dequantize(there)
                found = {k: evaluate.measure(there.model, rows[k], references[k]) for k in rows}
                kl = {k: [round(m.kl_mean or 0, 4), round(m.kl_error or 0, 4)] for k, m in found.items()}
                size = round(out.stat().st_size / 1e6, 1)
                print(
                    json.dumps({"mix": mix, "by": who, "MB": size, "seconds": round(seconds, 1), "kl": kl}), flush=True
                )


if __name__ == "__main__":
    with torch.no_grad():
        main()
