"""What an export takes in memory: some tensors, and not the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig

from halfbyte.containers.shards import write_shards
from halfbyte.models.loading import skeleton

MB = 1 << 20
KINDS = [
    ("hf", "F16"), ("compressed-tensors", "W4A16"), ("bitsandbytes", "NF4"), ("gptq", "W4A16"), ("mlx", "int4-g64"),
]  # fmt: skip
EXPORT = """
import json, resource, sys
from pathlib import Path
import torch
from halfbyte import export, kinds

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
small, large, out, wanted = sys.argv[1:]
found = {}
for name, format in json.loads(wanted):
    for source in (small, large):  # what a library takes once is not counted
        before = peak()
        kind, to = kinds.KINDS[name], Path(out) / (name + kinds.KINDS[name].SUFFIX)
        job = export.prepare(export.read(source, torch.float16), kind, format, False)
        export.export(source, job, kind, to, None, overwrite=True)
    found[name] = peak() - before
print(json.dumps(found))
"""


def written(folder: Path, hidden: int, layers: int) -> int:
    """A Llama of random weights, written one at a time. Gives back its bytes."""
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, num_attention_heads=8,
        vocab_size=1024, tie_word_embeddings=True, dtype="float32", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    shapes = [(n, p.shape) for n, p in skeleton(config).named_parameters()]
    return write_shards(folder, ((n, torch.rand(shape) - 0.5) for n, shape in shapes))


def test_an_export_takes_a_few_tensors_and_not_the_model(tmp_path):
    written(tmp_path / "small", 64, 1)
    size, largest = written(tmp_path / "large", 1024, 5), 4 * 1024 * 1024 * 4
    assert size > 300 * MB
    argv = [tmp_path / "small", tmp_path / "large", tmp_path / "out", json.dumps(KINDS)]
    done = subprocess.run([sys.executable, "-c", EXPORT, *map(str, argv)], capture_output=True, text=True, check=True)
    taken = json.loads(done.stdout)
    assert set(taken) == {name for name, _ in KINDS}
    assert max(taken.values()) < 6 * largest < size / 3, taken  # rounding a weight takes some times its own memory
