"""What is where in a model: its blocks, what each matrix is for, what is tied."""

from __future__ import annotations

import re

from torch import nn

from halfbyte.layers import Linear, ops


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The model's repeated blocks, in order, by name: the longest ModuleList of one class."""
    lists = [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, nn.ModuleList) and len({type(c) for c in m}) == 1
    ]
    if not lists:
        return []
    name, longest = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return [(f"{name}.{i}", m) for i, m in enumerate(longest)]


def roles(model: nn.Module) -> dict[str, str]:
    """Every op's name -> its role (scheme.ROLES). A tied head is a head and an embedding: the embedding rules."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    embeddings = {id(op.weight) for _, op in ops(model) if not isinstance(op, Linear)}
    out = {}
    for name, op in ops(model):
        if id(op.weight) in embeddings:
            out[name] = "embedding"
        elif op is head or re.search(r"(^|\.)(lm_head|embed_out|classifier|score|pooler\.dense)(\.|$)", name):
            out[name] = "head"
        elif re.search(r"(^|\.)(gate|router|shared_expert_gate)$", name):
            out[name] = "router"
        else:
            out[name] = "conv1d" if op.transposed else "linear"
    return out


def tied(model: nn.Module) -> dict[str, str]:
    """Op's name -> the name of the op whose weight it shares, for all but the first."""
    first: dict[int, str] = {}
    return {n: first[id(o.weight)] for n, o in ops(model) if first.setdefault(id(o.weight), n) != n}
