"""The compressed-tensors layout: what vLLM and transformers read integer, FP8 and FP4 weights from."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import regex
import torch
from torch import Tensor

from halfbyte.containers import compressed_fp4 as fp4
from halfbyte.containers.words import from_words, to_words, typed, words_of
from halfbyte.errors import InputError
from halfbyte.formats import FORMATS, SOURCE, Float8, Format, Integers
from halfbyte.qtensor import QParams, QTensor, check_parts, pack
from halfbyte.scheme import static

if TYPE_CHECKING:
    from halfbyte.containers import Get

METHOD = "compressed-tensors"
READER = "transformers with compressed-tensors (0.15 to 0.17.1), vLLM"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def refuses(f: Format, role: str) -> str | None:
    if role not in ("linear", "head", "expert"):
        return f"it has no place for a weight of kind {role}"
    if fp4.holds(f):
        return None
    integers = isinstance(f.grid, Integers) and f.zero in (None, "integer")
    e4m3 = isinstance(f.grid, Float8) and f.grid.dtype == torch.float8_e4m3fn and not isinstance(f.group, int)
    if not (integers or e4m3) or f.scale != SOURCE or f.flat:
        return f"it has no layout for {f.name}"
    if f.zero and f.group == "tensor":
        return "it packs zero points by rows, not for a whole tensor"
    return None


def encode(name: str, q: QTensor, input: Format | None = None) -> dict[str, Tensor]:
    """Codes and scales unchanged. See `_layout` for which of the layouts it is. Raises InputError where one of the
    4-bit floats' cannot hold them."""
    if fp4.holds(q.format):
        return fp4.encode(name, q)
    f, scale = q.format, q.parts["scale"]
    assert isinstance(scale, Tensor)
    out = {f"{name}.weight_scale": scale}
    if isinstance(f.grid, Float8):
        return {f"{name}.weight": q.codes.view(f.grid.dtype), **out}
    if _layout(f, input) == "int-quantized":
        # two's complement is the offset code with its highest bit turned
        return {f"{name}.weight": (q.codes ^ 128).view(torch.int8), **out}
    out[f"{name}.weight_packed"] = words_of(q)
    out[f"{name}.weight_shape"] = torch.tensor(q.shape)
    if "zero" in q.parts:
        zero = q.parts["zero"]
        assert isinstance(zero, Tensor)
        out[f"{name}.weight_zero_point"] = to_words(zero.T, f.bits).T.contiguous()
    return out


def _layout(f: Format, input: Format | None) -> str:
    if fp4.holds(f):
        return fp4.layout(f)
    if isinstance(f.grid, Float8):
        return "float-quantized"
    return "int-quantized" if input is not None and f.bits == 8 and f.zero is None else "pack-quantized"


def _args(f: Format, dynamic: bool = False) -> dict[str, Any]:
    if fp4.holds(f):
        return fp4.arguments(f)
    group = isinstance(f.group, int)
    strategy = "group" if group else "token" if dynamic and f.group == "channel" else f.group
    return {
        "num_bits": f.bits,
        "type": "float" if isinstance(f.grid, Float8) else "int",
        "symmetric": f.zero is None,
        "strategy": strategy,
        "group_size": f.group if group else None,
        "dynamic": dynamic,
    }


def config(sites: Mapping[str, tuple[QTensor, Format | None]], kept: list[str]) -> dict[str, Any]:
    """One group for each pair of formats, with the modules it covers; kept modules in `ignore`."""
    from compressed_tensors.quantization import QuantizationConfig  # 2.6 s: only a writer pays them

    pairs: dict[tuple[Format, Format | None], list[str]] = {}
    for name, (q, input) in sites.items():
        pairs.setdefault((q.format, input), []).append(name)
    groups = {}
    for i, ((f, input), names) in enumerate(pairs.items()):
        others = [n for pair, ns in pairs.items() if pair != (f, input) for n in ns]
        groups[f"group_{i}"] = {
            "targets": ["Linear"] if len(pairs) == 1 else _patterns(names, others),
            "weights": _args(f),
            "input_activations": None if input is None else _args(input, dynamic=not static(input)),
            "format": _layout(f, input),
        }
    layouts = {g["format"] for g in groups.values()}
    return QuantizationConfig(
        config_groups=groups,
        format=layouts.pop() if len(layouts) == 1 else "mixed-precision",
        quantization_status="compressed",  # pyright: ignore[reportArgumentType]
        ignore=kept,
    ).model_dump(mode="json")


def _patterns(names: list[str], others: list[str]) -> list[str]:
    """Expressions that match all of names and none of others: a pattern a kind of layer where that suffices."""
    out: dict[str, None] = {}
    for name in names:
        pattern = re.escape(name)
        wide = re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", pattern)
        out["re:" + (pattern if any(re.fullmatch(wide, o) for o in others) else wide) + "$"] = None
    return list(out)


def formats(config: Mapping[str, Any], names: set[str], get: Get) -> dict[str, tuple[Format, Format | None]]:
    """Modules with a weight_scale, each under the first group whose target is its name, a pattern or "Linear"."""
    groups = _groups(config)
    out = {}
    for name in sorted(n.removesuffix(".weight_scale") for n in names if n.endswith(".weight_scale")):
        group = next((g for g in groups if any(_matches(t, name) for t in g["targets"])), None)
        group = group or next((g for g in groups if "Linear" in g["targets"]), None)
        if group is None:
            raise InputError(f"quantization_config: no group of compressed-tensors covers {name}.")
        if f"{name}.weight_g_idx" in names:
            raise InputError(f"{name}.weight_g_idx: groups in the order of activations are not known to halfbyte.")
        input = group.get("input_activations")
        out[name] = (_format(group.get("weights"), name), None if input is None else _format(input, name))
    return out


def _groups(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The config_groups. Raises InputError for what they leave open, and for what changes the result unseen."""
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping):
        raise InputError("quantization_config: compressed-tensors needs config_groups.")
    if changed := [k for k in ("transform_config", "sparsity_config") if config.get(k)]:
        raise InputError(f"quantization_config: {changed[0]} is not known to halfbyte.")
    for key, g in groups.items():
        targets = g.get("targets") if isinstance(g, Mapping) else None
        if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
            raise InputError(f"quantization_config: config_groups.{key} has no list of targets.")
        input = g.get("input_activations")
        if input is not None and not (isinstance(input, Mapping) and _known_when(input)):
            raise InputError(
                f"quantization_config: config_groups.{key} rounds inputs neither by each token's scale nor by one that "
                "calibration found."
            )
        if input is not None and input.get("type") == "float" and input.get("num_bits") == 4:
            raise InputError(f"quantization_config: config_groups.{key} rounds inputs to FP4, which halfbyte does not.")
        if g.get("output_activations") is not None:
            raise InputError(f"quantization_config: config_groups.{key} rounds outputs, which halfbyte does not.")
    return list(groups.values())


def _known_when(input: Mapping[str, Any]) -> bool:
    """Whether scales of inputs are known when `scheme.static` says so: of each token at run time, of all before."""
    dynamic = input.get("dynamic", False)
    return isinstance(dynamic, bool) and dynamic != (input.get("strategy") == "tensor")


def _matches(target: str, name: str) -> bool:
    if not target.startswith("re:"):
        return target == name
    try:  # re would take for ever where an expression leaves many ways to try
        return bool(regex.match(target[3:], name, timeout=0.1))
    except TimeoutError:
        raise InputError(f"quantization_config: the target {reprlib.repr(target)} takes too long to match.") from None
    except (regex.error, RecursionError) as e:
        raise InputError(
            f"quantization_config: the target {reprlib.repr(target)} is no regular expression: {e}."
        ) from None


def _format(args: Any, name: str) -> Format:
    try:
        if f := fp4.described(args):
            return f
        kind, bits, strategy, symmetric = args["type"], args["num_bits"], args["strategy"], args.get("symmetric", True)
        group = f"g{args['group_size']:d}" if strategy == "group" else str(strategy)
        base = {("float", True): f"fp{bits}-e4m3", ("int", True): f"int{bits}", ("int", False): f"uint{bits}"}
        if args.get("actorder") not in (None, False, "weight", "static"):  # "group": columns in another order
            raise InputError("actorder")
        return FORMATS[f"{base[kind, symmetric]}-{group}"]
    except (KeyError, TypeError, ValueError):  # an InputError is a ValueError
        raise InputError(
            f"quantization_config: {name}'s arguments are none that halfbyte knows: {_shown(args)}."
        ) from None


def _shown(args: Any) -> str:
    if not isinstance(args, Mapping):
        return reprlib.repr(args)
    asked = ("type", "num_bits", "strategy", "group_size", "symmetric", "actorder")
    return ", ".join(f"{k} {reprlib.repr(args[k])}" for k in asked if k in args)


def decode(name: str, f: Format, shape: tuple[int, ...], get: Get, config: Mapping[str, Any] = {}) -> QTensor:
    if fp4.holds(f):
        return fp4.decode(name, f, shape, get)
    scale, groups = get(f"{name}.weight_scale"), f.groups(shape)
    if _squeezed(tuple(scale.shape)) != _squeezed(groups) or scale.dtype not in FLOATS:
        raise InputError(
            f"{name}.weight_scale: {f.name} needs floats of the shape {groups}, not {tuple(scale.shape)} {scale.dtype}."
        )
    if isinstance(f.grid, Float8):
        codes, zero = typed(f"{name}.weight", get(f"{name}.weight"), (f.grid.dtype,), shape).view(torch.uint8), None
    else:
        codes, zero = _integers(name, f, shape, get)
    parts: dict[str, Tensor | QTensor] = {"codes": pack(codes, f.bits), "scale": scale.reshape(groups)}
    if zero is not None:
        parts["zero"] = zero.contiguous()
    return check_parts(QTensor(f, shape, scale.dtype, parts))


def decode_input(name: str, f: Format, get: Get) -> QParams:
    """What the inputs of module `name` are rounded by to a static format, each (1,): the scale in its own dtype. Raises
    InputError for what is missing or no such number."""
    scale = get(f"{name}.input_scale")
    if scale.numel() != 1 or scale.dtype not in FLOATS or not 0 < scale.item() < torch.inf:
        raise InputError(f"{name}.input_scale should be one positive float.")
    if not f.zero:
        return QParams(scale.reshape(1))
    zero = get(f"{name}.input_zero_point")
    if zero.numel() != 1 or zero.dtype != torch.int8:
        raise InputError(f"{name}.input_zero_point should be one int8.")
    return QParams(scale.reshape(1), zero.reshape(1).float() + (1 << (f.bits - 1)))


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(d for d in shape if d != 1)


def _integers(name: str, f: Format, shape: tuple[int, ...], get: Get) -> tuple[Tensor, Tensor | None]:
    """Codes and, where the format has them, zero points: packed into int32, or an int8 each (int-quantized)."""
    rows, groups, per = shape[0], f.groups(shape), 32 // f.bits
    try:
        get(f"{name}.weight_packed")
    except InputError:
        half = 1 << (f.bits - 1)

        def whole(part: str, size: tuple[int, ...]) -> Tensor:
            q = typed(f"{name}.{part}", get(f"{name}.{part}"), (torch.int8,), size).short() + half
            if q.numel() and (q.min() < 0 or q.max() >= 2 * half):
                raise InputError(f"{name}.{part} holds integers of more than {f.bits} bits.")
            return q.to(torch.uint8)

        return whole("weight", shape), whole("weight_zero_point", groups) if f.zero else None
    words = typed(f"{name}.weight_packed", get(f"{name}.weight_packed"), (torch.int32,), (rows, -(-shape[1] // per)))
    stated = get(f"{name}.weight_shape").flatten()
    if tuple(stated[:3].tolist()) != shape:
        raise InputError(f"{name}.weight_shape says {stated[:3].tolist()}; the model needs {shape}.")
    codes = from_words(words, f.bits, shape[1])
    if not f.zero:
        return codes, None
    packed = typed(
        f"{name}.weight_zero_point", get(f"{name}.weight_zero_point"), (torch.int32,), (-(-rows // per), groups[1])
    )
    return codes, from_words(packed.T, f.bits, rows).T
