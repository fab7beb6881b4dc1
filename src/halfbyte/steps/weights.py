"""What is done to weights as they are: adapters, grids, floats of codes, merging."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import ConfigDict, model_validator

from halfbyte import adapters, bases, layers, models
from halfbyte.errors import InputError
from halfbyte.run import Run, attach_from, dequantize, load, see_through, sharing, to_scheme
from halfbyte.steps.step import Step


class Adapt(Step):
    """Adds an adapter to every weight that target_modules meets. Further keys are the adapter's settings.

    path: go on from a PEFT adapter folder instead; its settings and targets then hold.
    """

    model_config = ConfigDict(extra="allow")
    adapter: str = "lora"
    target_modules: str | list[str] = "all-linear"
    path: str | None = None

    @model_validator(mode="after")
    def _known(self) -> Self:
        adapters.check(self.model_extra or {})
        return self

    def __call__(self, run: Run) -> None:
        if adapters.attached(run.model):
            return  # the model was an adapter folder: training goes on with it
        if run.notes.get("input_search"):
            raise InputError(
                "an adapter's folder has no place for the scales of inputs that this run found: save the quantized "
                "model first, then train an adapter on its folder."
            )
        if self.path is not None:
            attach_from(run, Path(self.path))
            return
        torch.manual_seed(run.seed)  # so that A does not depend on what ran before
        names = adapters.targets(run.model, models.roles(run.model), self.target_modules)
        try:
            adapters.attach(run.model, names, self.adapter, **(self.model_extra or {}))
        except TypeError as e:
            raise InputError(f"adapter {self.adapter}: {e}.") from None
        run.notes["adapter"] = {"adapter": self.adapter, **(self.model_extra or {})}


class Grid(Step):
    """Weights are seen through the scheme's formats from now on; inputs too, where it rounds them."""

    scheme: Any
    group_size: int | None = None
    how: str = "minmax"

    @model_validator(mode="after")
    def _known(self) -> Self:
        chosen = to_scheme(self.scheme, self.group_size)  # a misspelt one fails when the step is made, not at its turn
        if chosen.static:  # scales of inputs would be those of the weights as they were before training
            raise InputError(
                f"{chosen.name} rounds inputs by scales that are found on text: train through a scheme that rounds by "
                f"token, such as W8A8, then quantize the result to {chosen.name} with --calibration FILE."
            )
        return self

    def __call__(self, run: Run) -> None:
        see_through(run, to_scheme(self.scheme, self.group_size), self.how)


class Teacher(Step):
    """Keeps a model whose predictions Train is then held to by its loss: another MODEL, or this one as it is now. keep:
    whether weights that are floats are trained from here on, so that the teacher needs its own; else it shares them.
    codes: whether it may be codes, since what becomes of it computes something else from the start."""

    model: str | None = None
    keep: bool = True
    codes: bool = False

    def __call__(self, run: Run) -> None:
        if self.model is not None:
            other = load(self.model, run.loaded.config.dtype)
            if other.model.config.vocab_size != run.model.config.vocab_size:
                raise InputError(
                    f"--teacher {self.model}: it predicts {other.model.config.vocab_size} tokens, "
                    f"{run.loaded.source} {run.model.config.vocab_size}."
                )
            run.notes["teacher"] = self.model
            run.teacher = other.model
        elif not self.codes and any(isinstance(w.stored, layers.Codes) for w in layers.weights(run.model).values()):
            raise InputError(
                f"{run.loaded.source} is codes already: the loss would hold it to itself. Name the model that "
                "they were made from by --teacher MODEL."
            )
        else:
            run.teacher = copy.deepcopy(run.model) if self.keep else sharing(run).model
        run.teacher.eval().requires_grad_(False)


class Dequantize(Step):
    """Makes floats of what is codes, in the model's dtype: for what is to be trained or rounded itself."""

    def __call__(self, run: Run) -> None:
        dequantize(run)


def _folded(w: layers.Weight) -> tuple[float, float]:
    """Merges; how far the weights then are from their sums: the largest, and all together."""
    off = w.merge()
    return off.max().item(), off.mean().item() * w.shape.numel()


class Merge(Step):
    """Folds the adapters into their weights. base "trained": into what they were trained on (dequantized, for QLoRA;
    for QA-LoRA the zero points take it in, and codes and scales stay); "original": into what its codes were made from,
    or `model`, another MODEL of the same layers.

    What rounding the sums costs is noted as merge_rounding: the largest and the mean distance of a weight, and how many
    weights are codes whose zero points took it in."""

    base: str = "trained"
    model: str | None = None

    def __call__(self, run: Run) -> None:
        if self.base not in ("trained", "original"):
            raise InputError(f"--base {self.base}: it is trained or original.")
        if not adapters.attached(run.model):
            raise InputError(f"{run.loaded.source} has no adapter to merge.")
        if self.base == "original" and (other := bases.other(run, self.model)) is not None:
            bases.put(run, other)
        held = [w for w in layers.weights(run.model).values() if w.adapters]
        largest, total = zip(*(_folded(w) for w in held), strict=True)
        shifted = sum(isinstance(w.stored, layers.Codes) for w in held)
        if not shifted and not run.holds_as_it_is():  # a base from a file of another kind: the result is 16-bit
            dequantize(run)
        run.notes.pop("stored", None)
        run.notes["merged"] = self.base
        run.waiting.clear()  # they were trained beside what was there before
        for w in layers.weights(run.model).values():
            w.waiting.clear()
        if not any(w.grid is not None for w in held):  # through one, rounding was trained
            mean = sum(total) / sum(w.shape.numel() for w in held)
            run.notes["merge_rounding"] = {"largest": max(largest), "mean": mean, "zero_points": shifted}
