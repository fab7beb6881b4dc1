"""A LoRA adapter as a GGUF file, which llama.cpp adds to its base while it reads that (`--lora`)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from halfbyte import adapters
from halfbyte.containers import gguf as container
from halfbyte.errors import InputError
from halfbyte.kinds.gguf import READER, LlamaCpp, missing
from halfbyte.layers import Codes, Weight, ops, weights
from halfbyte.models import gguf, gguf_saving
from halfbyte.qtensor import QTensor

if TYPE_CHECKING:
    from halfbyte.kinds import Job
    from halfbyte.models import Loaded

__all__ = ["READER", "missing"]
NAME, SUFFIX = "gguf-lora", ".gguf"
ADAPTERS = True


def refuses(job: Job) -> str | None:
    """See Kind."""
    found = adapters.attached(job.loaded.model)
    if not found:
        return "it is no adapter folder"
    if any(a.settings().get("use_dora") for a in found.values()):
        return "it is DoRA, of which llama.cpp's file of an adapter holds no norms: `halfbyte merge` it instead"
    if whole := list(adapters.whole.kept(job.loaded.model)):
        return (
            f"{whole[0]} was trained whole, which llama.cpp's file of an adapter has no place for: `halfbyte merge` it"
        )
    if looked_up := [n for n, a in found.items() if getattr(a, "looked_up", False)]:
        return f"{looked_up[0]} is looked up, and llama.cpp adds to products alone: `halfbyte merge` it instead"
    try:
        list(_tensors(job))
    except InputError as e:
        return str(e).rstrip(".")
    if any(w.grid is not None for w in weights(job.loaded.model).values()):
        return "it was trained through a grid, which no base beside it is seen through: `halfbyte merge` it instead"
    return None


def remarks(job: Job) -> list[str]:
    """See Kind."""
    out = ["the base is not in this file: export it to GGUF too, and give llama.cpp both"]
    held = {w.stored.q.format.name for w in weights(job.loaded.model).values() if isinstance(w.stored, Codes)}
    if held:
        out.append(f"it was trained beside a base in {', '.join(sorted(held))}, and beside another it computes another")
    return out


def fitting(q: QTensor) -> QTensor | None:
    """See Kind. Nothing of the base is written."""
    return None


def _alpha(settings: Mapping[str, Any]) -> float:
    """What readers divide by a layer's rank, and multiply B A with."""
    return settings["lora_alpha"] * (math.sqrt(settings["r"]) if settings["use_rslora"] else 1.0)


def _tensors(job: Job) -> Iterator[tuple[str, Tensor]]:
    """A (r, in) and B (out, r) of every layer, by GGUF's names; B's rows in the file's order. The file has one
    alpha, the first layer's: where a layer has another, B makes up for it."""
    config, file, by_name = job.loaded.config, None, dict(ops(job.loaded.model))
    for name, adapter in adapters.attached(job.loaded.model).items():
        tensor = gguf.architecture_of(config).tensor(f"{name}.weight", config)
        order = gguf.architecture_of(config).rows(tensor, config)
        file = file or _alpha(adapter.settings())
        a, b = _factors(adapter, by_name[name].weight, file)
        yield f"{tensor}.lora_a", a
        yield f"{tensor}.lora_b", b if order is None else b[order]


@torch.no_grad()
def _factors(adapter: Any, weight: Weight, file: float) -> tuple[Tensor, Tensor]:
    """A and B of the LoRA that adds the same, where readers take `file` for alpha. Of QA-LoRA beside codes that is what
    zero points hold of it, whatever its rank: A is then a sum over each group."""
    held = adapter.held(weight) if hasattr(adapter, "held") else None
    if held is None:
        a, b = adapter.factors()
        return a, b * (_alpha(adapter.settings()) / file)
    groups = held.shape[-1]
    return torch.eye(groups).repeat_interleave(weight.shape[-1] // groups, 1), held * (groups / file)


def write(job: Job, path: Path) -> None:
    """See Kind."""
    said: dict[str, container.Value] = {
        "general.architecture": gguf.architecture_of(job.loaded.config).name,
        "general.type": "adapter",
        "general.name": Path(job.loaded.source).name,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(_alpha(next(iter(adapters.attached(job.loaded.model).values())).settings())),
    }
    tensors = list(_tensors(job))
    container.write(path, said, {n: ("f32", tuple(t.shape)) for n, t in tensors}, tensors)


@torch.no_grad()
def ours(job: Job) -> Loaded:
    """See Kind. It is the job's own model, whose base becomes float32, codes among it."""
    loaded = job.loaded
    for _, op in ops(loaded.model):
        if isinstance(op.weight.stored, Codes):
            op.weight.store(replace(op.weight.stored.q, dtype=torch.float32))
            if not any(hasattr(a, "held") for a in op.weight.adapters.values()):  # which goes by its zero points
                op.weight.dequantize()
    for p in loaded.model.parameters():
        p.data = p.data.float()
    loaded.config.dtype = torch.float32
    return loaded


def beside(job: Job, path: Path, context: int) -> nn.Module:
    """See Kind. The base is written in float32 for that, beside the adapter, and removed once it is read."""
    with TemporaryDirectory(dir=path.parent, prefix=f"{path.stem}.base.") as folder:
        base = Path(folder) / "base.gguf"
        try:
            with _alone(job.loaded.model):
                gguf_saving.save(job.loaded, base, {}, torch.float32)
        except InputError as e:
            why = str(e).rstrip(".")
            raise InputError(f"the adapter's base, beside which it is read, cannot be written: {why}.") from None
        return LlamaCpp(base, context, lora_path=str(path))


@contextmanager
def _alone(model: nn.Module) -> Iterator[None]:
    """The model without its adapters."""
    held = [(w, dict(w.adapters.items())) for w in weights(model).values()]
    for w, _ in held:
        w.adapters.clear()
    try:
        yield
    finally:
        for w, found in held:
            w.adapters.update(found)


def open(path: Path, context: int) -> nn.Module:
    """See Kind; never called."""
    raise InputError(f"{path}: an adapter alone computes nothing.")


def differs(reader: nn.Module, loaded: Loaded) -> str | None:
    """See Kind. What is written has no words of its own."""
    return None
