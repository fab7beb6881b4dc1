"""What it takes to quantize a model from disk to disk, a block at a time, told before it is begun."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import nn

from halfbyte import calibrate, matters
from halfbyte.containers.shards import MAX_SHARD
from halfbyte.models import blocks
from halfbyte.plan import Entry, totals
from halfbyte.solvers import Solver

PROCESS = 500_000_000  # bytes of a process that has read a model's tokenizer and none of its weights; measured
_FLOAT = 4  # bytes: what is computed is float32
_LEARNED = 10  # tensors of a weight's size while it is learned: numbers, codes, gradient, Adam's moments ...
_FORM = 16  # bytes an element of a Hessian while it is factored


@dataclass(frozen=True)
class Needs:
    """memory: bytes that will be resident at most, by estimate (some 20% right: see benchmarks/memory.py). disk: bytes
    beside the source while it runs: the result, a shard of it once more while that is put together and, until it is
    whole, the codes it is written from."""

    memory: int
    disk: int


def needs(
    model: nn.Module, entries: Sequence[Entry], solver: Solver, rows: int, length: int, as_gguf: bool = False,
    writes: bool = False, changed: bool = False,
) -> Needs:  # fmt: skip
    """Of a model, whose weights need not be in memory, that is to become `entries`. rows: of calibration text, of
    `length` tokens. as_gguf: whether the result is a GGUF file: codes that text finds then come together in memory.
    writes: whether the model writes that text itself, before, for which it is in memory as a whole. changed: whether it
    is made another one before, and so stays there."""
    inside = {prefix: [e for e in entries if e.name.startswith(f"{prefix}.")] for prefix, _ in blocks(model)}
    named = {e.name for found in inside.values() for e in found}
    alone = [[e] for e in entries if e.name not in named]  # what lies outside of blocks comes a weight at a time
    most = max(_held(part, solver, rows, length) for part in [*inside.values(), *alone] if part)
    if solver.refine and inside:
        asked, kept = _directions(list(inside.values()), [e for e in entries if e.name not in named], rows, length)
        most = max(asked, most + kept)
    codes = sum(e.bytes_after for e in entries if e.after is not None)
    _, before, after = totals(list(entries))
    if changed:
        most += before
    elif writes:
        most = max(most, before)
    return Needs(PROCESS + most + ((as_gguf and rows > 0) or changed) * codes, after + min(after, MAX_SHARD) + codes)


def _directions(inside: list[list[Entry]], outside: list[Entry], rows: int, length: int) -> tuple[int, int]:
    """Bytes while it is found which directions of what blocks give matter, and those of what is found and stays."""
    width = min(e.shape[-1] for part in inside for e in part if len(e.shape) > 1)
    kept = len(inside) * width * width * _FLOAT
    states = (len(inside) + 3) * min(rows, matters.ROWS) * length * width * _FLOAT
    block = max(sum(e.bytes_before + e.parameters * _FLOAT for e in part) for part in inside)
    passing = 2 * calibrate.TOGETHER * length * max(sum(prod(e.shape[:-1]) for e in part) for part in inside) * _FLOAT
    words = max((e.shape[0] for e in outside), default=0)
    logits = sum(e.bytes_before for e in outside) + 4 * length * words * _FLOAT
    return kept + states + max(block + passing, logits), kept


def _held(part: list[Entry], solver: Solver, rows: int, length: int) -> int:
    """Bytes while the weights of a block, or one outside of them, are made codes."""
    held = sum(e.bytes_before for e in part)
    made = [e for e in part if e.after is not None]
    if not made:
        return held
    held += sum(e.bytes_after for e in made)
    inputs, outputs = [e.shape[-1] for e in made], [prod(e.shape[:-1]) for e in made]
    largest = max(e.parameters for e in made) * _FLOAT
    states = rows * length * min(inputs) * _FLOAT
    passing = calibrate.TOGETHER * length * sum(outputs) * _FLOAT if rows else 0
    if not solver.needs_data:
        return held + 2 * states + max(2 * largest, passing)
    fed = {(e.name.rsplit(".", 2)[0], e.shape[-1]) for e in made}  # weights side by side are fed the same
    held += sum(e.bytes_before for e in made)  # what the codes stand for, while the block's last weight is found
    held += sum(n * n for _, n in fed) * _FLOAT
    n = max(inputs)
    solving = n * n * _FORM + 2 * largest
    if solver.refine:
        learning = sum(e.parameters for e in made) * _LEARNED * _FLOAT + 2 * passing
        solving = max(solving, learning)
    # of the float model, of the quantized one, what comes next; what the block is midway, in the one and in the other
    return held + 5 * states + max(passing, solving)
