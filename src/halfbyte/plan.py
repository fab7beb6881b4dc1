"""What will happen to every parameter, before it happens: nothing is skipped in silence."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from torch import nn

from halfbyte.errors import InputError
from halfbyte.formats import Format
from halfbyte.layers import Codes, Weight, ops
from halfbyte.models import parts, role_of_parameter, roles, tied
from halfbyte.qtensor import stored_bytes
from halfbyte.scheme import Mix, Scheme


@dataclass(frozen=True)
class Entry:
    """One parameter. before: its dtype or format. after: the format it gets, or None if it is kept as it is."""

    name: str
    shape: tuple[int, ...]
    role: str
    before: str
    bytes_before: int
    after: Format | None
    bytes_after: int
    input: Format | None = None
    why: str = ""
    tied_to: str | None = None

    @property
    def parameters(self) -> int:
        n = 1
        for d in self.shape:
            n *= d
        return n


def inventory(model: nn.Module) -> list[Entry]:
    """Every parameter as it is now; a tied one stands under each of its names and counts once."""
    role, shared = roles(model), tied(model)
    entries = []
    for name, op in ops(model):
        w = op.weight
        held = w.stored.q.format.name if isinstance(w.stored, Codes) else _dtype(w.dtype)
        size = 0 if name in shared else _size(w)
        to = f"{shared[name]}.weight" if name in shared else None
        entries.append(
            Entry(
                f"{name}.weight",
                tuple(w.shape),
                role[name],
                held,
                size,
                None,
                size,
                getattr(op, "input", None),
                tied_to=to,
            )
        )
    for name, p in _others(model):
        kind = role_of_parameter(model, name)
        entries.append(Entry(name, tuple(p.shape), kind, _dtype(p.dtype), p.nbytes, None, p.nbytes))
    return entries


def plan(model: nn.Module, chosen: Scheme | Mix) -> list[Entry]:
    """The inventory with what a scheme makes of it. Raises InputError for a group that does not fit, and for
    matrices that would stay as they are without a rule that names them: those of layers that are no ops."""
    scheme = chosen.on(parts(model)) if isinstance(chosen, Mix) else chosen
    out, unnamed = [], []
    known = {f"{name}.weight" for name, _ in ops(model)}
    entries = inventory(model)
    widths = [e.shape[-1] for e in entries if e.name in known and _grouped(scheme, e)]
    for e in entries:
        module = (e.tied_to or e.name).removesuffix(".weight")
        if e.name not in known:
            rule = scheme.rule(e.name, e.role)
            if len(e.shape) > 1 and (rule is None or rule.weight is not None):
                unnamed.append(f"{e.name} {list(e.shape)}")
            out.append(_with(e, None, None, "not a matrix" if len(e.shape) < 2 or rule is None else rule.why))
            continue
        rule = scheme.decide(module, e.role, e.shape, widths)
        kept = e.role == "convolution" and not scheme.alone  # no folder of others has a place for what rounds them
        out.append(_with(e, rule.weight, None if kept else rule.input, rule.why))
    if unnamed:
        alike = dict.fromkeys(numberless(n) for n in unnamed)
        raise InputError(
            f"scheme {scheme.name} would leave {len(unnamed)} weights in {_dtype(torch.bfloat16)} or more without "
            f"saying so: {', '.join(alike)}. halfbyte does not quantize that kind of layer yet; a recipe's scheme can "
            "keep them with a rule that names them."
        )
    return out


def numberless(name: str) -> str:
    """The same for names that differ by a number, such as those of all layers."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _grouped(scheme: Scheme, e: Entry) -> bool:
    rule = scheme.rule((e.tied_to or e.name).removesuffix(".weight"), e.role)
    return rule is not None and rule.weight is not None and isinstance(rule.weight.group, int) and not rule.weight.flat


def _with(e: Entry, f: Format | None, input: Format | None, why: str) -> Entry:
    if f is None:
        return replace(e, why=why)
    dtype = getattr(torch, e.before, torch.bfloat16)
    size = 0 if e.tied_to else stored_bytes(f, e.shape, dtype)
    return replace(e, after=f, input=input, bytes_after=size, why=why)


def _dtype(d: torch.dtype) -> str:
    return str(d).removeprefix("torch.")


def _size(w: Weight) -> int:
    return w.stored.q.nbytes if isinstance(w.stored, Codes) else w.stored.numel() * w.stored.dtype.itemsize


def _others(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters that are no op's weight: norms, biases, and whatever no op stands for."""
    inside = {id(p) for _, op in ops(model) for p in op.weight.parameters()}
    return [(n, p) for n, p in model.named_parameters() if id(p) not in inside]


def totals(entries: list[Entry]) -> tuple[int, int, int]:
    """Parameters, bytes before, bytes after."""
    counted = [e for e in entries if not e.tied_to]
    return (
        sum(e.parameters for e in counted), sum(e.bytes_before for e in counted), sum(e.bytes_after for e in counted)
    )  # fmt: skip


def summary(entries: list[Entry]) -> list[tuple[str, int, str, int, int, str]]:
    """Entries that fare alike, counted: (what it becomes, how many, example, bytes before, after, why)."""
    rows: dict[tuple[str, str], list[Entry]] = {}
    for e in entries:
        if not e.tied_to:
            becomes = e.after.name if e.after else e.before
            rows.setdefault((becomes, e.why), []).append(e)
    return [
        (becomes, len(es), es[0].name, sum(e.bytes_before for e in es), sum(e.bytes_after for e in es), why)
        for (becomes, why), es in rows.items()
    ]
