"""The C++ products: which matrices they serve, and the layout that they give their bytes."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import InputError
from halfbyte.formats import Format, Integers, Table
from halfbyte.kernels import pages
from halfbyte.qtensor import QTensor, grid_values

_cpu: Any
try:
    from halfbyte.kernels import _cpu  # pyright: ignore[reportAttributeAccessIssue]
except ImportError:
    _cpu = None

on = _cpu is not None  # off, torch's kernels serve everything


def use(name: str) -> str:
    """Chooses an instruction set, or "reference" for torch's kernels alone; gives what was in use before.

    Raises InputError for one that this machine or this build does not have.
    """
    global on
    before = isa()
    if name == "reference":
        on = False
    elif _cpu is None:
        raise InputError(f"there is no instruction set {name!r} to use: {_MISSING}.")
    else:
        try:
            _cpu.use_isa(name)
        except ValueError as e:
            raise InputError(f"{e}, reference.") from e
        on = True
    return before


def isa() -> str:
    """The instruction set in use, or "reference"."""
    return _cpu.isa() if on else "reference"


def isas() -> list[str]:
    """Those that run here, the fastest first; "reference" is the last."""
    return [*(_cpu.isas() if _cpu is not None else []), "reference"]


def thread_source() -> str:
    """Whose threads the kernels run on."""
    return _cpu.thread_source() if _cpu is not None else "torch's"


SERVES = "4-bit integers and tables, 8-bit integers"
_MISSING = "the C++ kernels were not built, since there was no compiler when halfbyte was installed"

if asked := os.environ.get("HALFBYTE_ISA"):
    use(asked)

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_NUMBER = {t: i for i, t in enumerate(DTYPES)}  # as csrc/matrix.h counts them
_FEW, _AT_A_TIME = 16, 1 << 24  # rows of x that are multiplied without dequantizing first; values dequantized at a time
_STORED = {**DTYPES, torch.float8_e8m0fnu: "float8_e8m0fnu"}


_threads = torch.get_num_threads


def missing() -> str | None:
    """Why there are no C++ kernels at all, if so."""
    if _cpu is None:
        return _MISSING
    return None if on else "torch's kernels were asked for (HALFBYTE_ISA=reference)"


def absent() -> bool:
    """Whether there are no C++ kernels that could be asked for."""
    return _cpu is None


def span(t: Tensor) -> tuple[int, int]:
    """Address and bytes of a contiguous tensor: what C++ checks sizes against."""
    return t.data_ptr(), t.nbytes


@lru_cache(maxsize=256)
def _table(f: Format) -> list[float]:
    codes = torch.arange(1 << f.bits, dtype=torch.uint8)
    return grid_values(codes, f, torch.zeros(1)).tolist() if f.zero == "integer" else grid_values(codes, f).tolist()


def _group(q: QTensor) -> int:
    return q.format.group if isinstance(q.format.group, int) else q.shape[-1]


def refuses(q: QTensor) -> str | None:
    """Why no C++ product takes q, in words; None if one does."""
    if (why := missing()) is not None:
        return why
    f, codes = q.format, q.parts["codes"]
    if not isinstance(codes, Tensor) or codes.device.type != "cpu":
        return f"the C++ kernels run on the CPU, not on {codes.device.type if isinstance(codes, Tensor) else f}"
    if len(q.shape) != 2 or prod(q.shape) == 0:
        return f"{f.name} of shape {q.shape}: the C++ products take matrices that are not empty"
    if not (isinstance(f.grid, Integers) and f.bits in (4, 8)) and not (isinstance(f.grid, Table) and f.bits == 4):
        return f"{f.name}: the C++ products take integers of 4 or 8 bits and tables of 4"
    if "order" in q.parts:
        return f"{f.name}: the C++ products take inputs in their own order"
    if f.group == "tensor" or f.center:
        return f"{f.name}: the C++ products take scales by group or by row"
    cols, group = q.shape[1], _group(q)
    if cols % group or cols * f.bits % 32 or group * f.bits % 32:
        return f"{f.name} of shape {q.shape}: the C++ products take rows of whole groups of whole 32-bit words"
    return _refuses_part(q, "scale") or _refuses_part(q, "zero")


def _refuses_part(q: QTensor, name: str) -> str | None:
    part = q.parts.get(name)
    if part is None or (isinstance(part, Tensor) and (part.dtype in _STORED or part.dtype == torch.uint8)):
        return None
    if isinstance(part, Tensor):
        return f"{q.format.name}: no C++ product reads a {name} in {part.dtype}"
    scale = part.parts["scale"]
    if (
        not isinstance(scale, Tensor)
        or scale.dtype not in _STORED
        or "zero" in part.parts
        or part.format.bits not in (6, 8)
    ):
        return f"{q.format.name}: no C++ product reads a {name} held as {part.format.name}"
    if part.format.bits == 6 and (part.format.group != 8 or part.shape[-1] % 8):
        return f"{q.format.name} of shape {q.shape}: 6-bit scales are read in eights"
    return None


class Tiled:
    """A QTensor's parts in the tiled layout (csrc/layout.h), and the products with them.

    Making one gives each part new memory, tiled, and lets go of the old: whoever still holds an alias of it keeps the
    canonical bytes. Raises InputError where `refuses` would have said why.
    """

    name = "tiled"

    def __init__(self, q: QTensor) -> None:
        if (why := refuses(q)) is not None:
            raise InputError(f"{why}.")
        self.rows_, self.cols = q.shape
        self.parts = q.leaves()  # the QTensor's own tensors, which stand for new memory from here on
        with torch.inference_mode():  # counts no change: the values are the same
            for t in self.parts.values():
                t.set_(pages.copy(t.detach()))  # pyright: ignore[reportArgumentType]
        self._bind(q, tiled=False)
        self.matrix.tile(False, _threads())

    def _bind(self, q: QTensor, tiled: bool) -> None:
        f = q.format
        self.matrix = _cpu.Matrix(
            rows=self.rows_,
            cols=self.cols,
            bits=f.bits,
            group=_group(q),
            codes=span(self.parts["codes"]),
            table=_table(f),
            middle=float(f.grid.middle) if isinstance(f.grid, Integers) else None,
            scale=_values(q.parts["scale"]),
            zero=_values(q.parts["zero"]) if "zero" in q.parts else None,
            zero_added=f.zero not in (None, "integer"),
            tiled=tiled,
        )
        self._linear = self.matrix.linear
        self._codes, self._where = self.parts["codes"], self.parts["codes"].data_ptr()

    def follow(self, q: QTensor) -> None:
        """Looks where the parts are, should their memory have moved (`share_memory_` does that)."""
        if self._codes.data_ptr() != self._where:
            self._bind(q, tiled=True)

    def restore(self) -> None:
        self.matrix.tile(True, _threads())

    def rows(self, index: Tensor) -> dict[str, Tensor]:
        ids = index.reshape(-1).long().contiguous()
        out = {}
        for k, t in self.parts.items():
            out[k] = torch.empty((len(ids), t.numel() // self.rows_), dtype=t.dtype)
            self.matrix.rows(k, span(ids), span(out[k]))
            out[k] = out[k].reshape(*index.shape, -1)
        return out

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., in) of float32, bfloat16 or float16 on the CPU."""
        if x.shape[-1] != self.cols or (bias is not None and bias.numel() != self.rows_):
            raise self._misfit(x.shape, bias)
        x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], self.rows_))
        b, b_bytes, b_type = 0, 0, 0
        if bias is not None:
            bias = bias.detach().contiguous()
            b, b_bytes, b_type = bias.data_ptr(), bias.nbytes, _NUMBER[bias.dtype]
        rows = x.numel() // self.cols
        if rows > _FEW and not (x.dtype is torch.bfloat16 and self.matrix.multiplies_bfloat16()):
            return self._by_torch(x, y, bias)
        self._linear(
            x.data_ptr(), x.nbytes, _NUMBER[x.dtype], rows, b, b_bytes, b_type, y.data_ptr(), y.nbytes, _threads()
        )  # fmt: skip
        return y

    def _misfit(self, shape: tuple[int, ...], bias: Tensor | None) -> InputError:
        with_bias = "" if bias is None else f" and a bias of shape {tuple(bias.shape)}"
        return InputError(
            f"{tuple(shape)}{with_bias} cannot be multiplied with a weight of shape ({self.rows_}, {self.cols})."
        )

    def _by_torch(self, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
        """torch's product with the dequantized weight, some rows of it at a time."""
        x2, y2 = x.view(-1, self.cols), y.view(-1, self.rows_)
        for row, w in self._dequantized(x.dtype):
            part = None if bias is None else bias[row : row + len(w)].to(x.dtype)
            if len(w) == self.rows_:
                return torch.nn.functional.linear(x2, w, part).view(y.shape)
            y2[:, row : row + len(w)] = torch.nn.functional.linear(x2, w, part)
        return y

    def _dequantized(self, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """First row and values of parts of the matrix, all in one buffer: use one before asking for the next."""
        step = max(16, _AT_A_TIME // self.cols // 16 * 16)
        for row in range(0, self.rows_, step):
            n = min(step, self.rows_ - row)
            w = buffer(n * self.cols, dtype).view(n, self.cols)
            self.matrix.dequantize(row, n, span(w), DTYPES[dtype], _threads())
            yield row, w

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """(out, in) in float32, bfloat16 or float16."""
        w = torch.empty((self.rows_, self.cols), dtype=dtype)
        self.matrix.dequantize(0, self.rows_, span(w), DTYPES[dtype], _threads())
        return w

    def linear_int8(self, x: QTensor, bias: Tensor | None) -> Tensor | None:
        """x (..., in) in symmetric 8-bit integers with a scale a row, or a group of a row; y in its source's dtype.
        None where no kernel multiplies these codes."""
        f, codes, scale = x.format, x.parts["codes"], x.parts["scale"]
        symmetric = isinstance(f.grid, Integers) and f.bits == 8 and f.grid.signed and f.zero is None
        if not symmetric or f.flat or f.group == "tensor" or x.dtype not in DTYPES or not isinstance(scale, Tensor):
            return None
        assert isinstance(codes, Tensor)
        if scale.dtype not in DTYPES:
            return None
        if x.shape[-1] != self.cols or (bias is not None and bias.numel() != self.rows_):
            raise self._misfit(x.shape, bias)
        y = torch.empty((*x.shape[:-1], self.rows_), dtype=x.dtype)
        if bias is not None:
            bias = bias.detach().contiguous()
        done = self.matrix.linear_int8(
            span(codes),
            span(scale),
            DTYPES[scale.dtype],
            _group(x),
            codes.numel() // self.cols,
            None if bias is None else span(bias),
            "float32" if bias is None else DTYPES[bias.dtype],
            span(y),
            DTYPES[y.dtype],
            _threads(),
        )
        return y if done else None

    def linear_grad(self, dy: Tensor) -> Tensor:
        """dy (..., out) of float32, bfloat16 or float16 on the CPU."""
        if dy.shape[-1] != self.rows_:
            raise self._misfit(dy.shape, None)
        dy = dy.contiguous()
        dx = dy.new_empty((*dy.shape[:-1], self.cols))
        dtype = DTYPES[dy.dtype]
        if self.matrix.linear_grad(span(dy), dtype, dy.numel() // self.rows_, span(dx), dtype, _threads()):
            return dx
        dy2, dx2 = dy.view(-1, self.rows_), dx.view(-1, self.cols)
        for row, w in self._dequantized(dy.dtype):
            part = dy2[:, row : row + len(w)]
            torch.mm(part, w, out=dx2) if row == 0 else dx2.addmm_(part, w)
        return dx


_local = threading.local()


def buffer(n: int, dtype: torch.dtype) -> Tensor:
    """n values of memory that this thread's next call uses again: fresh pages would cost more than what fills them."""
    held: dict[torch.dtype, Tensor] = _local.__dict__.setdefault("held", {})
    if dtype not in held or held[dtype].numel() < n:
        held[dtype] = torch.empty(n, dtype=dtype)
    return held[dtype][:n]


def _values(part: Tensor | QTensor) -> Any:
    if isinstance(part, Tensor):
        if part.dtype == torch.uint8:
            return _cpu.Values.bytes(span(part))
        return _cpu.Values.floats(_STORED[part.dtype], span(part))
    f, codes, inner = part.format, part.parts["codes"], part.parts["scale"]
    assert isinstance(codes, Tensor)
    assert isinstance(inner, Tensor)
    group = part.shape[-1] if f.group == "channel" else prod(part.shape) if f.group == "tensor" else f.group
    offset = part.parts.get("offset", torch.zeros(()))
    assert isinstance(offset, Tensor)
    return _cpu.Values.nested(
        f.bits, span(codes), _table(f), _STORED[inner.dtype], span(inner), group, float(offset)
    )  # fmt: skip
