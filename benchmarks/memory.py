"""Peak memory of quantizing a model that is larger: a 2-billion-parameter random checkpoint in bf16, by rtn and gptq.

    python benchmarks/memory.py [--keep FOLDER] [--layers 29] [--solvers rtn,gptq] [--to int4-g64]

The checkpoint (4 GB) is written a tensor at a time. Each command runs as a process of its own; what is printed is the
most memory that was resident in it, and its time, beside what it takes to read the checkpoint and to write as many
bytes as the result has. With one of llama.cpp's mixes, `--solvers rtn --to Q4_K_M`, its own quantizer comes after, on
as many threads, from a GGUF file of the same weights.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from halfbyte import models, sample_data
from halfbyte.cli.demo import packaged
from halfbyte.containers.shards import write_shards
from halfbyte.folders import disk_bytes
from halfbyte.scheme import MIXES

HALFBYTE = [sys.executable, "-m", "halfbyte"]
TARGETS = {"rtn": 1.2e9, "gptq": 3.0e9}  # bytes


def make(folder: Path, layers: int) -> int:
    """A Llama of 2048 x 8192 with SmolLM2's tokenizer and random weights: its parameters."""
    from transformers import LlamaConfig

    tokenizer = models.load(packaged(), weights=False).tokenizer
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128_256, tie_word_embeddings=True, max_position_embeddings=4096,
        architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    model = models.skeleton(config)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, shape in shapes.items():
            w = torch.empty(shape, dtype=torch.bfloat16)
            yield name, w.fill_(1) if len(shape) == 1 else w.normal_(0, 0.02, generator=generator)

    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_shards(folder, tensors(), 900_000_000)
    return sum(torch.Size(s).numel() for s in shapes.values())


def peak(command: list[str]) -> tuple[float, float]:
    """Bytes resident at most, and seconds, of a process."""
    code = (
        "import resource, subprocess, sys; r = subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode; "
        "print(r, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"
    )
    began = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    status, most = out.stdout.split()
    assert status == "0", out.stderr[-2000:]
    return float(most), time.perf_counter() - began


def by_llama(folder: Path, temporary: Path, to: str) -> dict[str, object]:
    """llama.cpp's own quantizer of a mix."""
    import llama_cpp

    floats, out = temporary / "floats.gguf", temporary / "llama.gguf"
    export = ["export", str(folder), "--to", "gguf", "--format", "BF16", "--no-verify", "-o", str(floats)]
    subprocess.run([*HALFBYTE, *export], check=True, stderr=subprocess.DEVNULL)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.nthread, settings.ftype = torch.get_num_threads(), getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{to.upper()}")
    began = time.perf_counter()
    failed = llama_cpp.llama_model_quantize(bytes(floats), bytes(out), ctypes.byref(settings))
    assert not failed, failed
    return {
        "by": "llama.cpp",
        "seconds": round(time.perf_counter() - began, 1),
        "written_mb": round(out.stat().st_size / 1e6),
    }


def copied(folder: Path, out: Path, size: int) -> float:
    """Seconds that it takes to read a checkpoint through, and to write so many bytes."""
    began, step = time.perf_counter(), 1 << 24
    room = bytearray(step)
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb", buffering=0) as f:
            while f.readinto(room):
                pass
    with open(out, "wb", buffering=0) as f:
        for at in range(0, size, step):
            f.write(memoryview(room)[: min(step, size - at)])
    out.unlink()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--layers", type=int, default=29)
    parser.add_argument("--solvers", default="rtn,gptq")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--to", default="int4-g64")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary) / "model"
        parameters = 0 if folder.exists() else make(folder, args.layers)
        text = Path(temporary) / "text.jsonl"
        text.write_text("".join(json.dumps(t) + "\n" for t in sample_data.domain_text()["train"]))
        disk = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        print(json.dumps({"parameters": parameters, "disk": disk}), flush=True)
        mix = args.to.upper() in MIXES
        for solver in args.solvers.split(","):
            out = Path(temporary) / (f"{solver}.gguf" if mix else solver)
            how = [str(folder), "--to", args.to, "--solver", solver]
            if solver != "rtn":
                how += ["--calibration", str(text), "--samples", str(args.samples)]
            told = subprocess.run([*HALFBYTE, "plan", *how, "--json"], capture_output=True, text=True, check=True)
            most, seconds = peak([*HALFBYTE, "quantize", *how, "-o", str(out), *(["--no-verify"] if mix else [])])
            size = disk_bytes(out)
            line = {"solver": solver, "resident_gb": round(most / 1e9, 3), "target_gb": TARGETS.get(solver, 0) / 1e9,
                    "planned_gb": round(json.loads(told.stdout)["peak_memory"] / 1e9, 3), "seconds": round(seconds, 1),
                    "written_mb": round(size / 1e6),
                    "copy_seconds": round(copied(folder, Path(temporary) / "copy", size), 1)}  # fmt: skip
            print(json.dumps(line), flush=True)
        if mix:
            print(json.dumps(by_llama(folder, Path(temporary), args.to)), flush=True)


if __name__ == "__main__":
    main()
