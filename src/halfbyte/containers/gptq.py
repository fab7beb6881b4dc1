"""The layout of GPTQ, as GPTQModel, AutoGPTQ and vLLM have it: integers of 2, 4 or 8 bits in groups along the input.

A weight of shape (out, in) is `X.qweight` int32 (in / per, out), whose words run along the input; `X.scales` fp16
(groups, out); `X.qzeros` int32 (groups, out / per), whose words run along the output and hold the zero point less one
(checkpoint_format "gptq"; "gptq_v2" holds it as it is); and `X.g_idx` int32 (in), the group of every input. Where that
does not rise, inputs were quantized in another order (desc_act), which the codes are then held in.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halfbyte.containers.words import from_words, to_words, typed
from halfbyte.errors import InputError
from halfbyte.formats import FORMATS, SOURCE, Format, Integers
from halfbyte.qtensor import QTensor, check_parts, pack

if TYPE_CHECKING:
    from halfbyte.containers import Get

METHOD = "gptq"
READER = "GPTQModel, vLLM"
FLOATS = (torch.float16, torch.bfloat16)  # of bfloat16, all but scales that are very large or small
_BITS = (2, 4, 8)
_SCALES = (torch.float16, torch.bfloat16, torch.float32)


def refuses(f: Format, role: str) -> str | None:
    """See Container. Conv1D is held as the Linear that GPTQModel makes of it, (out, in)."""
    if role not in ("linear", "head", "expert", "conv1d"):
        return f"it has no place for a weight of kind {role}"
    integers = isinstance(f.grid, Integers) and f.bits in _BITS and f.zero in (None, "integer")
    if not integers or f.scale != SOURCE or f.flat or f.group == "tensor":
        return f"it has no layout for {f.name}, only for integers of 2, 4 or 8 bits by group or channel"
    return None


def encode(name: str, q: QTensor, input: Format | None = None) -> dict[str, Tensor]:
    """See Container. Raises InputError for scales that fp16 does not hold, for inputs that are rounded, and for sizes
    that are no whole words."""
    f, (rows, cols), tensors = q.format, q.shape, q.tensors()
    per, scale = 32 // f.bits, tensors["scale"]
    if input is not None:
        raise InputError(f"{name}: GPTQ's readers do not round inputs to {input}.")
    if rows % per or cols % per:
        raise InputError(f"{name}: GPTQ packs {per} codes a word, which do not divide {rows} x {cols}.")
    if not torch.equal(scale.half().float(), scale.float()):
        raise InputError(
            f"{name}: the layout that holds it, GPTQ's, keeps scales in float16, which does not hold these exactly; "
            "use --dtype float16."
        )
    zero = tensors["zero"] if "zero" in tensors else torch.full(scale.shape, 1 << (f.bits - 1), dtype=torch.uint8)
    group = cols // scale.shape[-1]
    groups = torch.arange(cols, dtype=torch.int32) // group
    if "order" in tensors:
        groups = torch.empty_like(groups).scatter_(0, tensors["order"].long(), groups)
        codes = torch.empty_like(q.codes).scatter_(1, tensors["order"].long().expand(rows, -1), q.codes)
    else:
        codes = q.codes
    less_one = (zero.short() - 1).to(torch.uint8) & ((1 << f.bits) - 1)
    return {
        f"{name}.qweight": to_words(codes, f.bits).T.contiguous(),
        f"{name}.qzeros": to_words(less_one.T.contiguous(), f.bits),
        f"{name}.scales": scale.T.half().contiguous(),
        f"{name}.g_idx": groups,
    }


def config(sites: Mapping[str, tuple[QTensor, Format | None]], kept: list[str]) -> dict[str, Any]:
    """See Container. One number of bits and one group for all, others as exceptions (GPTQModel's `dynamic`). Raises
    InputError where symmetric and other weights are mixed."""
    counts: dict[tuple[int, int], list[str]] = {}
    for name, (q, _) in sites.items():
        counts.setdefault((q.format.bits, _group(q.format)), []).append(name)
    symmetric = {q.format.zero is None for q, _ in sites.values()}
    if len(symmetric) > 1:
        raise InputError("GPTQ's config says once whether weights are symmetric; here some are and some are not.")
    (bits, group), _ = max(counts.items(), key=lambda item: len(item[1])) if counts else ((4, 128), [])
    dynamic = {
        f"+:^{name.replace('.', chr(92) + '.')}$": {"bits": b, "group_size": g}
        for (b, g), names in counts.items()
        if (b, g) != (bits, group)
        for name in names
    }
    dynamic |= {f"-:^{name.replace('.', chr(92) + '.')}$": {} for name in kept if name != "lm_head"}
    return {
        "quant_method": METHOD,
        "bits": bits,
        "group_size": group,
        "sym": symmetric.pop() if symmetric else True,
        "desc_act": any("order" in q.parts for q, _ in sites.values()),
        "lm_head": "lm_head" in sites,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        **({"dynamic": dynamic} if dynamic else {}),
    }


def _group(f: Format) -> int:
    return f.group if isinstance(f.group, int) else -1


def formats(config: Mapping[str, Any], names: set[str], get: Get) -> dict[str, tuple[Format, Format | None]]:
    """See Container. Bits and groups of each weight are told by its own tensors' shapes, not by the config."""
    layout = config.get("checkpoint_format", "gptq")
    if layout not in ("gptq", "gptq_v2"):
        raise InputError(
            f"quantization_config: checkpoint_format {reprlib.repr(layout)} is not read; gptq and gptq_v2 are."
        )
    out: dict[str, tuple[Format, Format | None]] = {}
    for name in sorted(n.removesuffix(".qweight") for n in names if n.endswith(".qweight")):
        if missing := next((p for p in ("scales", "qzeros") if f"{name}.{p}" not in names), None):
            raise InputError(f"{name}.{missing} is missing.")
        scales, zeros, words = (get(f"{name}.{p}") for p in ("scales", "qzeros", "qweight"))
        if scales.ndim != 2 or zeros.ndim != 2 or words.ndim != 2 or not zeros.shape[1] or not scales.shape[0]:
            raise InputError(f"{name}: its scales and zeros should be matrices.")
        per = scales.shape[1] // zeros.shape[1]
        bits = 32 // per if per in (4, 8, 16) else 0
        inputs = words.shape[0] * per
        group = inputs // scales.shape[0]
        if bits not in _BITS or inputs % scales.shape[0]:
            raise InputError(f"{name}: of its shapes no number of 2, 4 or 8 bits can be made out.")
        zeros = typed(f"{name}.qzeros", zeros, (torch.int32,), (scales.shape[0], scales.shape[1] // per))
        zero = _zeros(zeros, bits, scales.shape[1], layout == "gptq")
        symmetric = bool((zero == 1 << (bits - 1)).all())
        group_name = "channel" if group == inputs else f"g{group}"
        out[name] = (FORMATS[f"{'' if symmetric else 'u'}int{bits}-{group_name}"], None)
    return out


def _zeros(words: Tensor, bits: int, rows: int, less_one: bool) -> Tensor:
    """uint8 (groups, rows)."""
    zero = from_words(words, bits, rows).short() + less_one
    return (zero & ((1 << bits) - 1)).to(torch.uint8)


def decode(name: str, f: Format, shape: tuple[int, ...], get: Get, config: Mapping[str, Any] = {}) -> QTensor:
    """See Container."""
    per, (rows, cols) = 32 // f.bits, shape
    groups = f.groups(shape)[1]
    words = typed(f"{name}.qweight", get(f"{name}.qweight"), (torch.int32,), (cols // per, rows))
    scale = typed(f"{name}.scales", get(f"{name}.scales"), _SCALES, (groups, rows))
    codes = from_words(words.T, f.bits, cols)
    parts: dict[str, Tensor | QTensor] = {"scale": scale.T.contiguous()}
    if f.zero is not None:
        zeros = typed(f"{name}.qzeros", get(f"{name}.qzeros"), (torch.int32,), (groups, rows // per))
        parts["zero"] = _zeros(zeros, f.bits, rows, config.get("checkpoint_format", "gptq") == "gptq").T.contiguous()
    if (order := _order(name, cols, groups, get)) is not None:
        codes, parts["order"] = codes[:, order], order.to(torch.int32)
    parts = {"codes": pack(codes, f.bits), **parts}
    return check_parts(QTensor(f, shape, scale.dtype, parts))


def _order(name: str, cols: int, groups: int, get: Get) -> Tensor | None:
    """The inputs in the order of their groups; None where they are so already."""
    try:
        found = get(f"{name}.g_idx")
    except InputError:
        return None  # written by tools that know no order
    found = typed(f"{name}.g_idx", found, (torch.int32,), (cols,)).long()
    plain = torch.arange(cols) // (cols // groups)
    if torch.equal(found, plain):
        return None
    order = found.argsort(stable=True)
    if not torch.equal(found[order], plain):
        raise InputError(f"{name}.g_idx: its groups are not of one size.")
    return order
