"""The layout of MLX: unsigned integers in groups along the input with a float scale and a float bias that is added.

A weight of shape (out, in) is `X.weight` uint32 (out, in * bits / 32), the first code in the lowest bits, `X.scales`
and `X.biases` (out, groups) in the model's dtype. config.json has `quantization`: group_size and bits for all, and by
module name what differs; embeddings may be quantized too.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halfbyte.containers.words import typed
from halfbyte.errors import InputError
from halfbyte.formats import FORMATS, SOURCE, Format, Integers
from halfbyte.qtensor import QTensor, check_parts

if TYPE_CHECKING:
    from halfbyte.containers import Get

METHOD = "mlx"
READER = "mlx-lm"
_BITS, _GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def refuses(f: Format, role: str) -> str | None:
    """See Container."""
    if role not in ("linear", "head", "embedding", "router"):
        return f"it has no place for a weight of kind {role}"
    if not isinstance(f.grid, Integers) or f.scale != SOURCE or f.flat or f.bits not in _BITS:
        return f"it has no layout for {f.name}, only for integers with a scale"
    if f.group not in _GROUPS:
        return f"it has no groups of {f.group}, only of {', '.join(map(str, _GROUPS))}"
    return None


def encode(name: str, q: QTensor, input: Format | None = None) -> dict[str, Tensor]:
    """See Container. Raises InputError where the model's dtype does not hold -scale * zero, or inputs are rounded."""
    if input is not None:
        raise InputError(f"{name}: MLX does not round inputs to {input}.")
    tensors, f = q.tensors(), q.format
    scale = tensors["scale"]
    if f.zero == SOURCE:
        bias = tensors["zero"]
    else:
        zero = tensors["zero"].float() if "zero" in tensors else torch.tensor(float(1 << (f.bits - 1)))
        exact = -scale.float() * zero
        bias = exact.to(scale.dtype)
        if not torch.equal(bias.float(), exact):
            raise InputError(
                f"{name}: MLX adds a bias in {scale.dtype}, which does not hold these zero points exactly."
            )
    packed = tensors["codes"].reshape(q.shape[0], -1)
    return {f"{name}.weight": packed.contiguous().view(torch.uint32), f"{name}.scales": scale, f"{name}.biases": bias}


def config(sites: Mapping[str, tuple[QTensor, Format | None]], kept: list[str]) -> dict[str, Any]:
    """See Container. What mlx-lm writes: the most common for all, the others by name, false for what is kept."""
    counts: dict[tuple[int, int], list[str]] = {}
    for name, (q, _) in sites.items():
        counts.setdefault((int(q.format.group), q.format.bits), []).append(name)
    most = max(counts, key=lambda k: len(counts[k])) if counts else (64, 4)
    others: dict[str, Any] = {n: _said(*k) for k, names in counts.items() if k != most for n in names}
    return {"quant_method": METHOD, **_said(*most), **others, **dict.fromkeys(kept, False)}


def _said(group: int, bits: int) -> dict[str, Any]:
    return {"group_size": group, "bits": bits, "mode": "affine"}


def formats(config: Mapping[str, Any], names: set[str], get: Get) -> dict[str, tuple[Format, Format | None]]:
    """See Container. Raises InputError for MLX's other modes (mxfp4, nvfp4)."""
    out: dict[str, tuple[Format, Format | None]] = {}
    for name in sorted(n.removesuffix(".scales") for n in names if n.endswith(".scales")):
        own = config.get(name)
        said = own if isinstance(own, Mapping) else config
        if said.get("mode", "affine") != "affine" or f"{name}.biases" not in names:
            raise InputError(f"{name}: MLX's mode {reprlib.repr(said.get('mode'))} is not read; affine is.")
        bits, group = said.get("bits"), said.get("group_size")
        if bits not in _BITS or group not in _GROUPS:
            raise InputError(f"quantization: {name} has {reprlib.repr(bits)} bits in groups of {reprlib.repr(group)}.")
        out[name] = (FORMATS[f"uint{bits}-g{group}-affine"], None)
    return out


def decode(name: str, f: Format, shape: tuple[int, ...], get: Get, config: Mapping[str, Any] = {}) -> QTensor:
    """See Container."""
    groups = f.groups(shape)
    words = typed(f"{name}.weight", get(f"{name}.weight"), (torch.uint32,), (shape[0], shape[1] * f.bits // 32))
    scale = typed(f"{name}.scales", get(f"{name}.scales"), FLOATS, groups)
    bias = typed(f"{name}.biases", get(f"{name}.biases"), (scale.dtype,), groups)
    parts: dict[str, Tensor | QTensor] = {"codes": words.contiguous().view(torch.uint8), "scale": scale, "zero": bias}
    return check_parts(QTensor(f, shape, scale.dtype, parts))
