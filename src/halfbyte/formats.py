"""What a stored number may be: grids, groups, scales and zero points. Data only; a new format is a row in FORMATS.

A format says how a float tensor w of shape (..., out, in) is held:

    w  ~  scale * (grid value of a code)                      (symmetric integers, tables, floats)
    w  ~  scale * (code - zero)                               (asymmetric integers, zero is an integer)
    w  ~  scale * code + zero                                 (zero == "float": q4_1, q4_k)

with one scale (and zero) per group of `group` neighbours along `in`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from halfbyte.errors import InputError


@dataclass(frozen=True)
class Integers:
    """Codes 0 .. 2^bits-1. Signed, code c stands for c - 2^(bits-1); unsigned, for c less the zero point."""

    bits: int
    signed: bool = True

    @property
    def middle(self) -> int:
        """What is taken off every code: -middle is the lowest integer."""
        return 1 << (self.bits - 1) if self.signed else 0

    @property
    def top(self) -> int:
        return (1 << self.bits) - 1


@dataclass(frozen=True)
class Table:
    """A list of values, by code. A value halfway between two goes to the lower one, or to the even code."""

    values: tuple[float, ...]
    ties: str = "lower"
    lattice: int = 0  # points on [-1, 1] that a number is moved to before it is rounded: bitsandbytes' look-up

    @property
    def bits(self) -> int:
        return (len(self.values) - 1).bit_length()

    @cached_property
    def codebook(self) -> Tensor:
        """(n,) float32, by code."""
        return torch.tensor(self.values, dtype=torch.float32)

    @cached_property
    def pairs(self) -> Tensor:
        """(256, 2) float32, for 4-bit tables: the values of a byte's two codes, low nibble first."""
        byte = torch.arange(256)
        return torch.stack((self.codebook[byte & 15], self.codebook[byte >> 4]), -1)

    @cached_property
    def order(self) -> Tensor:
        """(n,) int64: codes by rising value. A 0 that stands twice (-0) keeps its first code where ties are even;
        bitsandbytes keeps both, so that a tiny positive number gets the second."""
        codes = sorted(range(len(self.values)), key=lambda c: self.values[c])
        if self.ties == "even":
            codes = [c for c in codes if self.values.index(self.values[c]) == c]
        return torch.tensor(codes)

    @cached_property
    def bounds(self) -> Tensor:
        """(n-1,) float32: the midpoints between neighbouring values."""
        v = self.codebook[self.order]
        return (v[1:] + v[:-1]) / 2


@dataclass(frozen=True)
class Float8:
    """An 8-bit float type of torch, rounded to nearest even and saturated."""

    dtype: torch.dtype
    bits: int = 8

    @property
    def largest(self) -> float:
        return torch.finfo(self.dtype).max


Grid = Integers | Table | Float8
SOURCE = "source"  # a scale in the dtype of the weight it came from, so that a reader in that dtype has it exactly


@dataclass(frozen=True)
class Format:
    """How a tensor is stored. See the module's formulas.

    group: neighbours along the input that share a scale, or "channel" (an output row; for activations: a
    token), or "tensor". flat: groups run over the flattened tensor, the last one may be short (bitsandbytes).
    scale: a dtype's name, or a Format that the matrix of scales is itself stored in (double quantization,
    super-blocks). zero: None, "integer" (a code), or a float dtype's name or Format as for scale (added).
    center: the mean of the tensor is taken out first (the offset of bitsandbytes' double quantization).
    search: how qparams are found by default: the best, by measurement, of those that cost no data.
    """

    name: str
    grid: Grid
    group: int | str
    scale: str | Format = SOURCE
    zero: str | Format | None = None
    flat: bool = False
    center: bool = False
    search: str = "minmax"

    @property
    def bits(self) -> int:
        return self.grid.bits

    @property
    def keeps_zero(self) -> bool:
        """Whether a group of zeros keeps a scale of 0: in bitsandbytes' formats, and where no code stands for 0."""
        return self.flat or (isinstance(self.grid, Table) and 0.0 not in self.grid.values)

    def __str__(self) -> str:
        return self.name

    def groups(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the matrix of scales for a tensor of this shape. Raises InputError if a group does not fit."""
        n = 1
        for d in shape:
            n *= d
        if self.group == "tensor":
            return (1,)
        if self.flat:
            assert isinstance(self.group, int)
            return (-(-n // self.group),)
        if not shape:
            raise InputError(f"{self.name} needs a tensor with at least one dimension, not a scalar.")
        if self.group == "channel":
            return (*shape[:-1], 1)
        assert isinstance(self.group, int)
        whole = self.group
        if isinstance(self.scale, Format) and isinstance(self.scale.group, int) and not self.scale.flat:
            whole *= self.scale.group  # a super-block
        if shape[-1] % whole:
            raise InputError(f"{self.name}: a group of {whole} does not divide the {shape[-1]} inputs of {shape}.")
        return (*shape[:-1], shape[-1] // self.group)

    def with_group(self, group: int) -> Format:
        """The same format in groups of another size, named so. Raises InputError where the size is part of it."""
        if not isinstance(self.group, int) or not re.search(rf"-g{self.group}\b", self.name):
            raise InputError(f"{self.name} has no group size that could be changed to {group}.")
        return parse(re.sub(rf"-g{self.group}\b", f"-g{group}", self.name))


# The normal float of QLoRA (arXiv:2305.14314, appendix E), as bitsandbytes has it.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
_FP4_BNB = tuple(s * v for s in (1, -1) for v in (0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12))
_E2M1 = tuple(s * v for s in (1.0, -1.0) for v in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))

# ggml's non-linear 4 bits: a fixed table, finer around 0
_IQ4_NL = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)


def _dynamic_map() -> tuple[float, ...]:
    """The signed 8-bit dynamic map (arXiv:1511.04561) that bitsandbytes stores NF4's block constants in."""
    data = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        means = 10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        data += [*means.tolist(), *(-means).tolist()]
    return tuple(sorted(data))


_DYNAMIC = Format("dynamic8-g256", Table(_dynamic_map(), lattice=1 << 16), 256, "float32", flat=True, center=True)


_TABLES = {
    "nf4": Format("nf4", Table(_NF4), 64, "float32", flat=True),
    "fp4-bnb": Format("fp4-bnb", Table(_FP4_BNB), 64, "float32", flat=True),
    "fp4-e2m1": Format("fp4-e2m1", Table(_E2M1, ties="even"), 32),
    "fp8-e4m3": Format("fp8-e4m3", Float8(torch.float8_e4m3fn), "channel"),
    "fp8-e5m2": Format("fp8-e5m2", Float8(torch.float8_e5m2), "channel"),
}
_NAME = re.compile(
    r"(?P<base>(?P<u>u?)int(?P<bits>[2-8])|nf4|fp4-bnb|fp4-e2m1|fp8-e4m3|fp8-e5m2)"
    r"-(?P<group>tensor|channel|token|g(?P<n>[1-9][0-9]*))(?P<sym>-sym|-asym|-affine)?(?P<dq>-dq)?"
)


def _super_block(name: str, bits: int = 6, scales: int = 8, signed: bool = False) -> Format:
    """Scales (or minima) of a K-quant: integers, all those of a super-block of 256 with one fp16 scale."""
    return Format(name, Integers(bits, signed), scales, "float16")


def _k_quant(name: str, bits: int, group: int, scale: Format, zero: Format | None = None) -> Format:
    return Format(name, Integers(bits, signed=zero is None), group, scale, zero, search="mse")


_FIXED = [
    # ggml's blocks: ggml-quants.c names, the gguf package's arithmetic
    Format("q4_0", Integers(4), 32, "float16", search="weighted"),
    Format("q4_1", Integers(4, signed=False), 32, "float16", zero="float16", search="mse"),
    Format("q5_0", Integers(5), 32, "float16", search="weighted"),
    Format("q5_1", Integers(5, signed=False), 32, "float16", zero="float16", search="mse"),
    Format("q8_0", Integers(8), 32, "float16"),
    Format("iq4_nl", Table(_IQ4_NL), 32, "float16", search="weighted"),
    _k_quant("q2_k", 2, 16, _super_block("q2_k-scales", 4, 16), _super_block("q2_k-mins", 4, 16)),
    _k_quant("q3_k", 3, 16, _super_block("q3_k-scales", 6, 16, signed=True)),
    _k_quant("q4_k", 4, 32, _super_block("q4_k-scales"), _super_block("q4_k-mins")),
    _k_quant("q5_k", 5, 32, _super_block("q5_k-scales"), _super_block("q5_k-mins")),
    _k_quant("q6_k", 6, 16, _super_block("q6_k-scales", 8, 16, signed=True)),
    # LLM.int8 (arXiv:2208.07339), as bitsandbytes has it: by row, without the lowest integer
    Format("int8-bnb", Integers(8), "channel", "float32", search="restricted"),
    # OCP microscaling and NVIDIA's variant of it
    Format("mxfp4", Table(_E2M1, ties="even"), 32, "float8_e8m0fnu"),
    Format(
        "nvfp4",
        Table(_E2M1, ties="even"),
        16,
        Format("nvfp4-scales", Float8(torch.float8_e4m3fn), "tensor", "float32", search="power-of-two"),
    ),
]


class Formats:
    """The table of formats, by name. Iterating yields names; a name of the grammar that is no row is parsed."""

    def __init__(self, rows: list[Format]) -> None:
        self._rows = {f.name: f for f in rows}

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, name: object) -> bool:
        try:
            return bool(self[name] if isinstance(name, str) else False)
        except InputError:
            return False

    def __getitem__(self, name: str) -> Format:
        """Raises InputError with the nearest name for one that is not known."""
        if name in self._rows:
            return self._rows[name]
        if found := _parse(name):
            return found
        near = difflib.get_close_matches(name, self._rows, 1, 0.4)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise InputError(f"{name!r} is not a format{hint} Formats are: {', '.join(self._rows)}; other sizes by -gN.")

    def register(self, f: Format) -> Format:
        """Adds a row, and gives it back. Raises InputError if another format has the name."""
        if self._rows.get(f.name, f) != f:
            raise InputError(f"there is a format named {f.name!r} already.")
        self._rows[f.name] = f
        return f


def _parse(name: str) -> Format | None:
    m = _NAME.fullmatch(name)
    if m is None:
        return None
    group = int(m["n"]) if m["n"] else m["group"].replace("token", "channel")
    if m["bits"]:
        symmetric = m["sym"] == "-sym" or (m["sym"] is None and not m["u"])
        if m["dq"] or (m["sym"] == "-affine" and symmetric):
            return None
        grid = Integers(int(m["bits"]), signed=symmetric)
        # measured (see kernels.search.weighted): a search pays for few symmetric levels, the range does elsewhere
        search = "weighted" if symmetric and grid.bits <= 4 else "minmax"
        zero = None if symmetric else SOURCE if m["sym"] == "-affine" else "integer"  # affine: MLX's, a float is added
        return Format(name, grid, group, zero=zero, search=search)
    base = _TABLES[m["base"]]
    if m["sym"] or (m["dq"] and m["base"] != "nf4") or (base.flat and not m["n"]):
        return None
    return replace(base, name=name, group=group, scale=_DYNAMIC if m["dq"] else base.scale)


FORMATS = Formats(
    [
        f
        for n in (
            "int8-tensor", "int8-channel", "int8-g128", "int8-g64", "int8-g32", "uint8-channel", "uint8-g64",
            "int6-g64", "int5-g64", "int4-channel", "int4-g128", "int4-g64", "int4-g32",
            "uint4-channel", "uint4-g128", "uint4-g64", "uint4-g32", "int3-g128", "int3-g64", "int3-g32", "uint3-g64",
            "int2-g64", "int2-g32", "uint2-g64", "uint2-g32",
            "uint8-g64-affine", "uint4-g64-affine", "uint4-g32-affine",
            "nf4-g64", "nf4-g64-dq", "fp4-bnb-g64", "fp4-e2m1-g32",
            "fp8-e4m3-tensor", "fp8-e4m3-channel", "fp8-e5m2-channel",
        )
        if (f := _parse(n))
    ]
    + _FIXED
)  # fmt: skip


def parse(format: str | Format) -> Format:
    """A format given by name or as an object. Raises InputError for an unknown name."""
    return format if isinstance(format, Format) else FORMATS[format]
