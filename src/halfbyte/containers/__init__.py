"""Layouts on disk that other programs read. A container is a file here and a row in CONTAINERS."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from halfbyte.containers import awq, bitsandbytes, compressed_tensors, gptq, mlx
from halfbyte.errors import InputError
from halfbyte.formats import SOURCE, Format
from halfbyte.qtensor import QTensor

Get = Callable[[str], Tensor]  # reads one tensor of the checkpoint by its name on disk


class Container(Protocol):
    """A layout for the quantized weights of a Hugging Face folder. Names are module paths without ".weight"."""

    METHOD: str  # config.json's quantization_config.quant_method
    READER: str  # who reads it, for messages
    FLOATS: tuple[torch.dtype, ...]  # of a model, whose scales it keeps as they are

    def refuses(self, f: Format, role: str) -> str | None:
        """Why a weight of this format and role (see scheme.py) cannot be held; None if it can."""
        ...

    def encode(self, name: str, q: QTensor, input: Format | None = None) -> dict[str, Tensor]:
        """The tensors on disk, by full name, of the weight of module `name` whose inputs are in format `input`."""
        ...

    def config(self, sites: Mapping[str, tuple[QTensor, Format | None]], kept: list[str]) -> dict[str, Any]:
        """quantization_config for the given quantized modules (weight, input format) and kept ones."""
        ...

    def formats(self, config: Mapping[str, Any], names: set[str], get: Get) -> dict[str, tuple[Format, Format | None]]:
        """From a quantization_config and the names on disk: module -> (weight format, input format)."""
        ...

    def decode(
        self, name: str, f: Format, shape: tuple[int, ...], get: Get, config: Mapping[str, Any] = {}
    ) -> QTensor:  # fmt: skip
        """The weight of module `name`, codes unchanged; config: as `formats` got it, and the dtype of the floats beside
        the codes as "dtype". Raises InputError if sizes do not fit."""
        ...


CONTAINERS: dict[str, Container] = {
    c.METHOD: c  # pyright: ignore[reportAssignmentType]
    for c in (compressed_tensors, bitsandbytes, gptq, mlx, awq)
}


# Those that transformers reads: what a folder becomes unless another is asked for. GPTQ's is that of GPT-2 in integers.
DEFAULTS = (compressed_tensors, bitsandbytes, gptq)


def container_for(
    sites: Mapping[str, tuple[Format, str]],
    first: Container | None = None,
    rounded: bool = False,
    dtypes: Collection[torch.dtype] = (),
) -> Container:
    """The first container that holds all of these (module -> format, role): `first`, then those of DEFAULTS, then MLX's
    where zero points are added, which no other has. rounded: whether inputs are rounded, which compressed-tensors
    alone holds. dtypes: what the weights were. Raises InputError with each one's reason if none does."""
    reasons = []
    own = [mlx] if any(f.zero == SOURCE for f, _ in sites.values()) else []
    able = [compressed_tensors] if rounded else [*([first] if first else []), *DEFAULTS, *own]
    for c in dict.fromkeys(c.METHOD for c in able):  # pyright: ignore
        why = next((f"{name}: {w}" for name, (f, role) in sites.items() if (w := CONTAINERS[c].refuses(f, role))), None)
        if why is None and (wide := next((d for d in dtypes if d not in CONTAINERS[c].FLOATS), None)):
            why = f"it keeps scales in float16, not in {str(wide).removeprefix('torch.')}: add --dtype float16"
        if why is None:
            return CONTAINERS[c]
        reasons.append(f"{c} ({why})")
    raise InputError(f"no folder layout that others read can hold this model: {'; '.join(reasons)}.")
