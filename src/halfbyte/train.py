"""The training loop: the only one. What is trained is what requires a gradient; the methods decide that before."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfbyte import distill
from halfbyte.data import Batch
from halfbyte.errors import Diverged, InputError


@dataclass(frozen=True)
class TrainingArguments:
    """TRL's and transformers' keys. lr_scheduler_type: "cosine", "linear" or "constant", after the warm-up."""

    steps: int
    learning_rate: float
    gradient_accumulation_steps: int = 1
    lr_scheduler_type: str = "cosine"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    adam_beta2: float = 0.999
    gradient_checkpointing: bool = False
    eval_steps: int = 0
    save_steps: int = 0

    def __post_init__(self) -> None:
        if self.lr_scheduler_type not in _SCHEDULES:
            raise InputError(f"--lr-scheduler-type {self.lr_scheduler_type}: it is {', '.join(_SCHEDULES)}.")
        for name in ("steps", "learning_rate", "gradient_accumulation_steps"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name.replace('_', ' ')} must be above 0, not {getattr(self, name)}.")

    def rate(self, step: int) -> float:
        """The learning rate of a step (from 0)."""
        warm = max(1, round(self.steps * self.warmup_ratio))
        if step < warm:
            return self.learning_rate * (step + 1) / (warm + 1)
        return self.learning_rate * _SCHEDULES[self.lr_scheduler_type]((step - warm) / max(1, self.steps - warm))


_SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "linear": lambda t: 1 - t,
    "constant": lambda t: 1.0,
}


@dataclass
class Log:
    """What happened, step by step: `curve` rows have step, loss, learning_rate, grad_norm, tokens_per_second,
    and eval_loss where it was measured."""

    curve: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    trainable: int = 0
    peak_memory: int = 0

    def summary(self) -> dict[str, Any]:
        """The figures that `train --json` prints; speed is the median over the steps after the first."""
        speeds = [row["tokens_per_second"] for row in self.curve]
        return {
            "steps": len(self.curve),
            "loss": self.curve[-1]["loss"] if self.curve else None,
            "tokens_per_second": round(median(speeds[1:] or speeds or [0.0]), 1),
            "seconds": round(self.seconds, 2),
            "trainable": self.trainable,
            "peak_memory": self.peak_memory,
        }


@dataclass
class State:
    """What a training goes on from. curve: the rows of the steps taken. tensors: of Masters. rng: torch's, after
    the last step."""

    curve: list[dict[str, float]]
    tensors: dict[str, Tensor]
    rng: Tensor


@dataclass(frozen=True)
class Pace:
    """How a parameter is trained. ratio: its learning rate over that of the step. decays: with args.weight_decay."""

    ratio: float = 1.0
    decays: bool = True


def matrices_decay(name: str, p: nn.Parameter) -> Pace:
    """All alike; norms and biases do not decay."""
    return Pace(decays=p.ndim > 1)


class Masters:
    """AdamW over float32 copies of parameters that are held in 16 bit, where small updates would round away."""

    def __init__(self, parameters: dict[str, nn.Parameter], args: TrainingArguments, pace: PaceOf) -> None:
        self.parameters = list(parameters.values())
        self.masters = [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in self.parameters]
        groups: dict[Pace, list[nn.Parameter]] = {}
        for (name, p), m in zip(parameters.items(), self.masters, strict=True):
            groups.setdefault(pace(name, p), []).append(m)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": ms, "ratio": of.ratio, "weight_decay": args.weight_decay if of.decays else 0.0}
                for of, ms in groups.items()
            ],
            lr=args.learning_rate,
            betas=(0.9, args.adam_beta2),
        )

    def step(self, rate: float, max_norm: float) -> float:
        """Clips, moves the masters by one step, rounds them into the model. Gives back the gradient's norm.
        Raises Diverged if the gradient is not finite."""
        for p, m in zip(self.parameters, self.masters, strict=True):
            if m is not p:
                m.grad = None if p.grad is None else p.grad.float()
        norm = float(nn.utils.clip_grad_norm_(self.masters, max_norm))
        if not math.isfinite(norm):
            raise Diverged("the gradient is not finite: the learning rate is too high for this model and data.")
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["ratio"]
        self.optimizer.step()
        with torch.no_grad():
            for p, m in zip(self.parameters, self.masters, strict=True):
                if m is not p:
                    p.copy_(m)
                p.grad = m.grad = None
        return norm

    def state_dict(self) -> dict[str, Tensor]:
        """Masters and AdamW's moments, by place: "3.master", "3.exp_avg" ..."""
        out: dict[str, Tensor] = {}
        for i, m in enumerate(self.masters):
            out[f"{i}.master"] = m.detach().clone()
            out |= {f"{i}.{k}": torch.as_tensor(v).clone() for k, v in self.optimizer.state[m].items()}
        return out

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises InputError if the state is of other parameters."""
        for i, (p, m) in enumerate(zip(self.parameters, self.masters, strict=True)):
            saved = state.get(f"{i}.master")
            if saved is None or saved.shape != m.shape:
                raise InputError("the saved training state is of another model or method.")
            m.copy_(saved)
            p.copy_(saved)
            moments = {k.partition(".")[2]: v for k, v in state.items() if k.startswith(f"{i}.")}
            moments.pop("master")
            self.optimizer.state[m] = moments


PaceOf = Callable[[str, nn.Parameter], Pace]
LossOf = Callable[[nn.Module, Batch], Tensor]  # of a batch the sum over its targets


def loss_sum(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy summed over the batch's targets, in float32; the logits of other positions are not kept."""
    logits, labels = distill.targets(model, batch)
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def train(
    model: nn.Module,
    stream: Iterator[Batch],
    args: TrainingArguments,
    *,
    loss_of: LossOf = loss_sum,
    pace: PaceOf = matrices_decay,
    begun: State | None = None,
    on_step: Callable[[dict[str, float]], None] = lambda row: None,
    evaluate: Callable[[], float] | None = None,
    save: Callable[[State], None] | None = None,
) -> Log:
    """Trains what requires a gradient, on `args.steps` steps of batches from an endless stream, in place.

    A step's loss is the mean over the targets of all its accumulated batches, each target counting the same.
    loss_of: what is made small: of a batch the sum over its targets; a loss of one's own may take batches of any kind
    that tell their number of `targets` and of `tokens`. pace: of a parameter by name. begun: where an interrupted run
    goes on; the stream must start there too. on_step sees each row of the curve; evaluate gives a held-out loss every
    `eval_steps`; save gets the state every `save_steps`.
    Raises InputError if nothing is trainable, Diverged if the loss or gradient is not finite.
    """
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise InputError("nothing is trainable in this model: add an adapter or choose another --method.")
    masters = Masters(parameters, args, pace)
    log = Log(trainable=sum(p.numel() for p in parameters.values()))
    if begun is not None:
        masters.load_state_dict(begun.tensors)
        log.curve += begun.curve
        torch.set_rng_state(begun.rng)
    process, began = psutil.Process(), time.perf_counter()
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()  # pyright: ignore[reportCallIssue]
    model.train()
    for step in range(len(log.curve), args.steps):
        begin = time.perf_counter()
        batches = [next(stream) for _ in range(args.gradient_accumulation_steps)]
        targets = sum(b.targets for b in batches)
        loss = 0.0
        for batch in batches:
            part = loss_of(model, batch) / targets
            part.backward()
            loss += part.item()
        if not math.isfinite(loss):
            raise Diverged(f"the loss is {loss} at step {step + 1}: the learning rate is too high, or the data broken.")
        rate = args.rate(step)
        norm = masters.step(rate, args.max_grad_norm)
        row = {"step": step + 1, "loss": loss, "learning_rate": rate, "grad_norm": norm}
        row["tokens_per_second"] = sum(b.tokens for b in batches) / (time.perf_counter() - begin)
        log.peak_memory = max(log.peak_memory, process.memory_info().rss)
        if evaluate and args.eval_steps and ((step + 1) % args.eval_steps == 0 or step + 1 == args.steps):
            model.eval()
            row["eval_loss"] = evaluate()
            model.train()
        log.curve.append(row)
        on_step(row)
        if save and args.save_steps and (step + 1) % args.save_steps == 0 and step + 1 < args.steps:
            save(State([*log.curve], masters.state_dict(), torch.get_rng_state()))
    model.eval()
    log.seconds = time.perf_counter() - began
    return log
