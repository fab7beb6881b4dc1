"""A model -> a folder that plain transformers reads."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn

from halfbyte.containers import Container, container_for
from halfbyte.containers.shards import write_shards
from halfbyte.formats import Format
from halfbyte.layers import Codes, Linear, Op, ops
from halfbyte.models.loading import Loaded
from halfbyte.models.structure import roles


def tensors(model: nn.Module, container: Container | None) -> Iterator[tuple[str, Tensor]]:
    """Everything that is saved, by its Hugging Face name: codes as the container encodes them, floats as they are."""
    done: set[int] = set()
    inside: set[str] = set()
    for name, op in ops(model):
        inside.add(f"{name}.weight")
        if id(op.weight) in done:
            continue
        done.add(id(op.weight))
        if isinstance(op.weight.stored, Codes) and not op.weight.adapters:
            assert container is not None
            encoded = container.encode(name, op.weight.stored.q, getattr(op, "input", None))
            yield from encoded.items()
        else:
            value = op.weight.value().detach()
            yield f"{name}.weight", value.T if op.transposed else value
    for name, m in model.named_modules():
        if _within(name, inside):
            continue
        for key, p in m.named_parameters(recurse=False):
            yield f"{name}.{key}" if name else key, p.detach()
        for key, b in m.named_buffers(recurse=False):
            if key not in m._non_persistent_buffers_set:
                yield f"{name}.{key}" if name else key, b


def _within(name: str, roots: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:i]) in roots for i in range(1, len(parts) + 1))


def save(loaded: Loaded, folder: Path) -> Container | None:
    """Writes config, weights, tokenizer and generation config into an existing folder, as plain transformers
    (with the container's library, if anything is quantized) reads them. Gives back the container used.

    Raises InputError, before anything is written, if no layout holds the model's formats.
    """
    model, role = loaded.model, roles(loaded.model)
    sites = {n: op for n, op in ops(model) if isinstance(op.weight.stored, Codes) and not op.weight.adapters}
    container = None
    config = copy.deepcopy(model.config)
    if sites:
        container = container_for({n: (_format(op), role[n]) for n, op in sites.items()})
        kept = [n for n, op in ops(model) if n not in sites and isinstance(op, Linear)]
        held = {n: (op.weight.frozen(), getattr(op, "input", None)) for n, op in sites.items()}
        config.quantization_config = container.config(held, kept)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    write_shards(folder, tensors(model, container))
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)  # pyright: ignore
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(folder)
    return container


def _format(op: Op) -> Format:
    assert op.weight.format is not None
    return op.weight.format
