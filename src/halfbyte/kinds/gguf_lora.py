"""A LoRA adapter as a GGUF file, which llama.cpp adds to its base while it reads that (`--lora`)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from halfbyte import adapters
from halfbyte.containers import gguf as container
from halfbyte.errors import InputError
from halfbyte.models import gguf
from halfbyte.qtensor import QTensor

if TYPE_CHECKING:
    from typing import Any

    from halfbyte.kinds import Job
    from halfbyte.models import Loaded

NAME, SUFFIX, READER = "gguf-lora", ".gguf", "llama.cpp"
ADAPTERS = True


def refuses(job: Job) -> str | None:
    """See Kind."""
    found = adapters.attached(job.loaded.model)
    if not found:
        return "it is no adapter folder"
    try:
        list(_tensors(job))
    except InputError as e:
        return str(e).rstrip(".")
    if len({(a.r, a.lora_alpha, a.use_rslora) for a in found.values()}) > 1:
        return "its layers differ in rank or alpha, of which the file has one"
    return None


def remarks(job: Job) -> list[str]:
    """See Kind."""
    return ["the base is not in this file: export it to GGUF too, and give llama.cpp both"]


def fitting(q: QTensor) -> QTensor | None:
    """See Kind. Nothing of the base is written."""
    return None


def _tensors(job: Job) -> Iterator[tuple[str, Tensor]]:
    """A (r, in) and B (out, r) of every layer, by GGUF's names; B's rows in the file's order."""
    config = job.loaded.config
    for name, adapter in adapters.attached(job.loaded.model).items():
        tensor = gguf.architecture_of(config).tensor(f"{name}.weight", config)
        order, b = gguf.architecture_of(config).rows(tensor, config), adapter.lora_B.detach().float()
        yield f"{tensor}.lora_a", adapter.lora_A.detach().float()
        yield f"{tensor}.lora_b", b if order is None else b[order]


def write(job: Job, path: Path) -> None:
    """See Kind."""
    one = next(iter(adapters.attached(job.loaded.model).values()))
    alpha = one.lora_alpha * (math.sqrt(one.r) if one.use_rslora else 1.0)  # readers divide by r
    said: dict[str, container.Value] = {
        "general.architecture": gguf.architecture_of(job.loaded.config).name,
        "general.type": "adapter",
        "general.name": Path(job.loaded.source).name,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
    }
    tensors = list(_tensors(job))
    container.write(path, said, {n: ("f32", tuple(t.shape)) for n, t in tensors}, tensors)


def ours(job: Job) -> Loaded | None:
    """See Kind."""
    return None


def missing() -> str | None:
    """See Kind."""
    return "it reads an adapter only beside its base"


def open(path: Path, context: int) -> nn.Module:
    """See Kind; never called."""
    raise InputError(f"{path}: an adapter alone computes nothing.")


def differs(reader: nn.Module, tokenizer: Any) -> str | None:
    """See Kind; never called."""
    return None
