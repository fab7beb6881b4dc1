"""A model -> a folder that plain transformers reads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from torch import Tensor

from halfbyte.containers import Container, container_for
from halfbyte.containers.shards import write_shards
from halfbyte.errors import InputError
from halfbyte.formats import Format
from halfbyte.layers import Codes, Linear, Op, ops
from halfbyte.models.checkpoint import Folder
from halfbyte.models.loading import Loaded
from halfbyte.models.structure import roles
from halfbyte.qtensor import QTensor

Value = Tensor | QTensor


def parameters(loaded: Loaded) -> Iterator[tuple[str, Op | None, Callable[[], Value]]]:
    """Everything that is saved, by its Hugging Face name: the op whose weight it is, if any, and what gives its value:
    codes or floats as they are, in the op's orientation. Called, that reads what is still on disk alone, and keeps
    none of it."""
    model = loaded.model
    done: set[int] = set()
    inside: set[str] = set()
    for name, op in ops(model):
        inside.add(f"{name}.weight")
        if id(op.weight) not in done:
            done.add(id(op.weight))
            yield f"{name}.weight", op, partial(_weight, loaded, name, op)
    for name, m in model.named_modules():
        if _within(name, inside):
            continue
        at = f"{name}." if name else ""
        for key, p in m.named_parameters(recurse=False):
            yield at + key, None, partial(_other, loaded, at + key, p)
        for key, b in m.named_buffers(recurse=False):
            if key not in m._non_persistent_buffers_set:
                yield at + key, None, partial(_other, loaded, at + key, b)


def _weight(loaded: Loaded, name: str, op: Op) -> Value:
    stored = op.weight.stored
    if isinstance(stored, Codes) and not op.weight.adapters:
        return stored.q
    if op.weight.device.type == "meta":
        assert loaded.checkpoint is not None
        value = loaded.checkpoint.weight(name, op)
        return value if isinstance(value, QTensor) else value.to(loaded.config.dtype)
    return op.weight.value().detach()


def _other(loaded: Loaded, name: str, held: Tensor) -> Tensor:
    if held.device.type != "meta":
        return held.detach()
    assert loaded.checkpoint is not None
    return loaded.checkpoint.floats(name, tuple(held.shape)).to(loaded.config.dtype)


def tensors(loaded: Loaded, container: Container | None) -> Iterator[tuple[str, Tensor]]:
    """What a Hugging Face folder holds: codes as the container encodes them, floats as transformers has them."""
    for name, op, get in parameters(loaded):
        value = get()
        if isinstance(value, QTensor):
            assert container is not None
            if "order" in value.parts and container.METHOD != "gptq":
                raise InputError(f"{name}: its inputs are in an order of their own, which only GPTQ's layout holds.")
            yield from container.encode(name.removesuffix(".weight"), value, getattr(op, "input", None)).items()
        else:
            yield name, value.T if op is not None and op.transposed else value


def _within(name: str, roots: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:i]) in roots for i in range(1, len(parts) + 1))


def own_container(loaded: Loaded) -> Container | None:
    """The layout that the model's codes came in, if it came as a folder."""
    source = None if loaded.checkpoint is None else loaded.checkpoint.source
    return source.container if isinstance(source, Folder) else None


def save(loaded: Loaded, folder: Path, container: Container | None = None) -> Container | None:
    """Writes config, weights, tokenizer and generation config into an existing folder, as plain transformers
    (with the container's library, if anything is quantized) reads them. container: the layout for what is quantized;
    the model's own, or the first that can, if None. Gives back the one used.

    Raises InputError, before anything is written, if no layout holds the model's formats.
    """
    model, role = loaded.model, roles(loaded.model)
    sites = {n: op for n, op in ops(model) if isinstance(op.weight.stored, Codes) and not op.weight.adapters}
    config = copy.deepcopy(model.config)
    if sites:
        formats = {n: (_format(op), role[n]) for n, op in sites.items()}
        container = container or container_for(formats, own_container(loaded))
        kept = [n for n, op in ops(model) if n not in sites and isinstance(op, Linear)]
        held = {n: (op.weight.frozen(), getattr(op, "input", None)) for n, op in sites.items()}
        said = container.config(held, kept)
        config.quantization_config = said
        if container.METHOD == "mlx":  # which has a key of its own, and no name of a method
            del config.quantization_config
            config.quantization = {k: v for k, v in said.items() if k != "quant_method"}
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    write_shards(folder, tensors(loaded, container))
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)  # pyright: ignore
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(folder)
    return container


def _format(op: Op) -> Format:
    assert op.weight.format is not None
    return op.weight.format
