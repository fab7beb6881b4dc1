"""What a Train step trains, and how it ends."""

from __future__ import annotations

import torch
from torch import nn

from halfbyte import adapters, layers
from halfbyte.errors import InputError
from halfbyte.weight import check_learnable, learnable


def trainable(model: nn.Module, norms: bool = False) -> str:
    """Marks what a Train step trains, and only that, as requiring a gradient. Says which: adapters (and the scales that
    grids learn), scales (and norms, if asked for) or stored (everything that is a float).

    Raises InputError where norms are asked for and it is not scales that are trained, or the model has none."""
    model.requires_grad_(False)
    found, held = adapters.attached(model), layers.weights(model).values()
    coded = [w for w in held if isinstance(w.stored, layers.Codes)]
    if norms and (found or not coded):
        raise InputError("norms are trained beside scales: --method scales takes them, and others do not.")
    if found:
        for w in held:
            if w.grid is not None and any(getattr(a, "lora_dropout", 0) for a in w.adapters.values()):
                raise InputError("--lora-dropout: through a grid W0 + s B A is seen whole; leave it out.")
            w.adapters.requires_grad_(True)
            if w.grid is not None:
                w.grid.requires_grad_(True)
        adapters.whole.requires_grad(model)
        return "adapters"
    if not coded:
        model.requires_grad_(True)
        return "stored"
    scaled = [w for w in coded if learnable(w.frozen().format)]  # others' scales are codes, and stay
    if not scaled:
        check_learnable(coded[0].frozen().format)
    for w in scaled:
        w.store(w.frozen(), learn=True)
    if norms:
        layers_of_norms = [m for m in model.modules() if type(m).__name__.endswith("Norm")]
        if not layers_of_norms:
            raise InputError("norms: this model has no module whose class is called so.")
        for m in layers_of_norms:
            m.requires_grad_(True)
    return "scales"


def sleep(model: nn.Module, asleep: bool) -> None:
    """Whether training sees no grid yet."""
    for w in layers.weights(model).values():
        if w.grid is not None:
            w.grid.asleep = asleep


@torch.no_grad()
def settle(model: nn.Module) -> None:
    """Ends training: nothing requires a gradient, learned scales are rounded to what the file will hold."""
    model.requires_grad_(False)
    for w in layers.weights(model).values():
        if isinstance(w.stored, layers.Codes) and w.stored.learned:
            w.store(w.stored.q)
    model.eval()
