"""What is where in a model: its blocks, what each matrix is for, what is tied."""

from __future__ import annotations

import re

from torch import nn

from halfbyte.layers import Conv, Embedding, Experts, ops

Blocks = list[tuple[str, nn.Module]]

_HEAD = r"(^|\.)(lm_head|embed_out|classifier|score|pooler\.dense)(\.|$)"
_ROUTER = r"(^|\.)(gate|router|shared_expert_gate)$"
# parameters of their own, which are added to what a model is fed: ViT's class token, learned positions
_POSITION = r"(^|\.)\w*(position|pos_embed|token)\w*$"


def stacks(model: nn.Module) -> list[Blocks]:
    """Every list of repeated blocks, by name, in the order in which they run: an encoder's, then a decoder's. Lists
    inside of a block, such as its experts, are part of it."""
    out: list[Blocks] = []
    inside: set[str] = set()
    for name, m in model.named_modules():
        if not isinstance(m, nn.ModuleList) or len({type(c) for c in m}) != 1 or _within(name, inside):
            continue
        inside.add(name)
        out.append([(f"{name}.{i}", child) for i, child in enumerate(m)])
    # modules stand as they are defined, which is not always as they run
    return sorted(out, key=lambda blocks: "decoder" in blocks[0][0].split("."))


def _within(name: str, roots: set[str]) -> bool:
    return any(name.startswith(f"{root}.") for root in roots)


def blocks(model: nn.Module) -> Blocks:
    """The model's repeated blocks, in order, by name: the largest of its `stacks`."""
    return max(stacks(model), key=lambda s: sum(p.numel() for _, m in s for p in m.parameters()), default=[])


def roles(model: nn.Module) -> dict[str, str]:
    """Every op's name -> its role (scheme.ROLES). A tied head is a head and an embedding: the embedding rules."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    embeddings = {id(op.weight) for _, op in ops(model) if isinstance(op, Embedding)}
    experts = {n for n, m in model.named_modules() if isinstance(m, Experts)}
    out = {}
    for name, op in ops(model):
        if id(op.weight) in embeddings:
            out[name] = "embedding"
        elif isinstance(op, Conv):
            out[name] = "convolution"
        elif op is head or re.search(_HEAD, name):
            out[name] = "head"
        elif re.search(_ROUTER, name):
            out[name] = "router"
        elif name.rsplit(".", 2)[0] in experts:
            out[name] = "expert"
        else:
            out[name] = "conv1d" if op.transposed else "linear"
    return out


def role_of_parameter(model: nn.Module, name: str) -> str:
    """What a parameter is for that no op stands for: "embedding", "router", "position" or "other"."""
    owner = name.rpartition(".")[0]
    if isinstance(model.get_submodule(owner), nn.Embedding):
        return "embedding"  # of a class of its own, such as OPT's positions: looked up all the same
    if re.search(_ROUTER, owner):
        return "router"
    return "position" if re.search(_POSITION, name) else "other"


def tied(model: nn.Module) -> dict[str, str]:
    """Op's name -> the name of the op whose weight it shares, for all but the first."""
    first: dict[int, str] = {}
    return {n: first[id(o.weight)] for n, o in ops(model) if first.setdefault(id(o.weight), n) != n}
