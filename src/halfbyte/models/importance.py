"""Importance matrices of llama.cpp's, for a model's own names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from halfbyte.containers import imatrix
from halfbyte.errors import InputError
from halfbyte.layers import Linear, ops
from halfbyte.models.gguf import architecture_of
from halfbyte.models.structure import tied


def importance(model: Any, path: str | Path) -> dict[str, Tensor]:
    """op's name -> the mean squares of its inputs, float32 (in,). Raises InputError for a file that cannot be read or
    is of another model, and for an architecture without names in GGUF."""
    said, arch, shared = imatrix.read(path), architecture_of(model.config), tied(model)
    out = {}
    for name, op in ops(model):
        squares = said.get(arch.tensor(f"{name}.weight", model.config))
        if squares is None or not isinstance(op, Linear):
            continue
        if len(squares) != op.in_features:
            raise InputError(
                f"{path} is of another model: it has {len(squares)} inputs of {name}, which has {op.in_features}."
            )
        out[shared.get(name, name)] = squares
    if not out:
        raise InputError(f"{path} is of another model: it names none of its weights.")
    return out
