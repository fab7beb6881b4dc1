"""The targets of the kernels, each a ratio of one run, and whether the rows of a run reach them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from report import Row
from rich.console import Console

FOUR_BITS = "4-bit"
EIGHT_BITS = "8-bit"


@dataclass
class Target:
    """value(row) must be at least `least`, or at most `most`, in every row that `rows` selects; the worst decides.

    With neither bound there is nothing to reach, and the range is stated.
    """

    text: str
    rows: Callable[[Row], bool]
    value: Callable[[Row], float | None]
    least: float | None = None
    most: float | None = None
    unit: str = "x"

    def judge(self, rows: list[Row]) -> dict:
        """The target as one line of the report: worst row, how many rows reach it, and those that do not."""
        found = [(v, r) for r in rows if r.kind == "halfbyte" and self.rows(r) and (v := self.value(r)) is not None]
        found.sort(key=lambda pair: pair[0], reverse=self.most is not None)  # the worst first
        missed = [(v, r) for v, r in found if not self._reached(v)]
        return {
            "target": self.text,
            "reached": None if not found else not missed,
            "bounded": self.least is not None or self.most is not None,
            "rows": len(found),
            "worst": self._show(*found[0]) if found else None,
            "best": self._show(*found[-1]) if found else None,
            "missed": [self._show(v, r) for v, r in missed],
        }

    def _reached(self, value: float) -> bool:
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)

    def _show(self, value: float, r: Row) -> str:
        rows = f" M={r.m}" if r.m else ""
        return f"{value:.0%}" * (self.unit == "%") + f"{value:.2f}x" * (self.unit == "x") + f" {r.name} {r.shape}{rows}"


def _time_ratio(r: Row) -> float | None:
    return None if r.speedup is None else 1 / r.speedup


def _linear(family: str, m: int, dram: bool = False) -> Callable[[Row], bool]:
    return lambda r: r.section == "linear" and r.family == family and r.m == m and not (dram and r.cached)


def _many(op: str, m: int) -> Callable[[Row], bool]:
    return lambda r: r.section == "gemm" and r.op == op and r.m == m


def _int8(begin: str, m: int, dram: bool = False) -> Callable[[Row], bool]:
    return lambda r: r.section == "int8" and r.name.startswith(begin) and r.m == m and not (dram and r.cached)


def _section(section: str, op: str = "") -> Callable[[Row], bool]:
    return lambda r: r.section == section and r.op.startswith(op)


def _of_limit(r: Row) -> float | None:
    return r.of_limit


def _speedup(r: Row) -> float | None:
    return r.speedup


def _by_call(r: Row) -> float | None:
    return r.by_call


TARGETS = [
    Target("4 bits, M=1, from DRAM: at least 90% of DRAM", _linear(FOUR_BITS, 1, True), _of_limit, 0.90, unit="%"),
    *(
        Target(f"4 bits, M={m}: at least 1.2x the best 4-bit peer", _linear(FOUR_BITS, m), _speedup, 1.2)
        for m in (1, 4)
    ),
    *(
        Target(f"4 bits, M={m}: speed against peers called once a product", _linear(FOUR_BITS, m), _by_call)
        for m in (1, 4)
    ),
    Target("8 bits, M=1, from DRAM: at least 90% of DRAM", _linear(EIGHT_BITS, 1, True), _of_limit, 0.90, unit="%"),
    *(
        Target(f"8 bits, M={m}: at least 0.97x the best 8-bit peer", _linear(EIGHT_BITS, m), _speedup, 0.97)
        for m in (1, 4)
    ),
    *(
        Target(f"{op}, M={m}: at most 1.10x the time of torch's bf16", _many(op, m), _time_ratio, most=1.10)
        for op in ("linear", "linear_grad")
        for m in (128, 512, 2048)
    ),
    *(
        Target(f"{w}, M=512: at most 1.05x the time of FBGEMM", _int8(w, 512), _time_ratio, most=1.05)
        for w in ("W8A8", "W4A8")
    ),
    Target("W4A8, M=1, x in int8: at least 90% of DRAM", _int8("int8 x, W4A8", 1, True), _of_limit, 0.90, unit="%"),
    Target("W4A8, M=1, x rounded in the call: part of DRAM", _int8("W4A8", 1, True), _of_limit, unit="%"),
    *(
        Target(f"{op}: GB/s as a part of DRAM copy", _section("quantize", op), _of_limit, unit="%")
        for op in ("quantize", "dequantize")
    ),
    *(
        Target(f"{op}: speed of bitsandbytes or torchao", _section("quantize", op), _speedup)
        for op in ("quantize", "dequantize")
    ),
    Target("fake: GB/s as a part of DRAM copy", _section("fake"), _of_limit, unit="%"),
    Target("fake: speed of torch or torchao", _section("fake"), _speedup),
    Target(
        "decode step: at least 1.5x torch's int4 of the same group",
        lambda r: r.section == "decode" and r.name.startswith("int4"),
        _speedup,
        1.5,
    ),
    Target(
        "decode step: speed of bitsandbytes", lambda r: r.section == "decode" and r.name.startswith("nf4"), _speedup
    ),
]


def judge(rows: list[Row]) -> list[dict]:
    return [t.judge(rows) for t in TARGETS]


def show(found: list[dict], console: Console) -> None:
    """A line a target; below it up to six rows that miss it, the worst first."""
    console.print("targets", style="bold")
    for t in found:
        if t["reached"] is None:
            console.print(f"  not measured  {t['target']}", markup=False)
            continue
        word = "stated" if not t["bounded"] else "yes" if t["reached"] else "no"
        reach = f"worst {t['worst']}; best {t['best']}"
        part = f"; {t['rows'] - len(t['missed'])} of {t['rows']}" if t["bounded"] else ""
        console.print(f"  {word:12}  {t['target']}: {reach}{part}", markup=False, soft_wrap=True)
        for line in t["missed"][1:6]:
            console.print(f"                    {line}", markup=False)
        if len(t["missed"]) > 6:
            console.print(f"                    and {len(t['missed']) - 6} more", markup=False)
