"""A quantized tensor: its parts, and what they mean. Data and its definition; speed lives in the kernels."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from halfbyte.errors import InputError
from halfbyte.formats import SOURCE, Float8, Format, Integers, Table, parse


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes (..., n) -> uint8 (..., ceil(n * bits / 8)): dense, the first code in the lowest bits."""
    if bits == 8:
        return codes.contiguous()
    n = codes.shape[-1]
    if bits == 4:
        padded = torch.nn.functional.pad(codes, (0, n % 2))
        return padded[..., 0::2] | (padded[..., 1::2] << 4)
    # eight codes fill `bits` bytes exactly; in bytes throughout, since wider words would be eight times the memory
    runs = torch.nn.functional.pad(codes, (0, -n % 8)).unflatten(-1, (-1, 8)).unbind(-1)
    out = [
        _joined([_shifted(c, bits * j - 8 * k) for j, c in enumerate(runs) if -bits < bits * j - 8 * k < 8])
        for k in range(bits)
    ]
    return torch.stack(out, -1).flatten(-2)[..., : -(-n * bits // 8)].contiguous()


def _shifted(codes: Tensor, by: int) -> Tensor:
    return codes << by if by >= 0 else codes >> -by


def _joined(parts: list[Tensor]) -> Tensor:
    return functools.reduce(torch.bitwise_or, parts)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `pack`: uint8 (..., ceil(n * bits / 8)) -> uint8 codes (..., n)."""
    if bits == 8:
        return packed
    if bits == 4:
        return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)[..., :n]
    runs = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits)).unbind(-1)
    codes = [
        _joined([_shifted(b, 8 * k - bits * j) for k, b in enumerate(runs) if -8 < 8 * k - bits * j < bits])
        for j in range(8)
    ]
    return (torch.stack(codes, -1).flatten(-2) & ((1 << bits) - 1))[..., :n]


def grouped(w: Tensor, f: Format) -> Tensor:
    """w of any shape -> float32 (groups, n): a row a group; a short last group is filled with zeros."""
    g = prod(f.groups(tuple(w.shape)))
    flat = w.float().reshape(-1)
    if f.flat and isinstance(f.group, int):
        flat = torch.nn.functional.pad(flat, (0, g * f.group - flat.numel()))
    return flat.reshape(g, flat.numel() // g if g else 0)


def ungrouped(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `grouped`: drops the filling."""
    return rows.reshape(-1)[: prod(shape)].reshape(shape)


@dataclass(frozen=True)
class QParams:
    """Scale and zero point of one tensor in one format, each float32 of shape `format.groups(shape)`.

    zero is None where the format has none; an integer zero point is held as a float here, and is rounded and
    clamped when stored; a float zero is what is added. stored: where a format's scales are quantized themselves, the
    parts "scale" and "zero" that a search has chosen for them; without, they are rounded to nearest.
    """

    scale: Tensor
    zero: Tensor | None = None
    stored: dict[str, QTensor] | None = None


class Layout(Protocol):
    """A kernel's own order of the bytes of a QTensor's parts."""

    name: str

    def restore(self) -> None:
        """Puts the bytes back into the canonical order."""
        ...

    def rows(self, index: Tensor) -> dict[str, Tensor]:
        """Canonical codes, scale and zero of some rows, as `QTensor.rows` gives them."""
        ...


@dataclass
class QTensor:
    """A tensor in a format.

    shape: the logical shape, (..., out, in). dtype: the source's, and that of `dequantize()`.
    parts: "codes" uint8, packed along the input; "scale" and "zero", each a tensor of shape
    `format.groups(shape)` or, where the format nests, a QTensor of that shape; "offset", a scalar that
    centred formats add; "order", int32 (in,): codes are held in another order of the inputs, of which this is the
    first, the second ... (GPTQ's desc_act).

    A kernel may put the bytes of the parts into an order of its own, which `layout` then names; `canonical()`
    takes that back, and all else that reads parts does so first. Only who reaches into `parts` must know.
    """

    format: Format
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: dict[str, Tensor | QTensor] = field(repr=False)
    laid_out: Layout | None = field(default=None, repr=False, compare=False)

    @property
    def layout(self) -> str:
        """ "canonical", or the name of a kernel's own order of the parts' bytes."""
        return self.laid_out.name if self.laid_out is not None else "canonical"

    def canonical(self) -> QTensor:
        """This QTensor, its parts in the canonical layout."""
        if self.laid_out is not None:
            self.laid_out.restore()
            self.laid_out = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.canonical().__dict__.copy()  # a copy or a file has no kernel's layout

    @property
    def nbytes(self) -> int:
        """Bytes that the parts really take."""
        return sum(p.nbytes for p in self.parts.values())

    @property
    def codes(self) -> Tensor:
        """uint8 of the logical shape, unpacked."""
        packed = self.canonical().parts["codes"]
        assert isinstance(packed, Tensor)
        if self.format.flat:
            return unpack(packed, self.format.bits, prod(self.shape)).reshape(self.shape)
        return unpack(packed, self.format.bits, self.shape[-1]).reshape(self.shape)

    @property
    def qparams(self) -> QParams:
        """Scale and zero as they are after storage: what every product uses. Views where nothing is nested."""
        parts = self.canonical().parts
        return QParams(_value(parts["scale"]), _value(parts["zero"]) if "zero" in parts else None)

    def dequantize(self) -> Tensor:
        """The tensor that the parts stand for, computed in float32 and rounded once to the source's dtype."""
        self.canonical()
        if isinstance(self.format.grid, Table) and self.format.bits == 4 and self._whole_bytes():
            value = self._by_pairs(self.format.grid)
        else:
            value = ungrouped(decode(self.codes, self.format, self.qparams), self.shape)
        offset = self.parts.get("offset", 0.0)
        assert not isinstance(offset, QTensor)
        value = (value + offset if self.format.center else value).to(self.dtype)
        order = self.parts.get("order")
        return value[..., order.argsort()] if isinstance(order, Tensor) else value

    def _whole_bytes(self) -> bool:
        """Whether codes fill bytes and groups exactly, so that no part of either is filling."""
        n, groups = prod(self.shape), prod(self.format.groups(self.shape))
        return n > 0 and self.shape[-1] % 2 == 0 and n == groups * self._group_length()

    def _group_length(self) -> int:
        group = self.format.group
        return group if isinstance(group, int) else self.shape[-1] if group == "channel" else prod(self.shape)

    def _by_pairs(self, grid: Table) -> Tensor:
        """4-bit codes of a table, two at a time: a byte selects a pair of float32 values, moved as one float64."""
        packed = self.parts["codes"]
        assert isinstance(packed, Tensor)
        pairs = grid.pairs.to(packed.device).view(torch.float64)[:, 0]
        values = pairs.index_select(0, packed.reshape(-1).int()).view(torch.float32)
        scale = self.qparams.scale.reshape(-1, 1)
        return (values.reshape(scale.shape[0], -1) * scale).reshape(self.shape)

    @property
    def has_rows(self) -> bool:
        """Whether rows can be taken alone: each has its own whole groups, and those of its scales. A kernel's layout
        has only rows of plain scales."""
        if len(self.shape) != 2 or self.format.group == "tensor" or self.format.center or "order" in self.parts:
            return False
        nested = [p for p in self.parts.values() if isinstance(p, QTensor)]
        if nested and self.laid_out is not None:
            return False
        return all(p.has_rows for p in nested) and not (self.format.flat and self.shape[1] % self._group_length())

    def rows(self, index: Tensor) -> QTensor:
        """Rows of a matrix, by an integer index of any shape: shape (*index.shape, in). Needs `has_rows`."""

        def take(part: Tensor | QTensor) -> Tensor | QTensor:
            return part.rows(index) if isinstance(part, QTensor) else part.reshape(self.shape[0], -1)[index]

        parts: dict[str, Tensor | QTensor] = (
            {k: take(p) for k, p in self.parts.items()} if self.laid_out is None else {**self.laid_out.rows(index)}
        )
        shape = (*index.shape, self.shape[1])
        if self.format.flat:
            parts = {k: p.reshape(-1) for k, p in parts.items() if isinstance(p, Tensor)}
        return replace(self, shape=shape, parts=parts, laid_out=None)

    @classmethod
    def stacked(cls, rows: Sequence[QTensor]) -> QTensor:
        """One QTensor of several of one format, (out_i, in) -> (sum of out_i, in); not of flat ones or ones by tensor,
        whose parts are of no single row."""
        first = rows[0]
        if len(rows) == 1:
            return first

        def stack(name: str) -> Tensor | QTensor:
            parts: list[Any] = [q.canonical().parts[name] for q in rows]
            return cls.stacked(parts) if isinstance(parts[0], QTensor) else torch.cat(parts)

        shape = (sum(q.shape[0] for q in rows), *first.shape[1:])
        return cls(first.format, shape, first.dtype, {name: stack(name) for name in first.parts})

    def to(self, device: torch.device | str) -> QTensor:
        """The same data on another device."""
        return self.with_tensors({k: t.to(device) for k, t in self.tensors().items()})

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """The parts as flat names, nested ones joined by a dot: "scale.codes". Aliases: they share the parts' memory,
        and keep the canonical bytes when a kernel lays out the parts."""
        out: dict[str, Tensor] = {}
        for name, part in self.canonical().parts.items():
            if isinstance(part, QTensor):
                out |= part.tensors(f"{prefix}{name}.")
            else:
                out[prefix + name] = part.view_as(part) if part.requires_grad else part.detach()
        return out

    def leaves(self, prefix: str = "") -> dict[str, Tensor]:
        """The parts' own tensors, named as `tensors()` names them, in whatever layout they are."""
        out: dict[str, Tensor] = {}
        for name, part in self.parts.items():
            out |= part.leaves(f"{prefix}{name}.") if isinstance(part, QTensor) else {prefix + name: part}
        return out

    @classmethod
    def of_leaves(cls, f: Format, shape: tuple[int, ...], dtype: torch.dtype, tensors: dict[str, Tensor]) -> QTensor:
        """A QTensor of canonical parts, named as `tensors()` names them."""
        parts: dict[str, Tensor | QTensor] = {}
        for name, how in (("codes", None), ("scale", f.scale), ("zero", f.zero), ("offset", None), ("order", None)):
            inner = {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}
            if isinstance(how, Format) and inner:
                parts[name] = cls.of_leaves(how, f.groups(shape), torch.float32, inner)
            elif name in tensors:
                parts[name] = tensors[name]
        return cls(f, shape, dtype, parts)

    def with_tensors(self, tensors: dict[str, Tensor], prefix: str = "") -> QTensor:
        """The same QTensor around other tensors, named as `tensors()` names them."""
        parts = {
            k: p.with_tensors(tensors, f"{prefix}{k}.") if isinstance(p, QTensor) else tensors[prefix + k]
            for k, p in self.parts.items()
        }
        return replace(self, parts=parts, laid_out=None)


def no_shift(f: Format) -> str | None:
    """Why the zero points of a format do not take in a number that is added to all of a group, in words; None if
    they do."""
    if not isinstance(f.grid, Integers) or f.zero is None:
        return f"{f} has no zero points, which would take in what is added to a group: choose an asymmetric format"
    if isinstance(f.zero, Format):
        return f"the zero points of {f} are quantized themselves: choose a format such as q4_1 or uint4-g32-affine"
    if f.group == "tensor":
        return f"{f} has one zero point for all rows, and each row is added something else"
    return None


def unshiftable(q: QTensor) -> str | None:
    """As `no_shift`, of codes: their groups must be neighbours too."""
    return "its inputs are in an order of their own, across groups" if "order" in q.parts else no_shift(q.format)


def shifted(q: QTensor, by: Tensor) -> QTensor:
    """q with a number added to all weights of a group, in its zero points: codes and scales are the same. by: float32
    (out, n), one for each of n equal runs of inputs, which are whole groups. A zero that is a float keeps its dtype;
    integers, which could not hold the sum, become what is added, -scale * zero, in the dtype of the scales.

    Raises InputError for what is `unshiftable`, for runs that end within a group, and where the dtype overflows."""
    if (why := unshiftable(q)) is not None:
        raise InputError(f"{why}.")
    f = q.format
    zero = (added(q) + spread(by, q)).to(zero_dtype(q))
    if f.zero == "integer":
        f = parse(f"uint{f.bits}-{f.group if f.group == 'channel' else f'g{f.group}'}-affine")
    if not zero.isfinite().all():
        raise InputError(f"what is added to the zero points of {q.format} is more than {zero.dtype} holds.")
    return replace(q, format=f, parts={**q.parts, "zero": zero}, laid_out=None)


def spread(by: Tensor, q: QTensor) -> Tensor:
    """by (out, n), of n equal runs of inputs, for each of q's groups: (out, groups). Raises InputError for runs that
    end within a group."""
    groups = q.format.groups(q.shape)[-1]
    if groups % by.shape[-1]:
        raise InputError(f"{groups} groups of {q.format} in a row are not {by.shape[-1]} runs of whole ones.")
    return by.repeat_interleave(groups // by.shape[-1], -1)


def zero_dtype(q: QTensor) -> torch.dtype:
    """That of what zero points add once it is `shifted`."""
    return q.tensors()["scale" if q.format.zero == "integer" else "zero"].dtype


def added(q: QTensor) -> Tensor:
    """What zero points add to each weight of a group: float32 (out, groups)."""
    p = q.qparams
    assert p.zero is not None
    return -p.scale * p.zero if q.format.zero == "integer" else p.zero


def _value(part: Tensor | QTensor) -> Tensor:
    return part.dequantize() if isinstance(part, QTensor) else part.float()


def grid_values(codes: Tensor, f: Format, zero: Tensor | None = None) -> Tensor:
    """Codes -> the float32 values of the grid, before the scale. `zero` is the integer zero point, if any."""
    match f.grid:
        case Integers() as grid:
            return codes.float() - (zero if zero is not None and f.zero == "integer" else grid.middle)
        case Table() as grid:
            return grid.codebook.to(codes.device).index_select(0, codes.reshape(-1).int()).reshape(codes.shape)
        case Float8() as grid:
            return codes.view(grid.dtype).float()


def decode(codes: Tensor, f: Format, p: QParams) -> Tensor:
    """uint8 codes of any shape -> float32 (groups, n), by the formulas of formats.py."""
    filled = torch.nn.functional.pad(codes.reshape(-1), (0, -codes.numel() % f.group)) if f.flat else codes  # pyright: ignore
    rows = filled.reshape(p.scale.numel(), -1) if p.scale.numel() else filled.reshape(0, 0)
    scale = p.scale.reshape(-1, 1)
    zero = None if p.zero is None else p.zero.reshape(-1, 1)
    value = grid_values(rows, f, zero) * scale
    return value if zero is None or f.zero == "integer" else value + zero


def check_parts(q: QTensor) -> QTensor:
    """Checks sizes and dtypes against format and shape, for parts that came from a file. Raises InputError."""
    f, groups = q.format, q.format.groups(q.shape)
    n = -(-prod(q.shape) * f.bits // 8) if f.flat else prod(q.shape[:-1]) * -(-q.shape[-1] * f.bits // 8)
    codes = q.parts["codes"]
    if codes.dtype != torch.uint8 or prod(codes.shape) != n:
        raise InputError(
            f"{f.name} of shape {q.shape} needs {n} bytes of codes, not {tuple(codes.shape)} {codes.dtype}."
        )
    for name in ("scale", "zero"):
        if name in q.parts and tuple(q.parts[name].shape) != groups:
            raise InputError(
                f"{f.name} of shape {q.shape} needs a {name} of shape {groups}, not {q.parts[name].shape}."
            )
    return q


def stored_bytes(f: Format, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes that a tensor of this shape and source dtype takes in a format: QTensor.nbytes, beforehand."""
    groups = f.groups(shape)
    n = -(-prod(shape) * f.bits // 8) if f.flat else prod(shape[:-1]) * -(-shape[-1] * f.bits // 8)

    def part(how: str | Format) -> int:
        if isinstance(how, Format):
            return stored_bytes(how, groups, torch.float32)
        return prod(groups) * (dtype if how == SOURCE else getattr(torch, how)).itemsize

    zero = 0 if f.zero is None else prod(groups) if f.zero == "integer" else part(f.zero)
    return n + part(f.scale) + zero + (4 if f.center else 0)
