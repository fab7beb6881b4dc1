"""The rows as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence

TITLES = {
    "kl": "Held to the float model (KL to it)", "domain": "Trained on prose, beside full precision trained alike",
    "seeds": "The same, seed by seed", "roads": "A fine-tune in 4 bits, on docstrings",
    "ranks": "LoRA by rank, on docstrings", "steps": "A step",
}  # fmt: skip


def _kl(found: dict | None) -> str:
    if found is None:
        return "-"
    mean, error = found["kl"]
    return f"{mean:.4f}" if error is None else f"{mean:.4f} ± {error:.4f}"  # one window has none


def _loss(found: dict) -> str:
    mean, low, high = found["loss"]
    return f"{mean:+.4f}" if low is None else f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def _minutes(r: dict) -> str:
    return "-" if "seconds" not in r else f"{r.get('solving', 0) / 60:.1f} + {r['seconds'] / 60:.1f}"


def _begun(r: dict, text: str) -> str:
    return _kl((r.get("begun") or {}).get(text))


Column = tuple[str, Callable[[dict], str]]
_NAME: tuple[Column, ...] = (
    ("what", lambda r: r["what"]), ("by", lambda r: r["name"]), ("rate", lambda r: f"{r['rate']:g}"),
)  # fmt: skip
_TIME: Column = ("minutes, solver + training", _minutes)
_PAIRED: tuple[Column, ...] = tuple(
    (f"loss against the first, {t}", lambda r, t=t: _loss(r[t])) for t in ("prose", "docstrings")
)
_AGAINST: tuple[Column, ...] = (
    *_NAME, _TIME, *_PAIRED,
    *((f"perplexity, {t}", lambda r, t=t: f"{r[t]['perplexity']:.3f}") for t in ("prose", "docstrings")),
)  # fmt: skip
_LOSSES: tuple[Column, ...] = tuple(
    (f"loss against the float model, {t}", lambda r, t=t: _loss(r[t])) for t in ("docstrings", "prose")
)
COLUMNS: dict[str, tuple[Column, ...]] = {
    "kl": (
        *_NAME, _TIME,
        *((f"KL before, {t}", lambda r, t=t: _begun(r, t)) for t in ("prose", "docstrings")),
        *((f"KL after, {t}", lambda r, t=t: _kl(r[t])) for t in ("prose", "docstrings")),
        ("loss, prose", lambda r: _loss(r["prose"])),
    ),
    "domain": _AGAINST, "seeds": (*_NAME, ("seeds", lambda r: r["seeds"]), _TIME, *_PAIRED),
    "roads": (*_NAME, _TIME, *_LOSSES),
    "ranks": (*_NAME, ("trainable", lambda r: f"{r['trainable']:,}"), _TIME, *_LOSSES),
    "steps": (
        ("what", lambda r: r["what"]), ("method", lambda r: r["name"]), ("seconds", lambda r: f"{r['seconds']:.2f}"),
        ("over", lambda r: "-" if r["over"] is None else f"{r['ratio']:.2f} x {r['over']}"),
    ),
}  # fmt: skip


def show(rows: Sequence[dict]) -> None:
    for name, title in TITLES.items():
        found = [r for r in rows if r["section"] == name]
        if found:
            heads = [head for head, _ in COLUMNS[name]]
            print(f"\n### {title}\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
            for r in found:
                print(f"| {' | '.join(cell(r) for _, cell in COLUMNS[name])} |")
