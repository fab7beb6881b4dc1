"""What is added to a weight. An adapter is a file here and a row in ADAPTERS."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from halfbyte.adapters.dora import Dora
from halfbyte.adapters.lora import Lora
from halfbyte.adapters.qalora import QaLora, group_size
from halfbyte.errors import InputError
from halfbyte.layers import Linear, Weight, ops, weights


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
    """Raises InputError for settings that do not go together, before there is a weight to adapt."""
    if settings.get("use_dora") and settings.get("use_qalora"):
        raise InputError("use_dora with use_qalora: DoRA scales whole rows, which no zero point takes in; choose one.")


def lora(weight: Weight, use_dora: bool = False, use_qalora: bool = False, **settings: Any) -> nn.Module:
    """LoRA, or DoRA or QA-LoRA where use_dora or use_qalora says so: to PEFT these are settings of LoRA."""
    check({"use_dora": use_dora, "use_qalora": use_qalora})
    return (QaLora if use_qalora else Dora if use_dora else Lora)(weight, **settings)


ADAPTERS: dict[str, Callable[..., nn.Module]] = {"lora": lora}
NAME = "default"  # PEFT's name for the only adapter


def targets(model: nn.Module, roles: Mapping[str, str], target_modules: str | list[str] = "all-linear") -> list[str]:
    """Names of the ops that get an adapter, by PEFT's rules: "all-linear" (all but the head and routers), a
    regular expression for the whole name, or a list of names or name endings. Raises InputError if none is met."""
    names = [n for n, op in ops(model) if isinstance(op, Linear)]
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
            raise InputError(f"--target-modules: no linear layer is named {', '.join(unmet)}; {_endings(names)}.")
    if not found:
        raise InputError(f"--target-modules {target_modules!r} meets no linear layer; {_endings(names)}.")
    return found


def _endings(names: list[str]) -> str:
    return f"this model has {', '.join(sorted({n.rpartition('.')[2] for n in names}))}"


def attach(
    model: nn.Module, names: list[str], kind: str = "lora", called: str = NAME, **settings: Any
) -> dict[str, Weight]:  # fmt: skip
    """Adds an adapter of a kind in ADAPTERS to the weights of the named ops, in use from now on. called: its own name.
    Returns the weights by op's name.

    With `use_qalora` groups are those of the weights' codes, unless `qalora_group_size` says another size. Raises
    InputError for a head that is tied: its adapter would move the embedding too, which PEFT's does not.
    """
    if kind not in ADAPTERS:
        raise InputError(f"there is no adapter {kind!r}; those are {', '.join(ADAPTERS)}.")
    by_name = dict(ops(model))
    met = {name: by_name[name].weight for name in names}
    embeddings = {id(op.weight): n for n, op in ops(model) if not isinstance(op, Linear)}
    if shared := [n for n, w in met.items() if id(w) in embeddings]:
        other = embeddings[id(met[shared[0]])]
        raise InputError(f"{shared[0]} shares its weight with {other}, so that it cannot have an adapter of its own.")
    if settings.get("use_qalora") and "qalora_group_size" not in settings:
        settings["qalora_group_size"] = group_size(met)
    for weight in met.values():
        weight.adapters[called] = ADAPTERS[kind](weight, **settings)
    return met


def check_name(name: str) -> None:
    """Raises InputError for what cannot be an adapter's name: part of the names of tensors."""
    if not re.fullmatch(r"[\w-]+", name) or hasattr(nn.ModuleDict, name):
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


def attached(model: nn.Module) -> dict[str, Any]:
    """Op's name -> its adapter in use, for the first op of each weight that has one."""
    seen: set[int] = set()
    out: dict[str, Any] = {}
    for name, op in ops(model):
        if op.weight.adapters and id(op.weight) not in seen:
            seen.add(id(op.weight))
            out[name] = next(iter(op.weight.adapters.values()))
    return out
