"""bench.json as the README's table: `python benchmarks/kernels/summary.py bench.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

SHAPE = "4096x4096"
FORMATS = ("int4-g128", "int4-g64", "int4-g32", "uint4-g128", "uint4-g32", "nf4-g64", "nf4-g64-dq", "q4_0", "q4_k")
FORMATS += ("int8-channel", "int8-g128")


def _cell(rows: list[dict[str, Any]], section: str, op: str, m: int, name: str) -> dict[str, Any] | None:
    keys = {"section": section, "op": op, "shape": SHAPE, "m": m, "name": name}
    return next((r for r in rows if all(r[k] == v for k, v in keys.items())), None)


def _few(r: dict[str, Any] | None) -> str:
    if r is None or r["of_limit"] is None or r["cached"] or r["of_limit"] > 1.05:
        return "-"  # more than the memory gives: from a cache, or the memory's own turns were disturbed
    speed = f"{r['by_call']:.2f}x ({r['speedup']:.2f}x)"
    return f"{r['seconds'] * 1e3:.2f} ms, {r['gbs']:.0f} GB/s ({r['of_limit']:.0%}), {speed}"


def _many(rows: list[dict[str, Any]], op: str, m: int, name: str) -> str:
    ours, torch = _cell(rows, "gemm", op, m, name), _cell(rows, "gemm", op, m, "torch bf16")
    return "-" if ours is None or torch is None else f"{ours['seconds'] / torch['seconds']:.2f}"


def main() -> None:
    data = json.loads(Path(sys.argv[1]).read_text())
    rows, machine = data["rows"], data["machine"]
    print(f"{machine['cores']} cores with {', '.join(machine['features'])}; a {SHAPE} weight, bfloat16 inputs:\n")
    print("| format | M = 1 | M = 4 | M = 128, 512, 2048 | their gradients |\n|---|---|---|---|---|")
    for name in FORMATS:
        few = " | ".join(_few(_cell(rows, "linear", "linear", m, name)) for m in (1, 4))
        many = " | ".join(
            ", ".join(_many(rows, op, m, name) for m in (128, 512, 2048)) for op in ("linear", "linear_grad")
        )
        print(f"| `{name}` | {few} | {many} |")


if __name__ == "__main__":
    main()
