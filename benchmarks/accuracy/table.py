"""The rows as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

TITLES = {
    "floor": "The noise floor", "eight": "8 bits, and rounded inputs (projections only)",
    "w4": "4 bits (projections only)", "w3": "3 bits (projections only)", "w2": "2 bits (projections only)",
    "mixes": "GGUF files, type by type the same", "ik": "ik_llama.cpp's files", "sizes": "GGUF files of a size",
}  # fmt: skip
HEAD = ("what", "by", "calibrated on", "MB", "seconds", "KL, prose", "KL, docstrings", "loss, prose", "top-1, prose")


def show(rows: Sequence[dict]) -> None:
    for name, title in TITLES.items():
        found = [r for r in rows if r["section"] == name]
        if found:
            print(f"\n### {title}\n\n| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
            for r in found:
                print(f"| {' | '.join(_cells(r))} |")


def _cells(r: dict) -> list[str]:
    prose, other = r["prose"], r["docstrings"]
    loss, low, high = prose["loss"]
    interval = "" if low is None else f" [{low:+.3f}, {high:+.3f}]"  # one window has none
    return [
        r["what"], r["by"], r["calibration"] or "-", _number(r["MB"]), _number(r["seconds"]), _kl(prose), _kl(other),
        f"{loss:+.3f}{interval}", f"{prose['top1']:.1%}",
    ]  # fmt: skip


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _kl(found: dict) -> str:
    value, error = found["kl"]
    digits = 5 if value < 0.01 else 4 if value < 0.1 else 3
    return f"{value:.{digits}f}" if error is None else f"{value:.{digits}f} ± {error:.{digits}f}"
