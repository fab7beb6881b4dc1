"""Products of floats in bfloat16, where the machine has them and they cost less than the codes around them do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache

import torch

from halfbyte.formats import Format
from halfbyte.kernels.attention import InPieces

MOST_BITS = 4  # bfloat16 keeps 8 bits of a number: products are then far nearer than the weights that are looked for


@lru_cache(maxsize=1)
def fast() -> bool:
    """Whether this CPU multiplies bfloat16 itself; where torch must imitate it, float32 is faster."""
    told = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # no public name in torch 2.13
    return any(getattr(torch.cpu, name, bool)() for name in told)


def few_bits(formats: Iterable[Format], of: torch.dtype) -> bool:
    """Whether products in bfloat16 are near enough to look for weights in these formats, and faster. of: the model's
    own dtype; beside float16 they cannot be, since norms take weights and inputs in one dtype."""
    return fast() and of != torch.float16 and max((f.bits for f in formats), default=16) <= MOST_BITS


@contextmanager
def half_layers(device: str, cache_enabled: bool = True) -> Iterator[None]:
    """Inside, layers and attention multiply in bfloat16: torch.autocast, and what is faster on this CPU."""
    pieces = InPieces() if device == "cpu" and fast() else nullcontext()
    with torch.autocast(device, torch.bfloat16, cache_enabled=cache_enabled), pieces:
        yield


@contextmanager
def half_products(on: bool) -> Iterator[None]:
    """Inside, torch multiplies floats in bfloat16, if `on`: what layers multiply, and sums over tokens in float32."""
    if not on:
        yield
        return
    matmul = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]  # set when torch is imported
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "bf16"  # of products in place, which autocast leaves as they are
        with half_layers("cpu", cache_enabled=False):  # weights change all the time
            yield
    finally:
        matmul.fp32_precision = before
