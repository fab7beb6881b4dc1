"""Products of floats in bfloat16, where the machine has them and they cost less than the codes around them do."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch

from halfbyte.formats import Format

MOST_BITS = 4  # bfloat16 keeps 8 bits of a number: products are then far nearer than the weights that are looked for


@lru_cache(maxsize=1)
def fast() -> bool:
    """Whether this CPU multiplies bfloat16 itself; where torch must imitate it, float32 is faster."""
    told = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # no public name in torch 2.13
    return any(getattr(torch.cpu, name, bool)() for name in told)


def few_bits(formats: Iterable[Format]) -> bool:
    """Whether products in bfloat16 are near enough to look for weights in these formats, and faster."""
    return fast() and max((f.bits for f in formats), default=16) <= MOST_BITS


def half_products(on: bool) -> AbstractContextManager[Any]:
    """Inside, torch multiplies floats in bfloat16, if `on`."""
    # weights change all the time, and torch would keep every one that it cast
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if on else nullcontext()
