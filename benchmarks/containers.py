"""One fine-tuned model in every container, measured by the containers' own readers, beside llama.cpp's own files.

    python benchmarks/containers.py [--steps 32] [--windows 8] [--exports gguf:BF16,...] [--json FILE]

SmolLM2-135M from its package is fine-tuned with QLoRA on the demo's domain text, merged to bfloat16, and exported. Each
result is opened by its reader and measured on held-out text: KL of the reader's logits to halfbyte's reading of the
same file (what the container costs) and to the merged model in float32 (what the format costs). llama.cpp's quantizer
starts from the same merged model, written as BF16 GGUF.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from mixes import llama_cpp

from halfbyte import data, evaluate, export, kinds, run, sample_data
from halfbyte.cli.demo import packaged
from halfbyte.errors import BudgetExceeded, InputError
from halfbyte.folders import disk_bytes
from halfbyte.methods import merge_steps, method_steps
from halfbyte.recipe import save

EXPORTS = "gguf:BF16,gguf:Q8_0,gguf:Q4_K_M,gguf:Q4_0,compressed-tensors:W4A16,onnx:W4A16,bitsandbytes:NF4"
PEERS = ("Q8_0", "Q4_K_M", "Q4_0")
COLUMNS = "| file | by | MB | perplexity | KL to our reading | KL to the merged model | top-1 |"


def merged(folder: Path, steps: int) -> Path:
    """The fine-tuned model, in bfloat16."""
    records = data.records(sample_data.domain_text()["train"])
    made = run.load(packaged())
    settings = {"data": records, "steps": steps, "batch_size": 4, "max_length": 256, "learning_rate": 1e-3}
    for step in [*method_steps("qlora", None, settings), *merge_steps(made)]:
        step(made)
    return save(made, folder / "merged")


def line(name: str, by: str, size: int, own: dict[str, Any] | None, before: dict[str, Any]) -> str:
    reading = "" if own is None else f"{own['kl_mean']:.5f}"
    return (
        f"| {name} | {by} | {size / 1e6:.1f} | {before['perplexity']:.3f} | {reading} | {before['kl_mean']:.4f} "
        f"± {before['kl_error']:.4f} | {100 * before['top1_agreement']:.1f}% |"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--exports", default=EXPORTS, help="kind:format, the first of which is gguf:BF16")
    parser.add_argument("--json")
    args = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = merged(folder, args.steps)
        heldout = data.records(sample_data.domain_text()["heldout"])
        proof = export.Proof(heldout, args.windows)
        print(COLUMNS, "|---|---|---|---|---|---|---|", sep="\n", flush=True)
        for kind_name, scheme in (e.split(":") for e in args.exports.split(",")):
            kind = kinds.KINDS[kind_name]
            out = folder / f"{kind_name}-{scheme}{kind.SUFFIX}"
            try:
                job = export.prepare(export.read(source), kind, scheme, False)
                done = export.export(source, job, kind, out, proof)
            except (BudgetExceeded, InputError) as e:
                print(f"| {kind_name} {scheme} | not written: {e} |", flush=True)
                continue
            if not done.rows:
                print(f"| {kind_name} {scheme} | not read back: {kind.missing()} |", flush=True)
                continue
            (_, own), (_, before) = done.rows
            print(line(f"{kind_name} {scheme}", "halfbyte", disk_bytes(out), own, before), flush=True)
            found.append({"kind": kind_name, "format": scheme, "by": "halfbyte", "own": own, "before": before})
        found += peers(folder, source, heldout, args.windows)
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


def peers(folder: Path, source: Path, heldout: list[data.Record], windows: int) -> list[dict[str, Any]]:
    """llama.cpp's own files of the same model, in the same reader."""
    kind = kinds.KINDS["gguf"]
    before = run.load(source, "float32")
    rows = data.encode(heldout, before.needs_tokenizer, evaluate.CONTEXT)
    rows.rows[:] = rows.rows[:windows]
    reference, found = evaluate.Reference(before.model), []
    for mix in PEERS:
        out = folder / f"peer-{mix}.gguf"
        llama_cpp(folder / "gguf-BF16.gguf", out, mix)
        row = evaluate.measure(kind.open(out, evaluate.CONTEXT), rows, reference, 1).as_dict()
        print(line(f"gguf {mix}", "llama.cpp", out.stat().st_size, None, row), flush=True)
        found.append({"kind": "gguf", "format": mix, "by": "llama.cpp", "before": row})
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
