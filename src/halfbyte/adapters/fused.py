"""Adapters of experts as PEFT has them: one for each parameter that transformers fuses (`target_parameters`), of which
A (experts r, in) holds the experts one after the other and B (out, r experts) in turns.

Where a parameter holds gate and up, their factors lie in blocks of twice the rank: A = [A_gate; A_up], and B has B_gate
and B_up in rows and columns of their own, as PEFT's PeftConcatenate makes them of experts that are apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.adapters.lora import Lora
from halfbyte.adapters.patterns import own
from halfbyte.containers.peft import wrappers
from halfbyte.errors import InputError
from halfbyte.experts import Fused
from halfbyte.layers import Experts

States = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Joined:
    """What an Adapter tells of itself, of a fused parameter's."""

    a: Tensor
    b: Tensor
    said: dict[str, Any]

    def state(self) -> dict[str, Tensor]:
        return {"lora_A.weight": self.a, "lora_B.weight": self.b}

    def settings(self) -> dict[str, Any]:
        return self.said


def join(model: nn.Module, found: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Adapters by op's name -> the same with one Joined for each fused parameter, by its name; and these names.

    Left as they are where PEFT has none such: experts of which some have no adapter, or one of another rank or alpha;
    DoRA, QA-LoRA and dropout."""
    out, joined = dict(found), []
    for name, matrices, n, fused in _parameters(model):
        of = [found[m] for m in matrices if m in found and type(found[m]) is Lora and not found[m].lora_dropout]
        if len(of) < len(matrices) or any(a.settings() != of[0].settings() for a in of):
            continue
        states, said = [a.state() for a in of], of[0].settings()
        a = [s["lora_A.weight"] for s in states]
        b = [_blocks(fused, [s["lora_B.weight"] for s in states[i : i + n]]) for i in range(0, len(states), n)]
        said = {**said, "r": n * said["r"], "lora_alpha": said["lora_alpha"] * _times(n, said)}
        for m in matrices:
            del out[m]
        out[name] = Joined(torch.cat(a), torch.stack(b, -1).flatten(1), said)
        joined.append(name)
    return out, joined


def apart(model: nn.Module, found: Mapping[str, Any]) -> list[str]:
    """Those of adapters, once joined, that are of single experts, which PEFT may not know."""
    experts = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, Experts))
    return [n for n, a in found.items() if n.startswith(experts) and not isinstance(a, Joined)]


def split(model: nn.Module, states: States, settings: Mapping[str, Any]) -> tuple[States, dict[str, Any]]:
    """The inverse, also of what PEFT wrote: states by the names of PEFT's wrappers -> by ops', and settings whose
    patterns tell their rank and alpha. Raises InputError where one is missing, or a shape does not fit."""
    targets = settings.get("target_parameters") or []
    met = [p for p in _parameters(model) if any(f".{p[0]}".endswith(f".{t}") for t in targets)]
    names = wrappers([name for name, *_ in met])
    out = {names.get(n, n): state for n, state in states.items()}
    ranks, alphas = {}, {}
    for name, matrices, n, fused in met:
        if name not in out:
            raise InputError(f"target_parameters: {name} has no lora_A and lora_B.")
        mine = own(settings, name)
        parts, r = _split(name, out.pop(name), mine["r"], len(matrices) // n, n, fused)
        out |= dict(zip(matrices, parts, strict=True))
        either = "|".join(m.rpartition(".")[2] for m in matrices[:n])
        key = rf"{re.escape(name.rpartition('.')[0])}\.\d+\.({either})"
        ranks[key], alphas[key] = r, mine["lora_alpha"] / _times(mine["r"] // r, mine)
    own_of = {"rank_pattern": ranks, "alpha_pattern": alphas} if met else {}
    kept = {k: v for k, v in settings.items() if k != "target_parameters"}
    return out, kept | {k: {**v, **(settings.get(k) or {})} for k, v in own_of.items()}


def _split(
    name: str, state: Mapping[str, Tensor], r: int, experts: int, n: int, fused: Fused
) -> tuple[list[dict[str, Tensor]], int]:
    """Each matrix's A and B, expert after expert, and their rank: an n-th, where each part has columns of its own."""
    a, b = state["lora_A.weight"], state["lora_B.weight"]
    if r < 1 or a.ndim != 2 or b.ndim != 2 or len(a) != experts * r or b.shape[1] != len(a) or len(b) % n:
        raise InputError(
            f"{name} has lora_A of the shape {tuple(a.shape)} and lora_B of {tuple(b.shape)}, and not those of "
            f"{experts} experts of the rank {r}."
        )
    each_a, each_b = a.unflatten(0, (experts, r)), b.unflatten(1, (r, experts)).permute(2, 0, 1)
    flat = replace(fused, turned=False)
    pairs = [(x, i, p) for x, y in zip(each_a, each_b, strict=True) for i, p in enumerate(flat.split(y, n))]
    width = r // n
    if r % n or any(torch.cat([p[:, : i * width], p[:, (i + 1) * width :]], 1).any() for _, i, p in pairs):
        width = r  # all parts share an A
    blocks = [(x, p, slice(i * width, (i + 1) * width) if width < r else slice(None)) for x, i, p in pairs]
    return [{"lora_A.weight": x[at].contiguous(), "lora_B.weight": p[:, at].contiguous()} for x, p, at in blocks], width


def _parameters(model: nn.Module) -> Iterator[tuple[str, list[str], int, Fused]]:
    """A fused parameter's name, its ops' names expert after expert, how many each expert has, and how they lie."""
    for name, m in model.named_modules():
        if isinstance(m, Experts):
            for parameter, matrices in m.fused.parameters.items():
                ops = [f"{name}.{e}.{matrix}" for e in range(len(m)) for matrix in matrices]
                yield f"{name}.{parameter}", ops, len(matrices), m.fused


def _times(n: int, settings: Mapping[str, Any]) -> float:
    """What alpha grows by as the rank grows n times, so that s stays."""
    return math.sqrt(n) if settings.get("use_rslora") else n


def _blocks(fused: Fused, parts: list[Tensor]) -> Tensor:
    """B of an expert: each part (out, r) in columns of its own, and in the rows that are its own in the parameter."""
    r = parts[0].shape[1]
    wide = [nn.functional.pad(p, (i * r, (len(parts) - 1 - i) * r)) for i, p in enumerate(parts)]
    return replace(fused, turned=False).join(wide)
