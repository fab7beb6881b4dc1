"""Integers in the blocks' projections alone: our solvers beside the peers', in turn, on the very same tokens."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peer import PEERS
from safetensors.torch import load_file, save_file
from setting import Setting

from halfbyte import run
from halfbyte.layers import ops
from halfbyte.run import Run
from halfbyte.steps import Freeze, Transform

GROUP = 64


@dataclass(frozen=True)
class Ours:
    """rows: of calibration text; None for the setting's own number."""

    scheme: str
    solver: str
    transforms: tuple[str, ...] = ()
    rows: int | None = None

    @property
    def name(self) -> str:
        return " + ".join((*self.transforms, self.solver))


@dataclass(frozen=True)
class Peer:
    """bits and iterations: see peer.py."""

    name: str
    bits: int
    iterations: int | None = None
    rows: int | None = None


AT_4_BITS = (
    Ours(f"uint4-g{GROUP}-affine", "gptq"), Ours(f"uint4-g{GROUP}-affine", "autoround", rows=64),
    Ours(f"int4-g{GROUP}", "autoround", rows=256),
    Ours(f"int4-g{GROUP}", "gptq", rows=256),
    Ours(f"int4-g{GROUP}", "gptq", ("hadamard",)), Ours(f"int4-g{GROUP}", "gptq", ("hadamard",), rows=256),
    Peer("bitsandbytes", 4), Peer("plain", 4),
)  # fmt: skip
SECTIONS: dict[str, tuple[Ours | Peer, ...]] = {
    f"w{bits}": (
        Ours(f"int{bits}-g{GROUP}", "rtn"), Ours(f"uint{bits}-g{GROUP}-affine", "hqq"), Peer("hqq", bits),
        Ours(f"int{bits}-g{GROUP}", "gptq"), Peer("llmcompressor", bits),
        Peer("autoround", bits, iterations=50, rows=32), Ours(f"int{bits}-g{GROUP}", "autoround", rows=64),
        Ours(f"int{bits}-g{GROUP}", "gptq", rows=64), *(AT_4_BITS if bits == 4 else ()),
    )
    for bits in (4, 3, 2)
}  # fmt: skip
SECTIONS["eight"] = (
    Ours("int8-channel", "rtn"), Ours("int8-channel", "gptq"), Ours("W8A8", "rtn"), Ours("W8A8", "gptq"),
    Ours("W8A8", "rtn", ("hadamard", "smooth")), Ours("W8A8", "gptq", ("hadamard", "smooth")),
    Ours("W8A8_STATIC", "gptq", ("hadamard", "smooth")), Ours("W4A8", "gptq", ("hadamard",)),
)  # fmt: skip


def ours(setting: Setting, row: Ours, text: str) -> tuple[Run, float]:
    """The model with codes, and the seconds that they took."""
    there, rows = setting.copy(), setting.calibration(text, row.rows)
    shared: dict[str, Any] = {"scheme": row.scheme, "calibration": rows, "samples": len(rows)}
    began = time.perf_counter()
    for name in row.transforms:
        Transform(name=name, untie=True, **shared)(there)
    Freeze(solver=row.solver, **shared)(there)
    return there, time.perf_counter() - began


def peer(setting: Setting, python: Path, row: Peer, text: str) -> tuple[Run, float]:
    """Our reference with a peer's weights in it."""
    there, rows = setting.copy(), setting.calibration(text, row.rows)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        there.write(folder, "reference")
        save_file({"input_ids": torch.stack([r.input_ids.long() for r in rows.rows])}, folder / "rows.safetensors")
        out = folder / "out.safetensors"
        arguments = [row.name, folder, folder / "rows.safetensors", row.bits, GROUP, out]
        arguments += ["--iterations", row.iterations] if row.iterations else []
        done = subprocess.run(
            [python, Path(__file__).parent / "peer.py", *map(str, arguments)], stdout=subprocess.PIPE, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{row.name} failed, see above.")
        found = load_file(out)
    for site, op in ops(there.model):
        if f"{site}.weight" in found:
            op.weight.store(found.pop(f"{site}.weight"))
    assert not found, f"{row.name} gave weights that the model has not: {list(found)[:3]}"
    return there, json.loads(done.stdout.splitlines()[-1])["seconds"]


def measured(setting: Setting, rows: tuple[Ours | Peer, ...], text: str, python: Path | None) -> Iterator[dict]:
    """One row after the other; peers are left out where there is no `python` that has them, and what wants more text
    than there is."""
    for row in rows:
        if text != "self" and (row.rows or 0) > (there_are := len(setting.training(text))):
            print(f"{row.name} on {row.rows} rows is left out: {text} has {there_are}.", flush=True)
            continue
        if isinstance(row, Peer):
            if python is None:
                continue
            try:
                there, seconds = peer(setting, python, row, text)
            except RuntimeError as failure:
                print(failure, flush=True)
                continue
            what, by = f"int{row.bits}-g{GROUP}", PEERS[row.name].title
            what = {"bitsandbytes": "nf4-g64", "hqq": f"uint{row.bits}-g{GROUP}-affine"}.get(row.name, what)
            by += f", {row.iterations} iterations" if row.iterations else ""
        else:
            there, seconds = ours(setting, row, text)
            what, by = row.scheme, f"halfbyte, {row.name}"
            if "A8" not in row.scheme:
                run.dequantize(there)
        count = len(setting.calibration(text, row.rows))
        yield {
            "what": what, "by": by, "calibration": f"{text}, {count} rows", "MB": None, "seconds": round(seconds, 1),
            **setting.measured(there),
        }  # fmt: skip
