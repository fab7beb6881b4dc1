"""A model -> a folder that plain transformers reads, one tensor at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from halfbyte import kernels
from halfbyte.containers import Container, container_for
from halfbyte.containers.shards import write_shards
from halfbyte.errors import InputError
from halfbyte.formats import Format
from halfbyte.kernels.rounding import finite
from halfbyte.layers import Codes, Conv, Linear, Op, ops
from halfbyte.models.blockwise import Solved
from halfbyte.models.checkpoint import Folder
from halfbyte.models.loading import Loaded
from halfbyte.models.names import Names
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
    if op.weight.device.type == "meta":
        assert loaded.checkpoint is not None
        value = loaded.checkpoint.weight(name, op)
        return value if isinstance(value, QTensor) else value.to(loaded.config.dtype)
    if isinstance(stored, Codes) and not op.weight.adapters:
        return stored.q
    return op.weight.value().detach()


def _other(loaded: Loaded, name: str, held: Tensor) -> Tensor:
    if held.device.type != "meta":
        return held.detach()
    assert loaded.checkpoint is not None
    return loaded.checkpoint.floats(name, tuple(held.shape)).to(loaded.config.dtype)


def tensors(
    loaded: Loaded, container: Container | None, formats: Mapping[str, Format] = {}, floats: torch.dtype | None = None,
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    """What a Hugging Face folder holds: codes as the container encodes them, floats as transformers has them. formats,
    floats: see `save`."""
    chosen, buffers = _by_weight(loaded, formats), {n for n, _ in loaded.model.named_buffers()}
    everything = list(parameters(loaded))
    for i, (name, op, get) in enumerate(everything):
        value = get()
        if op is not None and (f := chosen.get(id(op.weight))) is not None:
            value = rounded(name, value, f)
        elif floats is not None and name not in buffers:
            value = cast(name, value.dequantize() if isinstance(value, QTensor) else value, floats)
        if isinstance(value, QTensor):
            assert container is not None
            if "order" in value.parts and container.METHOD != "gptq":
                raise InputError(f"{name}: its inputs are in an order of their own, which only GPTQ's layout holds.")
            yield from container.encode(name.removesuffix(".weight"), value, getattr(op, "input", None)).items()
        else:
            yield name, value if op is None else _as_held(op, value)
        on_tensor(i + 1, len(everything))


def _as_held(op: Op, value: Tensor) -> Tensor:
    """Floats of an op's weight, as the module that it stands for held them."""
    return value.unflatten(1, op.kernel) if isinstance(op, Conv) else value.T if op.transposed else value


def _by_weight(loaded: Loaded, formats: Mapping[str, Format]) -> dict[int, Format]:
    """Formats by the id of the Weight, which tied ops share."""
    named = dict(ops(loaded.model))
    return {id(named[name].weight): f for name, f in formats.items()}


def rounded(name: str, value: Value, f: Format) -> QTensor:
    """A value in a format, to nearest; as it is, if it is in that already. Raises InputError for NaN and infinity."""
    if isinstance(value, QTensor):
        if value.format == f:
            return value
        value = value.dequantize()
    if not finite(value):
        raise InputError(f"{name} holds NaN or infinity, which has no code in {f.name}.")
    return kernels.quantize(value, f)


def cast(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A value in a dtype. Raises InputError for NaN and infinity, and for numbers that the dtype does not hold."""
    if not finite(value):
        raise InputError(f"{name} holds NaN or infinity.")
    out = value.to(dtype)
    if not out.isfinite().all():
        raise InputError(f"{name}: its largest value, {value.abs().max():.4g}, is more than {dtype} holds; use BF16.")
    return out


def _within(name: str, roots: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:i]) in roots for i in range(1, len(parts) + 1))


def own_container(loaded: Loaded) -> Container | None:
    """The layout that the model's codes came in, if it came as a folder."""
    source = None if loaded.checkpoint is None else loaded.checkpoint.source
    source = source.base if isinstance(source, Solved) else source
    return source.container if isinstance(source, Folder) else None


def save(
    loaded: Loaded, folder: Path, container: Container | None = None, formats: Mapping[str, Format] = {},
    floats: torch.dtype | None = None, on_tensor: Callable[[int, int], None] = lambda done, total: None,
) -> Container | None:  # fmt: skip
    """Writes config, weights, tokenizer and generation config into an existing folder, as plain transformers
    (with the container's library, if anything is quantized) reads them. container: the layout for what is quantized;
    the model's own, or the first that can, if None. formats: op's name -> what its weight is rounded to, to nearest,
    while it is written. floats: the dtype that all others get, codes among them; None leaves them as they are. Gives
    back the container used.

    Raises InputError, before anything is written, if no layout holds the model's formats; and for values that a format
    or dtype does not hold.
    """
    model, role, names = loaded.model, roles(loaded.model), Names(loaded.model)
    config = copy.deepcopy(model.config)
    config.dtype = floats or config.dtype
    sites = _sites(loaded, formats, floats)
    if sites:
        named = dict(ops(model))
        inputs = {n: getattr(named[n], "input", None) for n in sites}
        container = container or container_for(
            {n: (q.format, role[n]) for n, q in sites.items()}, own_container(loaded), any(inputs.values()),
            {q.dtype for q in sites.values()},
        )  # fmt: skip
        kept = [n for n, op in ops(model) if n not in sites and isinstance(op, Linear)]
        # by both of its names: transformers goes by that in memory, others, as we do, by that in the folder
        both = {n: dict.fromkeys((n, names.stored(f"{n}.weight").removesuffix(".weight"))) for n in (*sites, *kept)}
        covered = {to: (q, inputs[n]) for n, q in sites.items() for to in both[n]}
        said = container.config(covered, [to for n in kept for to in both[n]])
        config.quantization_config = said
        if container.METHOD == "mlx":  # which has a key of its own, and no name of a method
            del config.quantization_config
            config.quantization = {k: v for k, v in said.items() if k != "quant_method"}
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    parts = tensors(loaded, container, formats, floats, on_tensor)
    write_shards(folder, names.folder(parts, names.together(sites)))
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)  # pyright: ignore
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(folder)
    return container


def _sites(loaded: Loaded, formats: Mapping[str, Format], floats: torch.dtype | None) -> dict[str, QTensor]:
    """What will be codes, by op's name: those that are, and a row of zeros for those that are yet to be made, which
    tells layouts as much."""
    chosen, out = _by_weight(loaded, formats), {}
    for name, op in ops(loaded.model):
        w, f = op.weight, chosen.get(id(op.weight))
        held = w.stored.q if isinstance(w.stored, Codes) and not w.adapters else None
        if f is not None and (held is None or held.format != f):
            dtype = loaded.config.dtype if held is None else held.dtype
            out[name] = kernels.quantize(torch.zeros(1, w.shape[-1], dtype=dtype), f)
        elif held is not None and (f is not None or floats is None):
            out[name] = held
    return out
