"""What a run found: rows, notes and the machine; as tables, and as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from race import Contender, Limits, Pace, race
from rich.console import Console
from rich.table import Table

from halfbyte import kernels

CACHE = 400 << 20  # weights that take less in all may come from a cache


@dataclass
class Row:
    """One contender of one race.

    of_limit: bytes a second over those of `limit`, DRAM read or DRAM copy, in the same race. cached: whether the
    copies were few enough to stay in a cache. speedup: `against`'s time over this one's, more than 1 is faster;
    by_call: the same against the fastest peer that is called once a product, as ours are. error: relative, in norm, of
    ours to its own weight as dequantized, of a peer to the weight before it was quantized.
    """

    section: str
    op: str
    shape: str
    m: int
    name: str
    kind: str
    family: str
    seconds: float
    nbytes: int
    gbs: float
    limit: str
    of_limit: float
    cached: bool
    gflops: float | None = None
    of_dots: float | None = None
    against: str | None = None
    speedup: float | None = None
    by_call: float | None = None
    error: float | None = None


class Board:
    """The rows of a run, and what could not be timed.

    notes: status ("missing", "does not apply", "not there yet", "wrong") -> name -> reason -> where. dots: GFLOP/s of
    torch's bfloat16 product, the limit where memory is none.
    """

    def __init__(self, pace: Pace, limits: Limits) -> None:
        self.pace, self.limits = pace, limits
        self.rows: list[Row] = []
        self.notes: dict[str, dict[str, dict[str, list[str]]]] = defaultdict(lambda: defaultdict(dict))
        self.dots = float("nan")
        self.console = Console(width=150, highlight=False)
        self.began = time.time()

    def note(self, status: str, name: str, reason: str, where: str) -> None:
        """Says once, at once, why something is not timed, and keeps it for the end."""
        reason = " ".join(reason.split())[:200]
        places = self.notes[status][name].setdefault(reason, [])
        if where not in places:
            places.append(where)
        if len(places) == 1 and status in ("wrong", "not there yet"):
            self.console.print(f"{status}: not timed: {name}, {where}: {reason}", markup=False)

    def compare(
        self,
        section: str,
        op: str,
        shape: str,
        m: int,
        contenders: list[Contender],
        *,
        flops: int = 0,
        against: str | None = None,
        limit: Contender | None = None,
    ) -> None:
        """Races contenders and the machine's limit, and prints the table.

        against: whom halfbyte's rows are compared with; left out, the fastest peer of their family.
        """
        if not contenders:
            return
        bound = limit or self.limits.read
        *times, at_limit = race([*contenders, bound], self.pace)
        ceiling = bound.nbytes / at_limit
        rows, at_once = [], {c.name for c in contenders if c.products > 1}
        for c, t in zip(contenders, times, strict=True):
            cached = c.kind != "limit" and len(c.calls) * c.products * c.nbytes < CACHE
            row = Row(section, op, shape, m, c.name, c.kind, c.family, t, c.nbytes, c.nbytes / t / 1e9, bound.name,
                      c.nbytes / t / ceiling, cached, error=c.error)  # fmt: skip
            if flops:
                row.gflops = flops / t / 1e9
                row.of_dots = row.gflops / self.dots
            rows.append(row)
        for row in rows:
            if row.kind == "halfbyte":
                rivals = [
                    r for r in rows if r.kind == "peer" and (r.name == against if against else r.family == row.family)
                ]
                if rivals:
                    best = min(rivals, key=lambda r: r.seconds)
                    row.against, row.speedup = best.name, best.seconds / row.seconds
                called = [r.seconds for r in rivals if r.name not in at_once]
                row.by_call = min(called) / row.seconds if called else None
        self.rows += rows
        self._table(f"{op} {shape}{f', M={m}' * bool(m)}: {bound.name} {ceiling / 1e9:.1f} GB/s", rows)

    def _table(self, title: str, rows: list[Row]) -> None:
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for column in (
            "",
            "ms",
            "MB",
            "GB/s",
            "of limit",
            "GFLOP/s",
            "of dots",
            "error",
            "by call",
            "speedup",
            "against",
        ):
            table.add_column(column, justify="left" if column in ("", "against") else "right", no_wrap=True)
        for r in sorted(rows, key=lambda r: r.seconds):
            table.add_row(
                f"* {r.name}" if r.kind == "halfbyte" else f"  {r.name}",
                f"{r.seconds * 1e3:.4f}",
                f"{r.nbytes / 1e6:.2f}",
                f"{r.gbs:.1f}",
                f"{r.of_limit:.0%}" + ("c" if r.cached else " "),
                *(("", "") if r.gflops is None else (f"{r.gflops:.0f}", f"{r.of_dots:.0%}")),
                "" if r.error is None else f"{r.error:.1e}",
                "" if r.by_call is None else f"{r.by_call:.2f}",
                "" if r.speedup is None else f"{r.speedup:.2f}",
                r.against or "",
            )
        self.console.print(table)
        self.console.print()

    def print_notes(self) -> None:
        for status, names in self.notes.items():
            self.console.print(f"{status}:", markup=False)
            for name, reasons in names.items():
                for reason, places in reasons.items():
                    self.console.print(f"  {name}: {reason} ({', '.join(places)})", markup=False)
        self.console.print(
            f"{time.time() - self.began:.0f} s. * halfbyte's. c: copies of less than {CACHE >> 20} MB in all, which a"
            " cache may hold. of limit: of the DRAM read (or copy) of the same race; of dots: of torch's bfloat16"
            f" product, {self.dots:.0f} GFLOP/s. error: ours to the weight as dequantized, a peer's to the weight"
            " before it was quantized. speedup: against the best peer; by call: against the best that is called once a"
            " product, as ours are: sessions of ONNX Runtime and graphs of ggml do all copies in a call.",
            markup=False,
        )

    def write(self, path: Path, targets: list[dict]) -> None:
        found = {
            "machine": machine(self.limits),
            "pace": self.pace._asdict(),
            "seconds": round(time.time() - self.began, 1),
            "bf16_gflops": self.dots,
            "rows": [asdict(r) for r in self.rows],
            "notes": self.notes,
            "targets": targets,
        }
        path.write_text(json.dumps(found, indent=1))


_FEATURES = {
    "avx2": "AVX2", "fma": "FMA", "f16c": "F16C", "avx512f": "AVX-512", "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX VNNI", "avx512_bf16": "AVX-512 BF16", "avx512_fp16": "AVX-512 FP16", "amx_bf16": "AMX BF16",
    "amx_int8": "AMX INT8", "asimd": "NEON", "asimddp": "NEON dot product", "i8mm": "NEON int8 matrices",
    "bf16": "NEON BF16", "sve": "SVE",
}  # fmt: skip
_PACKAGES = ("halfbyte", "torch", "numpy", "bitsandbytes", "onnxruntime", "torchao", "llama-cpp-python")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine(limits: Limits) -> dict[str, object]:
    """What the figures depend on, in words."""
    info = Path("/proc/cpuinfo")
    lines = [line.split(":", 1) for line in info.read_text().splitlines() if ":" in line] if info.exists() else []
    facts = {k.strip(): v.strip() for k, v in reversed(lines)}
    flags = facts.get("flags", facts.get("Features", "")).split()
    l3 = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": facts.get("model name", platform.processor() or platform.machine()),
        "features": [words for flag, words in _FEATURES.items() if flag in flags],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "l3_cache": l3.read_text().strip() if l3.exists() else None,
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version()} | {p: v for p in _PACKAGES if (v := _version(p))},
        "isa_forced": os.environ.get("HALFBYTE_ISA"),
        "served_by": kernels.served_by(),
        "limits_by": limits.how,
    }
