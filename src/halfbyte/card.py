"""The model card that goes with every result: base, licence, data, recipe, ledger."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from halfbyte.models import Loaded


def write_card(folder: Path, name: str, base: Loaded, notes: dict[str, Any], rows: Rows) -> None:
    """README.md in a result's folder, with the metadata that hubs read. base: what was begun with; notes: what was
    done; rows: the ledger."""
    front = [
        "---",
        *([f"license: {licence}"] if (licence := _licence(base)) else []),
        *([f"base_model: {base.source}"] if _is_hub_id(base.source) else []),
        "tags: [halfbyte]",
        "---",
    ]
    # where things lay is nobody's business
    notes = {k: v for k, v in notes.items() if k not in ("data", "eval_data", "original")}
    lines = [
        *front,
        f"# {name}",
        "",
        f"Made by halfbyte from `{base.source if _is_hub_id(base.source) else Path(base.source).name}` "
        f"(weights sha256 `{base.sha256[:16]}`).",
        f"Licence: {licence or 'that of the base model, which does not state one'}.",
        "",
        "## Recipe",
        "",
        "```json",
        json.dumps(notes, indent=1, default=str),
        "```",
    ]
    if rows:
        lines += ["", "## Ledger", "", *ledger_table(rows)]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _is_hub_id(source: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", source)) and not Path(source).exists()


def _licence(base: Loaded) -> str | None:
    """The base's own statement, from its card's front matter."""
    card = base.path / "README.md"
    if not card.is_file():
        return None
    for line in card.read_text(encoding="utf-8", errors="replace").splitlines()[:40]:
        if line.startswith("license:"):
            return line.removeprefix("license:").strip()
    return None


Rows = list[tuple[str, dict[str, Any]]]  # the ledger: (stage, figures)


def figures(row: dict[str, Any]) -> dict[str, str]:
    """A ledger row as short texts, by column."""

    def pm(value: str, error: str, digits: int) -> str:
        if row.get(value) is None:
            return ""
        spread = f" ± {row[error]:.{digits}f}" if row.get(error) is not None else ""
        return f"{row[value]:.{digits}f}{spread}"

    low, high = row.get("loss_difference_low"), row.get("loss_difference_high")
    interval = f" [{low:+.4f}, {high:+.4f}]" if low is not None and high is not None else ""
    difference = row.get("loss_difference")
    size, bits = row.get("bytes"), row.get("bits_per_weight")
    return {
        "perplexity": pm("perplexity", "perplexity_error", 2),
        "loss difference [95%]": "" if difference is None else f"{difference:+.4f}{interval}",
        "KL": pm("kl_mean", "kl_error", 4),
        "KL p99": "" if row.get("kl_p99") is None else f"{row['kl_p99']:.3f}",
        "top-1": "" if row.get("top1_agreement") is None else f"{100 * row['top1_agreement']:.1f}%",
        "accuracy": pm("accuracy", "accuracy_error", 3),
        "MB": f"{size / 1e6:.1f}" if size else "",
        "bits/weight": f"{bits:.2f}" if bits else "",
    }


def ledger_table(rows: Rows) -> list[str]:
    """Lines of a Markdown table, a stage a row; columns that no row fills are left out."""
    cells = [figures(row) for _, row in rows]
    columns = [c for c in cells[0] if any(r[c] for r in cells)]
    head = [f"| stage | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    return head + [
        f"| {stage} | {' | '.join(c[k] for k in columns)} |" for (stage, _), c in zip(rows, cells, strict=True)
    ]
