"""Models trained through a format, and those trained without it and quantized afterwards."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from setting import LENGTH, Setting

from halfbyte import evaluate
from halfbyte.layers import Codes, weights
from halfbyte.methods import merge_steps, method_steps
from halfbyte.run import Run, learn_from_codes
from halfbyte.steps import Freeze, Merge, Train, Transform

BATCH = 4  # rows of LENGTH tokens a step
SAMPLES = {"gptq": 16, "autoround": 64}  # rows that a solver is given
W4, W4_ZERO = "int4-g64", "uint4-g64-affine"


@dataclass(frozen=True)
class Asked:
    """What of a section is run. only: a regular expression that is found in its rows' names. rates: learning rates in
    place of each row's own. seeds: how many, in the section of that name."""

    steps: int
    only: str
    rates: list[float]
    seeds: int

    def wants(self, name: str) -> bool:
        return re.search(self.only, name) is not None


@dataclass(frozen=True)
class Trial:
    """A training. first: transforms of the float model before it. init: the solver that its codes begin from. more:
    settings of Train and Adapt."""

    name: str
    method: str
    rate: float
    to: str | None = None
    init: str | None = None
    loss: str = "ce"
    text: str = "prose"
    first: tuple[str, ...] = ()
    more: dict[str, Any] = field(default_factory=dict)


def chosen(trials: tuple[Trial, ...], asked: Asked) -> Iterator[Trial]:
    for t in trials:
        if asked.wants(t.name):
            yield from (replace(t, rate=rate) for rate in asked.rates or [t.rate])


@dataclass
class Result:
    """there: what was trained. begun: what was measured of it before; None where that is the float model itself."""

    there: Run
    begun: dict[str, Any] | None
    seconds: float
    solving: float

    @property
    def row(self) -> dict[str, Any]:
        assert self.there.log is not None
        log = self.there.log
        return {"seconds": round(self.seconds), "solving": round(self.solving), "steps": len(log.curve),
                "trainable": log.trainable, "memory": log.peak_memory, "begun": self.begun}  # fmt: skip


def trained(setting: Setting, t: Trial, asked: Asked, seed: int = 0) -> Result:
    there, rows = replace(setting.copy(), seed=seed), setting.training(t.text)
    settings = {"data": rows, "steps": asked.steps, "batch_size": BATCH, "max_length": LENGTH,
                "learning_rate": t.rate, "loss": t.loss, "bf16": True, **t.more}  # fmt: skip
    begun, solving, began = None, 0.0, time.perf_counter()
    untie = "hadamard" in t.first
    for step in method_steps(t.method, t.to, settings, init=t.init, transforms=t.first, untie=untie):
        if isinstance(step, Freeze) and step.solver in SAMPLES:
            there, solving = solved(there, step, t)
            continue
        if isinstance(step, Train):
            begun = None if t.to is None else measured(setting, there)
            began = time.perf_counter()
        with torch.set_grad_enabled(isinstance(step, Train)):
            step(there)
    return Result(there, begun, time.perf_counter() - began, solving)


_SOLVED: dict[tuple[str, ...], tuple[Run, float]] = {}


@torch.no_grad()
def solved(there: Run, step: Freeze, t: Trial) -> tuple[Run, float]:
    """What the step makes of the model, and the seconds that took, once for all trials that begin alike."""
    key = str(step.scheme), step.solver, t.text, *t.first
    teacher, there.teacher = there.teacher, None
    floats = {n: w.base().detach().clone() for n, w in weights(there.model).items()}
    if key not in _SOLVED:
        began = time.perf_counter()
        step.model_copy(update={"samples": SAMPLES[step.solver], "learn": False})(there)
        _SOLVED[key] = there, time.perf_counter() - began
    run, seconds = copy.deepcopy(_SOLVED[key])
    run.teacher, run.seed = teacher, there.seed
    if step.learn:
        learn_from_codes(run, floats)
    return run, seconds


@torch.no_grad()
def measured(setting: Setting, there: Run) -> dict[str, Any]:
    there.model.eval()
    return setting.measured(there)


@torch.no_grad()
def against(setting: Setting, there: Run, other: Run) -> dict[str, Any]:
    """Of each text: the difference of losses to another model on the same tokens with its 95% interval, and the
    perplexity."""
    out = {}
    for name, rows in setting.texts.items():
        m = evaluate.measure(there.model, rows, evaluate.Reference(other.model))
        interval = [m.loss_difference, m.loss_difference_low, m.loss_difference_high]
        out[name] = {"loss": interval, "perplexity": m.perplexity, "kl": [m.kl_mean, m.kl_error]}
    return out


def held_to_the_teacher(setting: Setting, asked: Asked) -> Iterator[dict]:
    """KL to the float model, of what a solver leaves and what training makes of it."""
    trials = (
        Trial("gptq, scales", "scales", 2e-5, W4, "gptq", "kl"),
        Trial("gptq, qat-lora", "qat-lora", 5e-5, W4, "gptq", "kl", more={"r": 16, "scale_lr_ratio": 0.1}),
        Trial("gptq, qat", "qat", 3e-5, W4, "gptq", "kl", more={"scale_lr_ratio": 0.3}),
        Trial("autoround, scales", "scales", 2e-5, W4, "autoround", "kl"),
        Trial("autoround, qat", "qat", 3e-5, W4, "autoround", "kl", more={"scale_lr_ratio": 0.3}),
        Trial("autoround, qat, a zero", "qat", 3e-5, W4_ZERO, "autoround", "kl", more={"scale_lr_ratio": 0.3}),
        Trial("gptq, qat, inputs in 8 bits", "qat", 3e-5, "W4A8", "gptq", "kl", more={"scale_lr_ratio": 0.3}),
        Trial("gptq, scales, a file", "scales", 2e-5, "Q4_0", "gptq", "kl"),
        Trial("gptq, qat, a file", "qat", 3e-5, "Q4_0", "gptq", "kl", more={"scale_lr_ratio": 0.3}),
        Trial("gptq, qat, a file of K", "qat", 3e-5, "Q4_K_M", "gptq", "kl", more={"scale_lr_ratio": 0.3}),
    )
    for t in chosen(trials, asked):
        found = trained(setting, t, asked)
        yield {"what": t.to, "name": t.name, "rate": t.rate, **found.row, **measured(setting, found.there)}


FULL = Trial("full precision", "full", 2e-4)
READY = (  # what is made ready first: its inputs, or its codes
    Trial("smooth, qat", "qat", 2e-4, "W8A8", first=("smooth",)),
    Trial("gptq, qat", "qat", 4e-4, W4, "gptq", more={"scale_lr_ratio": 0.1}),
)


def domain(setting: Setting, asked: Asked) -> Iterator[dict]:
    """A model fine-tuned in full precision, quantized afterwards, and those trained through the format, on the same
    text for the same steps: each against the first."""
    best = trained(setting, FULL, asked)
    yield {"what": "float32", "name": FULL.name, "rate": FULL.rate, **best.row,
           **against(setting, best.there, setting.reference)}  # fmt: skip
    even: tuple[str, ...] = ("hadamard", "smooth")
    roads = (
        ("W8A8", "rtn", ()),
        ("W8A8", "rtn", ("smooth",)),
        ("W8A8", "gptq", even),
        (W4, "rtn", ()),
        (W4, "gptq", ()),
        (W4, "autoround", ()),
        (W4_ZERO, "rtn", ()),
        (W4_ZERO, "autoround", ()),
    )
    for to, solver, first in roads:
        name = f"{FULL.name}, then {', '.join((*first, solver))}"
        if not asked.wants(name):
            continue
        there, rows = setting.copy(), setting.calibration("prose", SAMPLES.get(solver, SAMPLES["gptq"]))
        there.model.load_state_dict(best.there.model.state_dict())
        text = rows if solver in SAMPLES else "none"
        with torch.no_grad():
            for t in first:
                Transform(name=t, scheme=to, untie=True, calibration=rows, samples=len(rows))(there)
            Freeze(scheme=to, solver=solver, calibration=text, samples=len(rows))(there)
        yield {"what": to, "name": name, "rate": FULL.rate, **against(setting, there, best.there)}
    trials = (
        Trial("qat", "qat", 2e-4, "W8A8"),
        Trial("qat", "qat", 4e-4, W4),
        *READY,
        Trial("autoround, qat", "qat", 2e-4, W4, "autoround", more={"scale_lr_ratio": 0.1}),
        Trial("autoround, qat, a zero", "qat", 2e-4, W4_ZERO, "autoround", more={"scale_lr_ratio": 0.1}),
    )
    for t in chosen(trials, asked):
        found = trained(setting, t, asked)
        yield {"what": t.to, "name": t.name, "rate": t.rate, **found.row, **against(setting, found.there, best.there)}


def roads(setting: Setting, asked: Asked) -> Iterator[dict]:
    """To a fine-tuned model in 4 bits: QLoRA, merged and quantized; and QAT-LoRA, merged."""
    more = {"r": 16}
    for usual in chosen((Trial("qlora", "qlora", 2e-4, text="docstrings", more=more),), asked):
        found = trained(setting, usual, asked)
        yield {"what": "NF4 and an adapter", "name": "qlora, unmerged", "rate": usual.rate, **found.row,
               **measured(setting, found.there)}  # fmt: skip
        for base in ("trained", "original"):
            for solver in ("rtn", "gptq"):
                there = merged(setting, found.there, base, solver, usual.text)
                yield {"what": W4, "name": f"qlora, merged into its {base} base, {solver}", "rate": usual.rate,
                       **measured(setting, there)}  # fmt: skip
    straight = Trial("qat-lora", "qat-lora", 2e-4, W4, text="docstrings", more=more)
    begun = Trial("gptq, qat-lora", "qat-lora", 2e-4, W4, "gptq", text="docstrings",
                   more={**more, "scale_lr_ratio": 0.1})  # fmt: skip
    for t in chosen((straight, begun), asked):
        found = trained(setting, t, asked)
        told = "" if t.init is None else ", merged"  # by its last steps, since no adapter's folder has its scales
        yield {"what": W4, "name": f"{t.name}{told}", "rate": t.rate, **found.row, **measured(setting, found.there)}
        if t.init is None:
            with torch.no_grad():
                for step in merge_steps(found.there):
                    step(found.there)
            yield {"what": W4, "name": f"{t.name}, merged", "rate": t.rate, **measured(setting, found.there)}


@torch.no_grad()
def merged(setting: Setting, of: Run, base: str, solver: str, text: str) -> Run:
    """What QLoRA trained, merged into the codes that it knew or the floats that these were made from, and quantized."""
    there, rows = copy.deepcopy(of), setting.calibration(text, SAMPLES["gptq"])
    if base == "original":
        floats = weights(setting.reference.model)
        for name, w in weights(there.model).items():
            if isinstance(w.stored, Codes):
                w.store(floats[name].base().clone())
    Merge()(there)
    Freeze(scheme=W4, solver=solver, calibration=rows if solver == "gptq" else "none", samples=len(rows))(there)
    return there
