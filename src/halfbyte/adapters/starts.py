"""How A and B of a LoRA begin, by PEFT's names for `init_lora_weights`: a row each in STARTS."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from halfbyte.errors import InputError
from halfbyte.layers import Codes, Weight

Factors = tuple[Tensor, Tensor]  # A (r, in), B (out, r), float32


@dataclass(frozen=True)
class Start:
    """make: of a weight, its rank, s and what was told, gives A and B. moves: B A is not 0, and the adapter adds only
    what it has changed by since. told: what has to be found beforehand, for each weight: the "original" floats
    (out, in) of one that is codes, or the "moments" of its inputs (in, in). most: of a shape (out, in), the largest
    rank."""

    make: Callable[[Weight, int, float, Tensor | None], Factors]
    moves: bool = False
    told: str = ""
    most: Callable[[Sequence[int]], int] | None = None


def start(name: bool | str) -> Start:
    """A row of STARTS, or pissa_niter_N. Raises InputError for another name."""
    if isinstance(name, str) and (niter := re.fullmatch(r"pissa_niter_(\d{1,3})", name)):
        return Start(partial(_pissa, niter=int(niter[1])), moves=True, most=min)
    if name is not True and (not isinstance(name, str) or name not in STARTS):
        named = ", ".join(n for n in STARTS if isinstance(n, str))
        raise InputError(f"--init-lora-weights {name}: it is true, {named} or pissa_niter_N.")
    return STARTS[name]


def check(name: bool | str, r: int, shape: Sequence[int] | None = None) -> None:
    """Raises InputError for a start that there is not, or that cannot have this rank, of a weight (out, in)."""
    most = start(name).most
    if name == "orthogonal" and r % 2:
        raise InputError(
            f"--init-lora-weights orthogonal: it halves the rank, which {r} is too odd for: give an even r."
        )
    if shape is not None and most is not None and r > most(shape):
        raise InputError(
            f"--init-lora-weights {name}: --r {r} is more than the {most(shape)} directions of a layer of "
            f"{shape[1]} inputs and {shape[0]} outputs."
        )


def _nothing(weight: Weight, r: int) -> Factors:
    out_features, in_features = weight.shape
    a = torch.empty(r, in_features, device=weight.device, dtype=torch.float32)
    return a, torch.zeros(out_features, r, device=weight.device, dtype=torch.float32)


def _kaiming(weight: Weight, r: int, s: float, told: Tensor | None) -> Factors:
    """A uniform within 1/sqrt(in), B zero (arXiv:2106.09685)."""
    a, b = _nothing(weight, r)
    return nn.init.kaiming_uniform_(a, a=math.sqrt(5)), b


def _looked_up(weight: Weight, r: int, s: float, told: Tensor | None) -> Factors:
    """Of an embedding, whose weight's rows are tokens: A normal, B zero, as PEFT has it whatever else begins how."""
    a, b = _nothing(weight, r)
    return nn.init.normal_(a), b


def _gaussian(weight: Weight, r: int, s: float, told: Tensor | None) -> Factors:
    """A normal with the deviation 1/r, B zero."""
    a, b = _nothing(weight, r)
    return nn.init.normal_(a, std=1 / r), b


def _orthogonal(weight: Weight, r: int, s: float, told: Tensor | None) -> Factors:
    """Both random, in halves of one orthonormal basis of r, so that B A is 0 but for rounding."""
    out_features, in_features = weight.shape
    q, _ = torch.linalg.qr(torch.randn(r, r, dtype=torch.float64))
    a = (torch.randn(in_features, r // 2).double() @ q[0::2]).T / 10
    b = torch.randn(r // 2, out_features).double().T @ q[1::2] / 10
    return _as(a, weight), _as(b, weight)


def _pissa(weight: Weight, r: int, s: float, told: Tensor | None, niter: int | None = None) -> Factors:
    """The r largest singular values of W and their vectors, sqrt on either side: B A s is the principal part of W
    (arXiv:2404.02948, equations 2 and 3). niter: by Halko's randomized SVD with so many iterations."""
    w = _value(weight)
    if niter is None:
        return _halves(torch.linalg.svd(w, full_matrices=False), r, s)
    u, sigma, v = torch.svd_lowrank(w, r, niter)
    return _halves((u, sigma, v.T), r, s)


def _olora(weight: Weight, r: int, s: float, told: Tensor | None) -> Factors:
    """W = Q R: B is the first r columns of Q, A the first r rows of R (arXiv:2406.01775, section 3)."""
    q, upper = torch.linalg.qr(_value(weight))
    return upper[:r].contiguous(), q[:, :r].contiguous()


def _loftq(weight: Weight, r: int, s: float, told: Tensor | None) -> Factors:
    """What is nearest to W - Q(W) in Frobenius' norm: its r largest singular values and their vectors
    (arXiv:2310.08659, equation 6, one step: Q is as it was)."""
    if told is None or not isinstance(weight.stored, Codes):
        raise InputError(
            "--init-lora-weights loftq makes good what quantizing lost, and this weight is a float: use --method qlora."
        )
    w = _value(weight)
    return _halves(torch.linalg.svd(told.to(w) - w, full_matrices=False), r, s)


def _eva(weight: Weight, r: int, s: float, told: Tensor | None) -> Factors:
    """A: the r right singular vectors of the inputs that have the largest singular values, which are the eigenvectors
    of x^T x; B zero (arXiv:2410.07170, section 3.2)."""
    if told is None:
        raise InputError("--init-lora-weights eva is found on text, and there is none.")
    _, b = _nothing(weight, r)
    _, vectors = torch.linalg.eigh(told.double())
    return _as(vectors[:, -r:].flip(1).T, weight), b


def _halves(svd: tuple[Tensor, Tensor, Tensor], r: int, s: float) -> Factors:
    """A and B with s B A = U S V^T, of the r largest singular values."""
    u, sigma, vh = svd
    root = (sigma[:r] / s).sqrt()
    return (root[:, None] * vh[:r]).contiguous(), (u[:, :r] * root).contiguous()


def _value(weight: Weight) -> Tensor:
    """What is stored, float32 (out, in)."""
    return weight.base().detach().float()


def _as(t: Tensor, weight: Weight) -> Tensor:
    return t.float().contiguous().to(weight.device)


EMBEDDING = Start(_looked_up)
STARTS: dict[bool | str, Start] = {
    True: Start(_kaiming),
    "gaussian": Start(_gaussian),
    "orthogonal": Start(_orthogonal),
    "pissa": Start(_pissa, moves=True, most=min),
    "olora": Start(_olora, moves=True, most=min),
    "loftq": Start(_loftq, told="original", most=min),
    "eva": Start(_eva, told="moments", most=lambda shape: shape[1]),
}
