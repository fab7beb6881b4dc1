"""The layout of AWQ (AutoAWQ's "gemm"): unsigned 4-bit integers in groups along the input. It is read, not written.

A weight of shape (out, in) is `X.qweight` int32 (in, out / 8), `X.qzeros` int32 (groups, out / 8) and `X.scales` fp16
(groups, out). A word holds eight outputs, in the order 0, 2, 4, 6, 1, 3, 5, 7 from its lowest bits.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halfbyte.containers.words import from_words, typed
from halfbyte.errors import InputError
from halfbyte.formats import FORMATS, Format
from halfbyte.qtensor import QTensor, check_parts, pack

if TYPE_CHECKING:
    from halfbyte.containers import Get

METHOD = "awq"
READER = "AutoAWQ, vLLM"
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_PLACE = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # where output 0, 1, 2 ... of eight lies in its word


def refuses(f: Format, role: str) -> str | None:
    """See Container."""
    return "AWQ's layout is only read; GPTQ's holds the same codes"


def encode(name: str, q: QTensor, input: Format | None = None) -> dict[str, Tensor]:
    """See Container; never called."""
    raise InputError(f"{name}: {refuses(q.format, 'linear')}.")


def config(sites: Mapping[str, tuple[QTensor, Format | None]], kept: list[str]) -> dict[str, Any]:
    """See Container; never called."""
    raise InputError("AWQ's layout is only read.")


def formats(config: Mapping[str, Any], names: set[str], get: Get) -> dict[str, tuple[Format, Format | None]]:
    """See Container. The group is told by the shapes. Raises InputError for other versions of the layout."""
    version = config.get("version", "gemm")
    version = version.lower() if isinstance(version, str) else version
    if version != "gemm" or config.get("bits", config.get("w_bit", 4)) != 4:
        raise InputError(
            f"quantization_config: AWQ's version {reprlib.repr(version)} is not read; gemm with 4 bits is."
        )
    out: dict[str, tuple[Format, Format | None]] = {}
    for name in sorted(n.removesuffix(".qweight") for n in names if n.endswith(".qweight")):
        if missing := next((p for p in ("scales", "qzeros") if f"{name}.{p}" not in names), None):
            raise InputError(f"{name}.{missing} is missing.")
        words, scales = get(f"{name}.qweight"), get(f"{name}.scales")
        if words.ndim != 2 or scales.ndim != 2:
            raise InputError(f"{name}: its codes and scales should be matrices.")
        inputs, groups = words.shape[0], scales.shape[0]
        if not groups or inputs % groups:
            raise InputError(f"{name}: {groups} groups do not divide its {inputs} inputs.")
        out[name] = (FORMATS["uint4-channel" if groups == 1 else f"uint4-g{inputs // groups}"], None)
    return out


def decode(name: str, f: Format, shape: tuple[int, ...], get: Get, config: Mapping[str, Any] = {}) -> QTensor:
    """See Container."""
    (rows, cols), groups = shape, f.groups(shape)[1]
    words = typed(f"{name}.qweight", get(f"{name}.qweight"), (torch.int32,), (cols, rows // 8))
    zeros = typed(f"{name}.qzeros", get(f"{name}.qzeros"), (torch.int32,), (groups, rows // 8))
    scale = typed(f"{name}.scales", get(f"{name}.scales"), FLOATS, (groups, rows))
    parts: dict[str, Tensor | QTensor] = {
        "codes": pack(_outputs(words, rows).T.contiguous(), 4),
        "scale": scale.T.contiguous(),
        "zero": _outputs(zeros, rows).T.contiguous(),
    }
    return check_parts(QTensor(f, shape, scale.dtype, parts))


def _outputs(words: Tensor, rows: int) -> Tensor:
    """int32 (n, rows / 8) -> uint8 (n, rows)."""
    return from_words(words, 4, rows).unflatten(1, (-1, 8))[:, :, _PLACE].flatten(1)
