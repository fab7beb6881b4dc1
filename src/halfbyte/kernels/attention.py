"""Attention in bfloat16 by pieces of tokens: a few products of matrices each, several times faster than torch's own
kernel on CPUs without AMX, and in memory that grows with the tokens, not with their square."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

ROWS = 64  # tokens of a piece: its scores stay in a cache


class InPieces(TorchFunctionMode):
    """Inside, `attention` stands for torch's scaled_dot_product_attention."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (attention if func is scaled_dot_product_attention else func)(*args, **kwargs or {})


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """See torch.nn.functional.scaled_dot_product_attention, which serves what is not served here: dropout, masks that
    are learned, other shapes than query (batch, heads, tokens, d), key and value (batch, heads or fewer, tokens, d).

    bfloat16 of query's shape; sums are kept in float32, scores in bfloat16, as in the attention that models in bfloat16
    spell out. A token that sees none, as padding before a text may be, gets some mean of value instead of 0."""
    q, k, v = query, key, value
    odd = attn_mask is not None and (attn_mask.requires_grad or is_causal)
    if dropout_p or odd or not _fit(q, k, v, is_causal, enable_gqa):
        how = {"scale": scale, "enable_gqa": enable_gqa}
        return scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, **how)
    shared = k.shape[1]  # heads that share a k and v are rows of one product
    q = (q * (q.shape[-1] ** -0.5 if scale is None else scale)).bfloat16().unflatten(1, (shared, -1))
    if attn_mask is not None:
        mask = attn_mask.expand(*(1,) * (4 - attn_mask.dim()), *attn_mask.shape[:-2], q.shape[3], k.shape[2])
        attn_mask = mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, (shared, -1))
    y = _Attention.apply(q, k.bfloat16(), v.bfloat16(), attn_mask, is_causal)
    return y.flatten(1, 2)  # pyright: ignore[reportAttributeAccessIssue]


def _fit(q: Tensor, k: Tensor, v: Tensor, causal: bool, shared: bool) -> bool:
    if not (q.is_cpu and q.dim() == k.dim() == v.dim() == 4 and k.shape[:3] == v.shape[:3] and len(q) == len(k)):
        return False
    alike = q.shape[1] % k.shape[1] == 0 if shared else q.shape[1] == k.shape[1]
    return alike and not (causal and q.shape[2] != k.shape[2])


class _Attention(torch.autograd.Function):
    """q (batch, shared, heads, tokens, d), k and v (batch, shared, tokens, d), bfloat16; mask (batch or 1, shared or 1,
    heads or 1, tokens, seen). What tokens see of each other is not kept, but computed again for the gradient."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        ctx.causal = causal
        y = q.new_empty(*q.shape[:-1], v.shape[-1])
        for at, seen, shares in _pieces(q, k, mask, causal):
            y[..., at, :] = (shares @ v[:, :, seen]).unflatten(2, (q.shape[2], -1))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), *(torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
        for at, seen, shares in _pieces(q, k, mask, ctx.causal):
            part, dy = q[..., at, :].flatten(2, 3), grad[..., at, :].flatten(2, 3)
            dv[:, :, seen] += shares.transpose(-1, -2) @ dy
            dshares = dy @ v[:, :, seen].transpose(-1, -2)
            dscores = torch._softmax_backward_data(dshares, shares, -1, shares.dtype)
            dq[..., at, :] = (dscores @ k[:, :, seen]).unflatten(2, (q.shape[2], -1))
            dk[:, :, seen] += dscores.transpose(-1, -2) @ part
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None


def _pieces(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> Iterator[tuple[slice, slice, Tensor]]:
    """Of a piece: where its tokens are; those that they see; in which shares, (batch, shared, heads * tokens, seen)."""
    heads, tokens = q.shape[2:4]
    hidden = torch.ones(ROWS, ROWS, dtype=torch.bool).triu_(1)
    lowest = torch.finfo(q.dtype).min
    for i in range(0, tokens, ROWS):
        at = slice(i, min(i + ROWS, tokens))
        seen = slice(0, at.stop if causal else k.shape[2])
        scores = q[..., at, :].flatten(2, 3) @ k[:, :, seen].transpose(-1, -2)
        by_head = scores.unflatten(2, (heads, -1))
        if causal:
            by_head[..., i:].masked_fill_(hidden[: at.stop - i, : at.stop - i], lowest)
        if mask is not None:
            part = mask[..., at, seen]
            if mask.dtype == torch.bool:
                by_head.masked_fill_(~part, lowest)
            else:
                by_head.add_(part).clamp_(min=lowest)
        yield at, seen, scores.softmax(-1)
