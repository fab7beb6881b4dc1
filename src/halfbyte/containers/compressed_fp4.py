"""The 4-bit floats of compressed-tensors: NVFP4 and MXFP4.

A weight of shape (out, in) is `X.weight_packed` uint8 (out, in / 2), the earlier code in the low nibble. In MXFP4,
`X.weight_scale` uint8 (out, in / 32) is an exponent of two with 127 added. In NVFP4 it is float8_e4m3fn (out, in / 16),
and `X.weight_global_scale` float32 (1,) is what all of them are divided by: the reciprocal of the scale that we keep.

The scales that halfbyte finds for NVFP4 have a power of two above them. Its reciprocal is exact, and every value is in
bfloat16, so all readers compute the same, whether they divide or multiply.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halfbyte.containers.words import typed
from halfbyte.errors import InputError
from halfbyte.formats import FORMATS, Format
from halfbyte.qtensor import QTensor, check_parts

if TYPE_CHECKING:
    from halfbyte.containers import Get

_MXFP4, _NVFP4 = FORMATS["mxfp4"], FORMATS["nvfp4"]
_STRATEGIES = {_MXFP4: "group", _NVFP4: "tensor_group"}
_SCALES = {_MXFP4: torch.uint8, _NVFP4: torch.float8_e4m3fn}


def holds(f: Format) -> bool:
    """Whether it is one of these formats."""
    return f in _STRATEGIES


def layout(f: Format) -> str:
    """compressed-tensors' name of how the format is stored."""
    return f"{f.name}-pack-quantized"


def arguments(f: Format) -> dict[str, Any]:
    """compressed-tensors' QuantizationArgs of the format."""
    return {
        "num_bits": f.bits,
        "type": "float",
        "symmetric": True,
        "strategy": _STRATEGIES[f],
        "group_size": f.group,
        "dynamic": False,
        "scale_dtype": _SCALES[f],
    }


def described(args: Mapping[str, Any]) -> Format | None:
    """The format that QuantizationArgs describe, if it is one of these."""
    said = (args["num_bits"], args["type"], args.get("symmetric", True), args["strategy"], args.get("group_size"))
    return next((f for f in _STRATEGIES if said == (f.bits, "float", True, _STRATEGIES[f], f.group)), None)


def encode(name: str, q: QTensor) -> dict[str, Tensor]:
    """Codes and scales unchanged. Raises InputError for a scale that is the reciprocal of no float32, and for weights
    in a dtype that readers do not compute in."""
    if q.dtype != torch.bfloat16:
        raise InputError(
            f"{name}: compressed-tensors computes with {q.format.name} in bfloat16 only, not in {q.dtype}; use "
            "--dtype bfloat16."
        )
    parts, groups = q.tensors(), q.format.groups(q.shape)
    out = {f"{name}.weight_packed": parts["codes"].reshape(q.shape[0], -1)}
    if q.format == _MXFP4:
        return {**out, f"{name}.weight_scale": parts["scale"].view(torch.uint8)}
    outer = parts["scale.scale"]
    if not torch.equal(1 / (1 / outer), outer):
        raise InputError(f"{name}: compressed-tensors keeps a scale's reciprocal, and {outer.item()} is none of one.")
    scale = parts["scale.codes"].view(torch.float8_e4m3fn).reshape(groups)
    return {**out, f"{name}.weight_scale": scale, f"{name}.weight_global_scale": 1 / outer}


def decode(name: str, f: Format, shape: tuple[int, ...], get: Get) -> QTensor:
    """The weight in bfloat16, codes unchanged. Raises InputError if sizes or dtypes do not fit."""
    groups = f.groups(shape)
    codes = typed(f"{name}.weight_packed", get(f"{name}.weight_packed"), (torch.uint8,), (shape[0], shape[1] // 2))
    stored = typed(f"{name}.weight_scale", get(f"{name}.weight_scale"), (_SCALES[f],), groups)
    if f == _MXFP4:
        scale = stored.view(torch.float8_e8m0fnu)
    else:
        assert isinstance(f.scale, Format)
        parts: dict[str, Tensor | QTensor] = {"codes": stored.view(torch.uint8), "scale": _outer(name, get)}
        scale = check_parts(QTensor(f.scale, groups, torch.float32, parts))
    return check_parts(QTensor(f, shape, torch.bfloat16, {"codes": codes, "scale": scale}))


def _outer(name: str, get: Get) -> Tensor:
    """What the scales are multiplied by, float32 (1,)."""
    whole = get(f"{name}.weight_global_scale")
    if whole.numel() != 1 or whole.dtype != torch.float32 or not 0 < (outer := 1 / whole.reshape(1)) < torch.inf:
        raise InputError(f"{name}.weight_global_scale should be one positive float32.")
    return outer
