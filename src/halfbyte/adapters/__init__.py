"""What is added to a weight. An adapter is a file here and a row in ADAPTERS."""

from __future__ import annotations

import inspect
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from halfbyte.adapters import starts, whole
from halfbyte.adapters.dora import Dora
from halfbyte.adapters.folder import check_folder, fill
from halfbyte.adapters.fused import apart, join, split
from halfbyte.adapters.lora import Lora, LowRank
from halfbyte.adapters.patterns import PATTERNS, own, unmet
from halfbyte.adapters.qalora import QaLora, check_group_size, group_size
from halfbyte.adapters.starts import start
from halfbyte.errors import InputError
from halfbyte.layers import Embedding, Linear, Weight, ops, weights


class Adapter(Protocol):
    """An nn.Module with these; made from a Weight and keyword settings, computing nothing at first.

    One whose `needs_base` is True is given what it adapts: forward(x, y, op) gets the Linear, for its bias, weight and
    product(x); delta(base) gets what is stored, a float (out, in). It keeps neither.

    One that adds the same number to all of a group of neighbouring inputs says so by shift(): float32 (out, groups),
    which the zero points of codes can take in (`Weight.merge`).
    """

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y, the product of x (..., in) with what is stored plus the bias, to which the adapter adds its own."""
        ...

    def delta(self) -> Tensor:
        """What is added to the stored value: float32 (out, in), differentiable."""
        ...

    def state(self) -> dict[str, Tensor]:
        """The tensors that are saved, by PEFT's names: "lora_A.weight" ..."""
        ...

    def settings(self) -> dict[str, Any]:
        """The keyword settings, by PEFT's names, that make it anew; with `peft_type`."""
        ...


def check(settings: Mapping[str, Any]) -> None:
    """Raises InputError for settings of a wrong type, and for those that do not go together, before there is a weight
    to adapt."""
    for key, (types, said) in _TYPES.items():
        if key in settings and type(settings[key]) not in types:
            raise InputError(f"{key}: it is {said}, not {reprlib.repr(settings[key])}.")
    if settings.get("use_dora") and settings.get("use_qalora"):
        raise InputError("use_dora with use_qalora: DoRA scales whole rows, which no zero point takes in; choose one.")
    begins = settings.get("init_lora_weights", True)
    if settings.get("use_qalora") and begins is not True:
        raise InputError(f"--init-lora-weights {begins}: it is of a whole matrix, and QA-LoRA's inputs are pooled.")
    for r in (settings.get("r", 2), *(settings.get("rank_pattern") or {}).values()):
        starts.check(begins, r)


def lora(weight: Weight, use_dora: bool = False, use_qalora: bool = False, **settings: Any) -> nn.Module:
    """LoRA, or DoRA or QA-LoRA where use_dora or use_qalora says so: to PEFT these are settings of LoRA."""
    check({"use_dora": use_dora, "use_qalora": use_qalora})
    return (QaLora if use_qalora else Dora if use_dora else Lora)(weight, **settings)


_NUMBER, _SWITCH = ((int, float), "a number"), ((bool,), "true or false")
_TYPES = {"r": ((int,), "a whole number"), "lora_alpha": _NUMBER, "lora_dropout": _NUMBER, "use_rslora": _SWITCH,
          "use_dora": _SWITCH, "use_qalora": _SWITCH}  # fmt: skip


__all__ = ["ADAPTERS", "DEFAULTS", "NAME", "PATTERNS", "Adapter", "apart", "attach", "attached", "check",
           "check_folder", "fill", "fitting", "join", "lora", "own", "settings", "split", "start", "targets", "unmet",
           "whole"]  # fmt: skip

ADAPTERS: dict[str, Callable[..., nn.Module]] = {"lora": lora}
NAME = "default"  # PEFT's name for the only adapter
DEFAULTS: dict[str, Any] = {  # of a LoRA that nothing is said of
    name: p.default
    for make in (LowRank, lora)
    for name, p in inspect.signature(make).parameters.items()
    if name in _TYPES
}


def targets(model: nn.Module, roles: Mapping[str, str], target_modules: str | list[str] = "all-linear") -> list[str]:
    """Names of the ops that get an adapter, by PEFT's rules: "all-linear" (all but the head and routers), a
    regular expression for the whole name, or a list of names or name endings; of modules that are trained whole, none.
    Raises InputError if none is met."""
    names = [n for n, op in ops(model) if isinstance(op, Linear | Embedding)]
    if target_modules == "all-linear":
        found = [n for n in names if roles[n] in ("linear", "conv1d")]
    elif isinstance(target_modules, str):
        try:
            found = [n for n in names if re.fullmatch(target_modules, n)]
        except re.error as e:
            raise InputError(f"--target-modules {target_modules!r} is no regular expression: {e}.") from None
    else:
        found = [n for n in names if any(n == t or n.endswith(f".{t}") for t in target_modules)]
        if unmet := [t for t in target_modules if not any(n == t or n.endswith(f".{t}") for n in names)]:
            raise InputError(f"--target-modules: no layer is named {', '.join(unmet)}; {_endings(names)}.")
    inside = whole.inside(model)
    found = [n for n in found if not inside(n)]
    if not found:
        raise InputError(f"--target-modules {target_modules!r} meets no linear layer; {_endings(names)}.")
    return found


def _endings(names: list[str]) -> str:
    return f"this model has {', '.join(sorted({n.rpartition('.')[2] for n in names}))}"


def fitting(model: nn.Module, names: list[str], **settings: Any) -> dict[str, Weight]:
    """The weights of the named ops, by op's name. Raises InputError where one cannot have an adapter of these settings:
    a head that is tied, whose adapter would move the embedding too, which PEFT's does not; an embedding that would get
    DoRA or QA-LoRA; a rank of which a start has too few directions."""
    by_name = dict(ops(model))
    met = {name: by_name[name].weight for name in names}
    for name, weight in met.items():
        if other := next((n for n, op in by_name.items() if op.weight is weight and n != name), None):
            raise InputError(f"{name} shares its weight with {other}, so that it cannot have an adapter of its own.")
        if not isinstance(by_name[name], Embedding):
            of = own(settings, name)
            starts.check(of.get("init_lora_weights", True), of.get("r", DEFAULTS["r"]), weight.shape)
        elif settings.get("use_dora") or settings.get("use_qalora"):
            raise InputError(f"{name} is looked up, and DoRA and QA-LoRA are for what is multiplied: leave it out.")
    return met


def attach(
    model: nn.Module, names: list[str], kind: str = "lora", called: str = NAME, **settings: Any
) -> dict[str, Weight]:  # fmt: skip
    """Adds an adapter of a kind in ADAPTERS to the weights of the named ops, in use from now on. called: its own name.
    Returns the weights by op's name.

    With `use_qalora` groups are those of the weights' codes, unless `qalora_group_size` says another size, of whole
    groups. Raises InputError, before there is any, as `check` and `fitting` do.
    """
    if kind not in ADAPTERS:
        raise InputError(f"there is no adapter {kind!r}; those are {', '.join(ADAPTERS)}.")
    if kind == "lora":
        check(settings)
    by_name, met = dict(ops(model)), fitting(model, names, **settings)
    if settings.get("use_qalora"):
        if "qalora_group_size" not in settings:
            settings["qalora_group_size"] = group_size(met)
        check_group_size(met, settings["qalora_group_size"])
    for name, weight in met.items():
        looked_up = {"looked_up": True} if isinstance(by_name[name], Embedding) else {}
        weight.adapters[called] = ADAPTERS[kind](weight, **own(settings, name), **looked_up)
    return met


def check_name(name: str) -> None:
    """Raises InputError for what cannot be an adapter's name: part of the names of tensors."""
    if not re.fullmatch(r"[\w-]+", name) or hasattr(nn.ModuleDict(), name):
        raise InputError(f"an adapter cannot be named {name!r}: letters, digits, _ and - make a name.")


def loaded(model: nn.Module) -> list[str]:
    """Names of all adapters, those in use first."""
    all_of = weights(model).values()
    return list(dict.fromkeys([*(n for w in all_of for n in w.adapters), *(n for w in all_of for n in w.waiting)]))


def active(model: nn.Module) -> str | None:
    """The name of the adapter in use, if any."""
    return next((n for w in weights(model).values() for n in w.adapters), None)


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Has the adapter of that name alone in use; the others wait. None: the base computes alone. Raises InputError."""
    if name is not None and name not in (known := loaded(model)):
        raise InputError(f"there is no adapter {name!r}; those are {', '.join(known) or 'none'}.")
    for w in weights(model).values():
        w.use(name)


def remove(model: nn.Module, name: str) -> None:
    """Takes away what there is of an adapter of that name; and of the last one the marks of modules trained whole."""
    for w in weights(model).values():
        for held in (w.adapters, w.waiting):
            if name in held:
                del held[name]
    if not loaded(model):
        whole.let_go(model)


def attached(model: nn.Module) -> dict[str, Any]:
    """Op's name -> its adapter in use, for the first op of each weight that has one."""
    seen: set[int] = set()
    out: dict[str, Any] = {}
    for name, op in ops(model):
        if op.weight.adapters and id(op.weight) not in seen:
            seen.add(id(op.weight))
            out[name] = next(iter(op.weight.adapters.values()))
    return out


def settings(found: Mapping[str, Any]) -> dict[str, Any]:
    """Those of all adapters, by op's name, as one: r and lora_alpha of most layers, and of the others in patterns, by
    the ending of a name where all that end so have the same."""
    each = {name: a.settings() for name, a in found.items()}
    out = dict(next(iter(each.values())))
    for pattern, key in PATTERNS.items():
        if key in out:
            values = {name: s[key] for name, s in each.items()}
            out[key] = Counter(values.values()).most_common(1)[0][0]
            out[pattern] = _pattern(values, out[key])
    return out


def _pattern(values: Mapping[str, Any], common: Any) -> dict[str, Any]:
    endings: dict[str, set[Any]] = {}
    for name, value in values.items():
        endings.setdefault(name.rpartition(".")[2], set()).add(value)
    keys = {n: end if len(endings[end := n.rpartition(".")[2]]) == 1 else n for n in values}
    return {keys[n]: v for n, v in values.items() if v != common}
