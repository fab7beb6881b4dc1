"""What the verbs share: their common options, and who gets which output."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from halfbyte.plan import Entry

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id, .gguf file or adapter folder.")]
Output = Annotated[Path, typer.Option("-o", "--output", help="The folder, or file, to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, and nothing else there.")]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Do not have a file read back by its own reader.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the checkpoint's own if left out.")]
GroupSize = Annotated[int | None, typer.Option(help="Weights that share a scale; never changed once given.")]
Calibration = Annotated[str | None, typer.Option(help="Text for solvers that take some: a file, self or none.")]
Samples = Annotated[int | None, typer.Option(min=1, help="Rows of it; 32, or 16 that the model writes itself.")]
MaxLength = Annotated[int, typer.Option("--max-length", min=1, help="Tokens a row of it.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from an interrupted run of this command.")]
Imatrix = Annotated[str | None, typer.Option(help="llama.cpp's importance matrix, instead of such text.")]
Transforms = Annotated[
    list[str] | None, typer.Option("--transform", help="What is done before, in this order: awq, smooth, hadamard.")
]
Untie = Annotated[bool, typer.Option("--untie", help="Let hadamard give the head a weight of its own.")]
TargetBits = Annotated[float | None, typer.Option(help="Choose each weight's format for so many bits a weight.")]
TargetSize = Annotated[str | None, typer.Option(help="Choose them for weight files of at most 90MB, 1.5GB ...")]
MaxKL = Annotated[float | None, typer.Option("--max-kl", help="Choose them for the smallest result within this KL.")]
FormatNames = Annotated[str | None, typer.Option("--formats", help="What is chosen from, such as q4_k,q6_k,q8_0.")]
SolverName = Annotated[str, typer.Option("--solver", help="How codes are found: rtn, hqq, gptq, autoround.")]


def say(line: str) -> None:
    """Progress and messages go to standard error."""
    print(line, file=sys.stderr, flush=True)


def emit(values: dict[str, Any]) -> None:
    """The one JSON object of --json; numbers that JSON has no word for become null."""
    print(json.dumps(_finite(values), default=str))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


def show_plan(entries: list[Entry], to: Callable[[str], None] = say) -> None:
    """What becomes of the parameters, those that fare alike on one line, to standard error or elsewhere."""
    from halfbyte.plan import summary, totals

    for becomes, count, example, before, after, why in summary(entries):
        more = f"{count} x {example}" if count > 1 else example
        to(f"  {becomes:18} {more:50} {before / 1e6:9.2f} -> {after / 1e6:8.2f} MB  {why}".rstrip())
    n, before, after = totals(entries)
    to(f"  {n:,} parameters: {before / 1e6:.1f} -> {after / 1e6:.1f} MB, {8 * after / n:.2f} bits a weight")


def progress(what: str, every: float = 2.0) -> Callable[[int, int], None]:
    """A callback (done, total) that says so, at most every few seconds and at the end."""
    last = time.monotonic()

    def on(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= every or (done == total and total > 1):
            last = time.monotonic()
            say(f"{what} {done}/{total}")

    return on


def training_progress(total: int, every: float = 5.0) -> Callable[[dict[str, float]], None]:
    """A callback for rows of the loss curve: loss, speed, time left."""
    began = last = time.monotonic()
    recent: list[float] = []

    def on(row: dict[str, float]) -> None:
        nonlocal last
        recent.append(row["loss"])
        now, step = time.monotonic(), int(row["step"])
        if now - last < every and step != total and "eval_loss" not in row:
            return
        last = now
        left = (now - began) / step * (total - step)
        held = f", held-out {row['eval_loss']:.4f}" if "eval_loss" in row else ""
        mean = sum(recent) / len(recent)
        recent.clear()
        say(f"step {step}/{total}: loss {mean:.4f}{held}, {row['tokens_per_second']:.0f} tokens/s, {left:.0f} s left")

    return on
