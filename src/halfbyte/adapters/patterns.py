"""Settings of single layers: PEFT's rank_pattern and alpha_pattern."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from halfbyte.containers.peft import meets

PATTERNS = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}  # settings by layer, of what all others have one of


def own(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The settings of one layer: of PEFT's rank_pattern and alpha_pattern the first row whose key meets its name."""
    out = {k: v for k, v in settings.items() if k not in PATTERNS}
    for pattern, key in PATTERNS.items():
        if found := [v for k, v in (settings.get(pattern) or {}).items() if meets(k, name)]:
            out[key] = found[0]
    return out


def unmet(settings: Mapping[str, Any], names: list[str]) -> str | None:
    """A key of the patterns that meets no layer of these."""
    keys = [k for pattern in PATTERNS for k in settings.get(pattern) or {}]
    return next((k for k in keys if not any(meets(k, n) for n in names)), None)
