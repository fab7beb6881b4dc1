"""Modules that are trained whole beside the adapters, and saved with them: PEFT's `modules_to_save`.

Their floats are the model's own, which are trained in place; what they were is in the base that an adapter names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from halfbyte.errors import InputError
from halfbyte.layers import Experts, Linear, ops, round_inputs_of_codes

_MARK = "trained_whole"


def keep(model: nn.Module, endings: list[str]) -> list[str]:
    """Marks the modules whose names end so, which is PEFT's rule. Gives their names. Codes among them become floats.

    Raises InputError where an ending meets none, and for what cannot be trained apart from the rest: a weight that is
    tied to one outside, and experts, which PEFT knows as one tensor.
    """
    named = dict(model.named_modules(remove_duplicate=False))
    met = [n for n, m in named.items() if n and ".weight.adapters" not in n and any(n.endswith(e) for e in endings)]
    if unmet := [e for e in endings if not any(n.endswith(e) for n in met)]:
        raise InputError(f"modules_to_save: no module's name ends in {unmet[0]!r}.")
    for name in met:
        _check(model, name, named[name])
    for name in met:
        setattr(named[name], _MARK, True)
        for _, op in ops(named[name]):
            op.weight.dequantize()
    round_inputs_of_codes(model)
    return met


def _check(model: nn.Module, name: str, module: nn.Module) -> None:
    if any(isinstance(m, Experts) for m in module.modules()):
        raise InputError(f"modules_to_save: {name} holds experts; these can only have adapters.")
    if not _parameters(module) and not any(True for _ in ops(module)):
        raise InputError(f"modules_to_save: {name} has no weights of its own.")
    for within, op in ops(module):
        own = f"{name}.{within}".strip(".")
        if other := next((n for n, o in ops(model) if o.weight is op.weight and n != own), None):
            raise InputError(
                f"modules_to_save: {own} shares its weight with {other}, so that it cannot be trained without that."
            )


def kept(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that are marked, by name."""
    return {n: m for n, m in model.named_modules() if getattr(m, _MARK, False)}


def let_go(model: nn.Module) -> None:
    """Takes the marks away: what was trained is part of the model from here on."""
    for module in kept(model).values():
        delattr(module, _MARK)


def inside(model: nn.Module) -> Callable[[str], bool]:
    """Tells of a name whether it is that of a marked module, or of what belongs to one."""
    prefixes = tuple(f"{n}." for n in kept(model))
    return lambda name: f"{name}.".startswith(prefixes)


def requires_grad(model: nn.Module) -> None:
    """Has all weights of the marked modules trained."""
    for module in kept(model).values():
        for _, p, _ in _parameters(module):
            p.requires_grad_(True)


def state(model: nn.Module) -> dict[str, Tensor]:
    """Their tensors, by the names and in the orientation that they have in a checkpoint."""
    return {
        f"{name}.{key}": (p.detach().T if turned else p.detach()).contiguous()
        for name, module in kept(model).items()
        for key, p, turned in _parameters(module)
    }


def load(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Gives the marked modules what `state` gave. Raises InputError, which begins with `where`, if it does not fit."""
    there = {f"{n}.{key}": (p, turned) for n, m in kept(model).items() for key, p, turned in _parameters(m)}
    if odd := sorted(there.keys() ^ tensors.keys()):
        raise InputError(f"{where}: the tensor {odd[0]!r} is {'missing' if odd[0] in there else 'of no such module'}.")
    for name, (p, turned) in there.items():
        t = tensors[name].T if turned else tensors[name]
        if t.shape != p.shape or not t.is_floating_point():
            raise InputError(f"{where}: {name} is {t.dtype} of the shape {tuple(t.shape)}, not {tuple(p.shape)}.")
    for name, (p, turned) in there.items():  # once all fit
        p.data.copy_(tensors[name].T if turned else tensors[name])


def _parameters(module: nn.Module) -> list[tuple[str, nn.Parameter, bool]]:
    """(name as in a checkpoint, parameter, whether a checkpoint has it turned): of ops, what is stored."""
    inside = {f"{name}.weight.stored".lstrip("."): op for name, op in ops(module)}
    out = []
    for name, p in module.named_parameters():
        op = inside.get(name)
        if op is None and ".adapters." in f".{name}":
            continue
        out.append((name.removesuffix(".stored") if op else name, p, isinstance(op, Linear) and op.transposed))
    return out
