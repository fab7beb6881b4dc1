"""What an adapter's folder tells, checked against the model that it goes onto, and put into its adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.adapters import whole
from halfbyte.adapters.patterns import own
from halfbyte.containers.peft import BASE
from halfbyte.errors import InputError
from halfbyte.layers import Codes, Embedding, Linear, Weight, ops, weights

States = Mapping[str, Mapping[str, Tensor]]  # op's name -> tensors by PEFT's names


def check_folder(model: nn.Module, settings: Mapping[str, Any], states: States, saved: dict[str, Tensor]) -> None:
    """Raises InputError for an adapter that does not go onto this model, before memory is taken for what a config
    names. saved: what the folder holds beside adapters, of which the embeddings' own weights, which PEFT saves where
    these are adapted, are taken out."""
    _check_layers(model, settings, states)
    by_name = dict(ops(model))
    for name in [n for n in saved if n.endswith(BASE)]:
        op, given = by_name.get(name.removesuffix(BASE)), saved.pop(name)
        if op is None or op.weight.shape != given.shape or not torch.equal(given.to(op.weight.dtype), op.weight.base()):
            raise InputError(f"{name} is another than the base's own: merge the adapter by PEFT.")
    held = weights(model).values()
    if settings.get("init_lora_weights", True) is not True and any(isinstance(w.stored, Codes) for w in held):
        raise InputError(
            f"its init_lora_weights, {settings['init_lora_weights']}, takes a part out of the base, which this "
            "one, of codes, is not beside it: have PEFT save it converted (path_initial_model_for_weight_conversion)."
        )
    others = any(w.adapters or w.waiting for w in held)
    if others and (settings.get("modules_to_save") or whole.kept(model)):
        raise InputError("modules_to_save change the base that other adapters stand beside: load it by itself.")


def _check_layers(model: nn.Module, settings: Mapping[str, Any], states: States) -> None:
    by_name = dict(ops(model))
    for name, state in states.items():
        if not isinstance(by_name.get(name), Linear | Embedding):
            raise InputError(f"the base has no linear layer {name!r}.")
        a, r = state["lora_A.weight"], own(settings, name)["r"]
        if a.ndim != 2 or len(a) < r:
            raise InputError(f"{name}.lora_A has the shape {tuple(a.shape)}, and not the rank {r}.")


def fill(held: Mapping[str, Weight], states: States, called: str) -> None:
    """Gives the adapters of that name what a folder says of them. Raises InputError where a shape differs."""
    for name, weight in held.items():
        adapter: Any = weight.adapters[called]
        for key, value in states[name].items():
            p = getattr(adapter, key.removesuffix(".weight"))
            if p.shape != value.shape:
                raise InputError(f"{name}.{key} has the shape {tuple(value.shape)}, not {tuple(p.shape)}.")
            p.data.copy_(value)
