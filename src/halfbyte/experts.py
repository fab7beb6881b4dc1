"""Mixtures of experts whose weights transformers fuses into one parameter: a module each, and what was fused how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Make = Callable[[nn.Parameter, nn.Parameter | None], nn.Module]  # (out, in), (out,) -> a linear layer


@dataclass(frozen=True)
class Fused:
    """How all experts lie in one parameter: (experts, out, in), or (experts, in, out) where they are turned. Gated ones
    have a gate beside the way up, one after the other or, interleaved, in turns."""

    gated: bool = True
    turned: bool = False
    interleaved: bool = False

    @property
    def parameters(self) -> dict[str, tuple[str, ...]]:
        """A fused parameter's name -> the matrices of an expert that it holds, in order."""
        up = {"gate_up_proj": ("gate_proj", "up_proj")} if self.gated else {"up_proj": ("up_proj",)}
        return {**up, "down_proj": ("down_proj",)}

    def split(self, t: Tensor, n: int) -> tuple[Tensor, ...]:
        """What a fused parameter, or the bias beside it, holds of one expert -> its n matrices (out, in), or (out,)."""
        t = t.T if self.turned and t.ndim == 2 else t
        parts = [t[i::n] for i in range(n)] if self.interleaved else t.chunk(n)
        return tuple(p.contiguous() for p in parts)

    def join(self, parts: list[Tensor]) -> Tensor:
        """The inverse of `split`."""
        t = torch.stack(parts, 1).flatten(0, 1) if self.interleaved else torch.cat(parts)
        return t.T if self.turned and t.ndim == 2 else t


def fused(m: nn.Module) -> Fused | None:
    """How a module of transformers' holds experts; None for all others. Known by what its decorator
    (use_experts_implementation) leaves on each: no import, and no class by name."""
    if not all(hasattr(m, a) for a in ("is_transposed", "is_concatenated", "has_gate", "_apply_gate")):
        return None
    found: Any = m
    f = Fused(found.has_gate, found.is_transposed, not found.is_concatenated)
    held = {name for name, _ in m.named_parameters()}
    names = {*f.parameters, *(f"{n}_bias" for n in f.parameters if found.has_bias)}
    return f if held == names and all(getattr(m, n).ndim == 3 for n in f.parameters) else None


class Experts(nn.ModuleList):
    """A list of experts, each with the linear layers gate_proj, up_proj and down_proj: `experts.3.up_proj`.

    Stands for a module of transformers' whose parameters are `fused`. Computes, expert after expert, what that does in
    its eager implementation; of an expert that no token chose nothing is computed.
    """

    def __init__(self, experts: list[nn.Module], fused: Fused, gate: Callable[[Tensor], Tensor]) -> None:
        """gate: what is made of gate and up, concatenated as they are fused (or of up alone): transformers' own."""
        super().__init__(experts)
        self.fused, self.gate = fused, gate

    @classmethod
    def of(cls, m: nn.Module, fused: Fused, make: Make) -> Experts:
        """Takes the parameters out of a module that `fused` knows, and gives each matrix to `make`."""
        found: Any = m
        experts = [nn.Module() for _ in range(getattr(m, next(iter(fused.parameters))).shape[0])]
        for name, matrices in fused.parameters.items():
            p, b = getattr(m, name), getattr(m, f"{name}_bias", None)
            for e, expert in enumerate(experts):
                biases = (None,) * len(matrices) if b is None else fused.split(b[e].detach(), len(matrices))
                for matrix, w, bias in zip(matrices, fused.split(p[e].detach(), len(matrices)), biases, strict=True):
                    setattr(expert, matrix, make(_own(w, p), None if bias is None else _own(bias, p)))
            for gone in (name, f"{name}_bias"):
                m._parameters.pop(gone, None)
        return cls(experts, fused, found._apply_gate if fused.gated else found.act_fn)

    def forward(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """x (tokens, width); chosen (tokens, k), the experts of each, and their shares of the sum: like x."""
        out = torch.zeros_like(x)
        for e in chosen.unique().tolist():
            k, token = torch.where(e == chosen.T)
            y = self._expert(self[e], x[token]) * shares[token, k, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out

    def _expert(self, expert: nn.Module, x: Tensor) -> Tensor:
        found: Any = expert
        if not self.fused.gated:
            return found.down_proj(self.gate(found.up_proj(x)))
        gate, up = found.gate_proj(x), found.up_proj(x)
        both = torch.stack((gate, up), -1).flatten(-2) if self.fused.interleaved else torch.cat((gate, up), -1)
        return found.down_proj(self.gate(both))


def _own(t: Tensor, like: nn.Parameter) -> nn.Parameter:
    """A parameter in memory of its own, so that the fused one can go."""
    return nn.Parameter(t.clone(), like.requires_grad)
