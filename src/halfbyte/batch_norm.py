"""Batch norms folded into the convolution or linear layer before them: the same function, and one rounding less."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from halfbyte.errors import InputError, reason
from halfbyte.layers import Codes, Conv, Linear, ops, swap

_NORMS: dict[type[nn.Module], int] = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}


@torch.no_grad()
def fold_batch_norms(m: nn.Module, pairs: Mapping[str, str] | None = None, keep: Collection[str] = ()) -> nn.Module:
    """Folds every batch norm of any module into what it follows, in place. With the running statistics mu, var, and
    the norm's own gamma, beta, eps (arXiv:1712.05877, section 3.2, equation 14),

        gamma (W x + b - mu) / sqrt(var + eps) + beta  =  (g W) x + g (b - mu) + beta,    g = gamma / sqrt(var + eps)

    computed in float64 and rounded once to the weight's dtype. In eval the outputs are the same up to that; in training
    the statistics stand still from here on. Layers become ops (see halfbyte.layers), norms nn.Identity.

    pairs: batch norm's name -> name of the layer before it. Left out, they are found by tracing the module (torch.fx):
    a layer whose output goes into one batch norm and nowhere else. A linear layer's inputs are taken to be (n, in), as
    BatchNorm1d counts features. keep: names of batch norms that stay. Gives back the module. Raises InputError, before
    anything is folded, for a batch norm that cannot be and is not kept, and for a module that cannot be traced.
    """
    norms = {n: b for n, b in m.named_modules() if isinstance(b, _BatchNorm)}
    if wrong := [n for n in (*keep, *(pairs or ())) if n not in norms]:
        raise InputError(f"{wrong[0]!r} is no batch norm of this module; those are {', '.join(norms) or 'none'}.")
    m = swap(m)
    found = _traced(m) if norms and pairs is None else dict(pairs or {})
    named: dict[str, Any] = dict(ops(m))
    folded = {n: b for n, b in norms.items() if n not in keep}
    for name, norm in folded.items():
        if (why := _refuses(norm, found.get(name), named)) is not None:
            raise InputError(f"{name} cannot be folded: {why}; name it in `keep` to leave it as it is.")
    if len({found[name] for name in folded}) < len(folded):
        raise InputError("`pairs` gives two batch norms to one layer, and one of them follows the other.")
    for name, norm in folded.items():
        _fold(named[found[name]], norm)
    gone = {id(norm) for norm in folded.values()}
    for name, norm in list(m.named_modules(remove_duplicate=False)):  # a norm may have several names
        if id(norm) in gone:
            m.set_submodule(name, nn.Identity())
    return m


def _refuses(norm: _BatchNorm, before: str | None, named: Mapping[str, Any]) -> str | None:
    """Why a batch norm cannot be folded into the op of the name `before`, in words; None where it can."""
    op = None if before is None else named.get(before)
    if not isinstance(op, Conv | Linear):
        return (
            "it does not follow, alone, the output of a convolution or linear layer that is called once, and that "
            "halfbyte.layers.OPS knows by its class"
        )
    if type(norm) not in _NORMS or _NORMS[type(norm)] != (len(op.kernel) - 1 if isinstance(op, Conv) else 1):
        return f"{type(norm).__name__} does not norm the channels of {before} ({type(op).__name__})"
    if norm.running_mean is None:
        return "it keeps no running statistics"
    if norm.num_features != op.weight.shape[0]:
        return f"it has {norm.num_features} channels, {before} {op.weight.shape[0]}"
    if sum(other.weight is op.weight for other in named.values()) > 1:
        return f"{before} shares its weight with another layer"
    w = op.weight
    if isinstance(w.stored, Codes) or w.adapters or w.grid is not None:
        return f"the weight of {before} is no plain float: fold before quantizing"
    return None


def _fold(op: Conv | Linear, norm: _BatchNorm) -> None:
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None
    assert var is not None
    g = (var.double() + norm.eps).rsqrt()
    if norm.affine:
        g = g * norm.weight.double()
    shift = -g * mean.double() if op.bias is None else g * (op.bias.double() - mean.double())
    if norm.affine:
        shift = shift + norm.bias.double()
    stored = op.weight.stored
    assert isinstance(stored, Tensor)
    op.weight.stored = nn.Parameter((stored.double() * g[:, None]).to(stored.dtype), stored.requires_grad)
    op.bias = nn.Parameter(shift.to(stored.dtype), stored.requires_grad)


class _Tracer(fx.Tracer):
    """Sees ops and batch norms as single steps, and through everything else that a module defines itself."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Conv | Linear | _BatchNorm) or super().is_leaf_module(m, module_qualified_name)


def _traced(m: nn.Module) -> dict[str, str]:
    """Batch norm's name -> the name of the op that it alone follows, for those that are called once."""
    try:
        graph = _Tracer().trace(m)
    except Exception as e:  # whatever the module's own code says to a stand-in for a tensor
        raise InputError(
            f"this module cannot be traced to find what its batch norms follow; give `pairs`, batch norm's name to "
            f"layer's name: {reason(e)}"
        ) from None
    calls = [node for node in graph.nodes if node.op == "call_module"]
    times = Counter(str(node.target) for node in calls)
    out = {}
    for node in calls:
        name, before = str(node.target), node.args[0] if node.args else None
        if isinstance(before, fx.Node) and before.op == "call_module" and len(before.users) == 1:
            layer = str(before.target)
            if times[name] == times[layer] == 1:
                out[name] = layer
    return out
