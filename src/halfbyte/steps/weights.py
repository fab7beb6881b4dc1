"""What is done to weights as they are: adapters, grids, floats of codes, merging."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import ConfigDict, model_validator
from torch import Tensor

from halfbyte import adapters, bases, calibrate, layers, models
from halfbyte.containers.peft import check_pattern
from halfbyte.errors import InputError
from halfbyte.run import Run, attach_from, dequantize, load, see_through, sharing
from halfbyte.scheme import to_scheme
from halfbyte.steps.codes import Calibrated
from halfbyte.steps.step import Step, is_word


class Adapt(Calibrated):
    """Adds an adapter to every weight that target_modules meets. Further keys are the adapter's settings, among them
    PEFT's init_lora_weights, and r and lora_alpha of single layers (rank_pattern, alpha_pattern).

    modules_to_save: names, or their endings, of modules that are trained whole beside the adapters. path: go on from a
    PEFT adapter folder instead; its settings and targets then hold. calibration: the text that a start is found on
    which needs some (eva).
    """

    model_config = ConfigDict(extra="allow")
    adapter: str = "lora"
    target_modules: str | list[str] = "all-linear"
    modules_to_save: list[str] | None = None
    path: str | None = None

    @property
    def _own(self) -> dict[str, Any]:
        """The adapter's settings."""
        return self.model_extra or {}

    @property
    def _told(self) -> str:
        """What has to be found for the adapter's start."""
        return adapters.start(self._own.get("init_lora_weights", True)).told if self.adapter == "lora" else ""

    @property
    def _text(self) -> Any:
        return None if is_word(self.calibration, "none") else self.calibration

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.adapter != "lora":
            return self
        named = self._own.get("init_lora_weights", True)
        for key in adapters.PATTERNS:
            check_pattern(self._own.get(key) or {}, key)
        adapters.check(self._own)
        if self.path is not None and named is not True:
            raise InputError(f"--init-lora-weights {named}: the adapter {self.path} has begun already.")
        if self._told == "moments" and self._text is None:
            raise InputError(f"--init-lora-weights {named} is found on text: give it some (calibration).")
        return self

    def __call__(self, run: Run) -> None:
        if adapters.attached(run.model):  # the model was an adapter folder: training goes on with it
            if self.path is not None:
                raise InputError(f"--adapter {self.path}: {run.loaded.source} has an adapter already; leave one out.")
            self._same(run)
            return
        if run.notes.get("input_search"):
            raise InputError(
                "an adapter's folder has no place for the scales of inputs that this run found: save the quantized "
                "model first, then train an adapter on its folder."
            )
        if self.path is not None:
            attach_from(run, Path(self.path))
            self._same(run)
            return
        torch.manual_seed(run.seed)  # so that A does not depend on what ran before
        if self.modules_to_save:
            adapters.whole.keep(run.model, self.modules_to_save)
        names = self._targets(run)
        if (key := adapters.unmet(self._own, names)) is not None:
            raise InputError(f"rank_pattern, alpha_pattern: {key!r} meets no layer that gets an adapter.")
        try:
            by_name = dict(layers.ops(run.model))
            adapters.fitting(run.model, names, **self._own)
            begins = [n for n in names if self._told and isinstance(by_name[n], layers.Linear)]
            adapters.attach(run.model, [n for n in names if n not in begins], self.adapter, **self._own)
            for name, told in self._found(run, begins):
                adapters.attach(run.model, [name], self.adapter, told=told, **self._own)
        except TypeError as e:
            raise InputError(f"adapter {self.adapter}: {e}.") from None
        saved = {"modules_to_save": self.modules_to_save} if self.modules_to_save else {}
        run.notes["adapter"] = {"adapter": self.adapter, **self._own, **saved}

    def _targets(self, run: Run) -> list[str]:
        return adapters.targets(run.model, models.roles(run.model), self.target_modules)

    def _same(self, run: Run) -> None:
        """Raises InputError where what is asked for is not what the adapter that is there has. A default asks for
        nothing: it may be that nothing was said."""
        found, kept = adapters.attached(run.model), sorted(adapters.whole.kept(run.model))
        held = {**adapters.DEFAULTS, "init_lora_weights": True, **adapters.settings(found)}
        asked = {k: v for k, v in self._own.items() if k not in adapters.DEFAULTS or v != adapters.DEFAULTS[k]}
        there = "training goes on with an adapter that is there"
        if (key := adapters.unmet(asked, list(found))) is not None:
            raise InputError(f"{key!r} meets no layer: {there}, of other layers; leave it out.")
        for name in found:
            has = adapters.own(held, name)
            for key, value in adapters.own(asked, name).items():
                if value != has.get(key):
                    raise InputError(f"{key} {value}: {there}, of {key} {has.get(key)} in {name}; leave it out.")
        if self.modules_to_save and sorted(self.modules_to_save) != kept:
            raise InputError(
                f"modules_to_save {', '.join(self.modules_to_save)}: {there}, beside {', '.join(kept) or 'none'}; "
                "leave it out."
            )
        if self.target_modules != "all-linear" and set(self._targets(run)) != set(found):
            raise InputError(f"target_modules {self.target_modules}: {there}, of other layers; leave it out.")

    def _found(self, run: Run, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """What the adapters' start has to be told, one op after the other."""
        if self._told == "original":
            yield from _original(run, names)
        if self._told == "moments":
            rows = self._rows(run)
            assert rows is not None
            yield from calibrate.inputs(run.model, names, self._batches(run, rows))


def _original(run: Run, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's own floats of ops whose weights are codes. Raises InputError where there are none."""
    by_name, checkpoint = dict(layers.ops(run.model)), run.loaded.checkpoint
    fresh = {} if checkpoint else dict(layers.ops(models.load(run.loaded.source, run.loaded.config.dtype).model))
    for name in names:
        op = by_name[name]
        if not isinstance(op.weight.stored, layers.Codes):
            raise InputError(
                f"--init-lora-weights loftq makes good what quantizing lost, and {name} is a float: use --method qlora."
            )
        w = checkpoint.weight(name, op) if checkpoint else fresh[name].weight.base().detach()
        if not isinstance(w, Tensor):
            raise InputError(
                f"--init-lora-weights loftq: {run.loaded.source} is codes already, and what these lost is not there; "
                "name the model that they were made from."
            )
        yield name, w


class Grid(Step):
    """Weights are seen through the scheme's formats from now on; inputs too, where it rounds them."""

    scheme: Any
    group_size: int | None = None
    how: str | None = None  # by the range, as each format has it

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
        elif why := self._itself(run):
            raise InputError(
                f"{run.loaded.source} {why}: the loss would hold it to itself. Name the model that it was made from by "
                "--teacher MODEL."
            )
        else:
            keep = self.keep or bool(adapters.loaded(run.model))  # which are trained on, if the model came with some
            run.teacher = copy.deepcopy(run.model) if keep else sharing(run).model
        run.teacher.eval().requires_grad_(False)

    def _itself(self, run: Run) -> str | None:
        """What makes the model the very one that is trained, in words."""
        held = layers.weights(run.model).values()
        if any(w.grid is not None for w in held):
            return "is seen through a grid already"
        return "is codes already" if not self.codes and any(isinstance(w.stored, layers.Codes) for w in held) else None


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
        if self.base == "original":
            bases.put(run, bases.other(run, self.model))
        held = [w for w in layers.weights(run.model).values() if w.adapters]
        largest, total = zip(*(_folded(w) for w in held), strict=True)
        run.let_go()
        shifted = sum(isinstance(w.stored, layers.Codes) for w in held)
        if not shifted and not run.holds_as_it_is():  # a base from a file of another kind: the result is 16-bit
            dequantize(run)
        layers.round_inputs_of_codes(run.model)
        run.notes.pop("stored", None)
        run.notes["merged"] = self.base
        if not any(w.grid is not None for w in held):  # through one, rounding was trained
            mean = sum(total) / sum(w.shape.numel() for w in held)
            run.notes["merge_rounding"] = {"largest": max(largest), "mean": mean, "zero_points": shifted}
