"""A weight: value = grid(stored + adapters). What is stored is floats, or codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte import kernels
from halfbyte.errors import InputError
from halfbyte.formats import Format
from halfbyte.kernels import proxy
from halfbyte.qtensor import QParams, QTensor, added, shifted, spread, unshiftable, zero_dtype


def moved(t: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """t where `fn`, which nn.Module gives to _apply, would put it; in its own dtype."""
    device = fn(t.new_empty(0)).device
    return torch.empty_like(t, device=device) if t.is_meta else t.to(device)


def learnable(f: Format) -> bool:
    """Whether scales are numbers that can be trained, and not codes themselves."""
    return not isinstance(f.scale, Format)


def check_learnable(f: Format) -> None:
    """Raises InputError where no scale can be learned."""
    if not learnable(f):
        raise InputError(f"{f}: its scales are quantized themselves and cannot be trained.")


class Codes(nn.Module):
    """A QTensor held by a module: parts are buffers that move with the model and keep their dtype.

    With `learn`, the scale, and a zero that is a float, are float32 Parameters; what is used and saved is their
    rounding to the dtypes they had, so that the file is what was trained. Raises InputError where the scales are
    themselves quantized.
    """

    def __init__(self, q: QTensor, learn: bool = False) -> None:
        super().__init__()
        tensors = q.tensors()
        self._names = {name: name.replace(".", "_") for name in tensors}
        self._dtypes: dict[str, torch.dtype] = {}  # of what is learned
        for name, part in tensors.items():
            self.register_buffer(self._names[name], part.detach())
        if learn:
            check_learnable(q.format)
            for name in ("scale", "zero"):
                part = tensors.get(name)
                if part is not None and part.is_floating_point():
                    self._dtypes[name] = part.dtype
                    del self._buffers[name]
                    self.register_parameter(name, nn.Parameter(part.float()))
        self._q = q.with_tensors(tensors)
        self._held: tuple[tuple[str, Tensor], ...] = ()

    @property
    def learned(self) -> bool:
        return bool(self._dtypes)

    @property
    def q(self) -> QTensor:
        """The QTensor around the module's present tensors: the same one as long as they are, so that a kernel may
        lay it out; differentiable in what is learned."""
        buffers = self._buffers
        if self._held and all(buffers.get(name) is t for name, t in self._held):
            return self._q
        tensors = {name: getattr(self, attribute) for name, attribute in self._names.items()}
        if self.learned:
            tensors |= {name: tensors[name].to(dtype) for name, dtype in self._dtypes.items()}
            return self._q.with_tensors(tensors)
        self._q = self._q.with_tensors(tensors)
        self._held = tuple((self._names[name], t) for name, t in tensors.items())
        return self._q

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Codes:
        """Follows `.to(device)`; a cast (`.half()`, `.to(dtype)`) leaves the parts as they are."""
        self._q.canonical()
        return super()._apply(lambda t: moved(t, fn), recurse)  # pyright: ignore[reportReturnType]

    # What is copied, saved or read is in the canonical layout.

    def __getstate__(self) -> dict[str, Any]:
        self._q.canonical()
        return {**self.__dict__, "_held": ()}

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._q.canonical()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._q.canonical()
        super()._load_from_state_dict(*args, **kwargs)


_RANGES = ("minmax", "absmax", "restricted")  # searches that find scales in which nothing is clipped on purpose


def _range(f: Format) -> str:
    """A format's own search where it is a range, else min/max."""
    return f.search if f.search in _RANGES else "minmax"


class Grid(nn.Module):
    """The format that a weight is seen through, with its scales: found anew from the weight, learned, or held.

    how: a search of halfbyte.kernels (the range by default: cheap enough for every step). learned: a QParams to
    start from; scale (and a zero point, where the format has one) are then float32 Parameters, and their
    gradient is LSQ's, times 1/sqrt(n * 2^(b-1)) with n weights a scale (arXiv:1902.08153, section 2.2). held: codes
    whose scales stay what they are, for formats whose scales are codes themselves. asleep: whether training does not
    see through it yet.
    """

    def __init__(
        self, format: Format, how: str | None = None, learned: QParams | None = None, held: QTensor | None = None
    ) -> None:  # fmt: skip
        super().__init__()
        self.format, self.how, self.asleep = format, how or _range(format), False
        self.scale = nn.Parameter(learned.scale.float().clone()) if learned else None
        self.zero = nn.Parameter(learned.zero.float().clone()) if learned and learned.zero is not None else None
        self.held = None if held is None else Codes(_apart(held))

    @property
    def spans(self) -> bool:
        """Whether its scales are found from the range of the weight, of which nothing is then clipped on purpose."""
        return self.scale is None and self.held is None and self.how in _RANGES

    def qparams(self, w: Tensor) -> QParams:
        """The QParams for w: the one place that training, freezing and export ask."""
        if self.held is not None:
            return self.held.q.qparams
        if self.scale is None:
            return kernels.qparams(w.detach(), self.format, self.how)
        damp = (w.numel() / self.scale.numel() * 2 ** (self.format.bits - 1)) ** -0.5
        return QParams(_damped(self.scale, damp), None if self.zero is None else _damped(self.zero, damp))

    def forward(self, w: Tensor) -> Tensor:
        return kernels.fake(w, self.format if self.held is None else plain(self.format), self.qparams(w))

    def quantize(self, w: Tensor) -> QTensor:
        if self.held is None:
            return kernels.quantize(w, self.format, self.qparams(w))
        codes = kernels.quantize(w, plain(self.format), self.qparams(w)).codes
        return replace(_apart(proxy.with_codes(self.held.q, codes)), dtype=w.dtype)


def _apart(q: QTensor) -> QTensor:
    """q with parts of its own: a kernel may lay out their bytes in another order, scales' too."""
    return q.with_tensors({name: part.clone() for name, part in q.tensors().items()})


def plain(f: Format) -> Format:
    """The same codes, with scales, and zeros that are added, as they are once stored: float32."""
    return replace(f, scale="float32", zero="float32" if isinstance(f.zero, Format) else f.zero)


class _Damp(torch.autograd.Function):
    """The value unchanged, its gradient times a number."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return p.view_as(p)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def _damped(p: Tensor, factor: float) -> Tensor:
    return _Damp.apply(p, factor)  # pyright: ignore[reportReturnType]


def sees_op(adapter: nn.Module) -> bool:
    """Whether an adapter's forward is given the op: what it adds depends on what is stored, or on what zero points can
    hold of it."""
    return needs_base(adapter) or hasattr(adapter, "shift")


def needs_base(adapter: nn.Module) -> bool:
    """Whether what an adapter adds depends on what is stored, which it is then given."""
    return getattr(adapter, "needs_base", False)


class Weight(nn.Module):
    """What an op multiplies with. Two ops may share one: that is tying.

    stored: a float Parameter (..., out, in), or Codes. adapters: those in use, by name: each has forward(x, y), delta()
    or with `needs_base` forward(x, y, op), delta(base); with shift() it adds one number to groups, and has forward(x,
    y, op) too. waiting: adapters that add nothing now. grid: a Grid, or None.
    """

    stored: nn.Parameter | Codes
    grid: Grid | None

    def __init__(self, stored: nn.Parameter | Codes) -> None:
        super().__init__()
        self.stored = stored
        self.adapters, self.waiting = nn.ModuleDict(), nn.ModuleDict()
        self.grid = None
        self._seen: tuple[object, object, QTensor] | None = None
        self._zeros: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.stored.q.shape) if isinstance(self.stored, Codes) else self.stored.shape

    @property
    def dtype(self) -> torch.dtype:
        """That of the value: codes count as the dtype of their source."""
        return self.stored.q.dtype if isinstance(self.stored, Codes) else self.stored.dtype

    @property
    def device(self) -> torch.device:
        return (
            next(iter([*self.stored.parameters(), *self.stored.buffers()])).device
            if isinstance(self.stored, Codes)
            else self.stored.device
        )

    @property
    def format(self) -> Format | None:
        """The format that the value ships in: the grid's, else that of the codes, if any."""
        if self.grid is not None:
            return self.grid.format
        return self.stored.q.format if isinstance(self.stored, Codes) and not self.adapters else None

    def store(self, value: Tensor | QTensor | Codes, learn: bool = False) -> None:
        """Puts in a float tensor (as a frozen Parameter) or codes in place of what was stored."""
        held = Codes(value, learn) if isinstance(value, QTensor) else value
        new = held if isinstance(held, Codes) else nn.Parameter(held, requires_grad=False)
        self._seen = self._zeros = None
        del self.stored  # a Parameter and a module of one name would both stay registered
        self.stored = new

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Weight:
        self._seen = self._zeros = None  # a cast changes tensors without counting it
        return super()._apply(fn, recurse)  # pyright: ignore[reportReturnType]

    def use(self, name: str | None) -> None:
        """Has the adapter of that name, if it has one, in use alone; None: no adapter."""
        self._seen = None
        self.waiting.update({n: self.adapters.pop(n) for n in list(self.adapters) if n != name})
        if name is not None and name in self.waiting:
            self.adapters[name] = self.waiting.pop(name)

    def base(self) -> Tensor:
        """stored as a float tensor; differentiable where it is trained."""
        if not isinstance(self.stored, Codes):
            return self.stored
        return kernels.dequantize(self.stored.q)

    def sum(self) -> Tensor:
        """stored + adapters, added in float32 and rounded once to the weight's dtype."""
        return self._total().to(self.dtype) if self.adapters else self.base()

    def _total(self) -> Tensor:
        """stored + adapters, float32."""
        w = self.base()
        total = w.float()
        for adapter in self.adapters.values():
            of = (w,) if needs_base(adapter) else ()
            total = total + adapter.delta(*of).float()  # pyright: ignore[reportCallIssue]
        return total

    @property
    def asleep(self) -> bool:
        """Whether its grid is not seen through in this forward: while training warms up without it."""
        return self.training and self.grid is not None and self.grid.asleep

    @property
    def factored(self) -> bool:
        """Whether low-rank factors are all that is trained, behind a grid that spans the whole weight: the gradient
        then goes straight through to them, dB = s dY^T (X A^T) and dA = s (dY B)^T X, and that of the whole matrix is
        not needed."""
        grid, floats = self.grid, isinstance(self.stored, Tensor) and self.stored.requires_grad
        if grid is None or not grid.spans or self.asleep or floats:
            return False
        return bool(self.adapters) and not any(map(needs_base, self.adapters.values()))

    def value(self) -> Tensor:
        """grid(stored + adapters), in the weight's dtype."""
        return self.sum() if self.grid is None or self.asleep else self.grid(self.sum())

    def frozen(self) -> QTensor:
        """The value as codes: those stored, or what the grid makes of the sum. Quantized once and kept until a
        tensor that it came from changes. Raises InputError if the weight has neither."""
        if self.grid is None:
            if isinstance(self.stored, Codes) and not self.adapters:
                return self.stored.q
            raise InputError("this weight is a float: it has no codes.")
        sources = [*self.parameters(), *self.buffers()]
        if any(t.is_inference() for t in sources):  # these do not count their changes
            return self.grid.quantize(self.sum())
        state = (id(self.grid), self.grid.how, *((id(t), t._version, t.data_ptr()) for t in sources))
        if self._seen is None or self._seen[0] != state:
            with torch.no_grad():
                # the sources are held so that nothing else can take their ids
                self._seen = (state, (self.grid, sources), self.grid.quantize(self.sum()))
        return self._seen[2]

    @torch.no_grad()
    def merge(self) -> Tensor:
        """Folds the adapters in, if there are any: into the zero points of codes, where they add one number to all of
        a group; else into a float weight, dequantized where it was codes. The grid stays.

        Gives back how far the weights, or all of a group, then are from the sum in float32, which rounding to the dtype
        of what is stored costs: float32, (out, in) or (out, groups)."""
        if not self.adapters:
            return torch.zeros(())
        by = None if self.grid is not None else self._shift()  # a grid sees the sum, which zero points would round
        if by is None:
            total = self._total()
            self.store(total.to(self.dtype).clone())
            off = (self.base().float() - total).abs()
        else:
            assert isinstance(self.stored, Codes)
            q = self.stored.q
            self.store(shifted(q, by))
            off = (added(self.stored.q) - (added(q) + by)).abs()
        self.adapters.clear()
        return off

    def _shift(self) -> Tensor | None:
        """What the adapters add to the groups of stored codes, float32 (out, groups); None where zero points cannot
        take it in."""
        if not isinstance(self.stored, Codes) or unshiftable(self.stored.q) is not None:
            return None
        shifts: list[Tensor] = [a.shift() for a in self.adapters.values() if hasattr(a, "shift")]  # pyright: ignore
        groups = self.stored.q.format.groups(self.stored.q.shape)[-1]
        if len(shifts) < len(self.adapters) or any(groups % s.shape[1] for s in shifts):
            return None
        return torch.stack([spread(s, self.stored.q) for s in shifts]).sum(0)

    @torch.no_grad()
    def taken_in(self, by: Tensor) -> Tensor | None:
        """What the zero points of the stored codes would hold of a number that is added to all of a group, once it is
        merged: float32 (out, groups of the codes). None where they take none in, or not this one alone. by: float32
        (out, n), see `shifted`."""
        if self.grid is not None or len(self.adapters) > 1 or not isinstance(self.stored, Codes):
            return None
        q = self.stored.q
        if unshiftable(q) is not None or q.format.groups(q.shape)[-1] % by.shape[-1]:
            return None
        if self._zeros is None:  # once: to read them takes back how the kernels laid out the codes
            exact = torch.float32 if q.format.zero == "integer" else zero_dtype(q)
            self._zeros = added(q).to(exact, copy=True)
        zeros = self._zeros.float()
        return (zeros + spread(by, q)).to(zero_dtype(q)).float() - zeros

    @torch.no_grad()
    def dequantize(self) -> None:
        """Makes floats of stored codes."""
        if isinstance(self.stored, Codes):
            self.store(self.base().detach())

    @torch.no_grad()
    def see_through(self, q: QTensor, w: Tensor) -> None:
        """Stores floats that q's scales round to its codes, near w (out, in), and sees them through a grid that learns
        these scales, or holds them where they are codes themselves: the value is what q stands for.

        A solver rounds many weights away from w. The nearest that has such a code lies on the border of its cell, where
        the first step of any size would undo what was solved: what lies beyond is mirrored at the border, to the code's
        value at most. So a step takes weights out of their cells in proportion to its size."""
        near = proxy.mirrored(w, q).to(w.dtype)  # which may round it out of its cell
        grid = Grid(q.format, learned=q.qparams) if learnable(q.format) else Grid(q.format, held=q)
        same = grid.quantize(near).codes.reshape(w.shape) == q.codes.reshape(w.shape)
        self.store(torch.where(same, near, q.dequantize().to(w.dtype)))
        self.grid = grid

    @torch.no_grad()
    def freeze(self, q: QTensor | None = None) -> None:
        """Makes codes of the value: q, or what the weight's own grid gives. Grid and adapters are gone after."""
        self.store(q if q is not None else self.frozen())
        self.grid, self._seen = None, None
        self.adapters.clear()

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, {self.format or self.dtype}"
