"""Methods: a name for a list of steps, and what goes with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from halfbyte import adapters
from halfbyte.errors import InputError
from halfbyte.formats import parse
from halfbyte.layers import weights
from halfbyte.plan import plan
from halfbyte.qtensor import no_shift
from halfbyte.run import Run
from halfbyte.scheme import Mix, Scheme, to_scheme
from halfbyte.solvers import SOLVERS, solver
from halfbyte.steps import SHARES, Adapt, Dequantize, Freeze, Grid, Merge, Step, Teacher, Train, Transform
from halfbyte.transforms import check_untie, transform
from halfbyte.weight import check_learnable, learnable


@dataclass(frozen=True)
class Given:
    """What a method is made from. to: its scheme. init: the solver that its codes begin from, if any. teacher: a MODEL
    that the loss holds it to, instead of what it was itself. transforms, untie: what is done to the floats before, and
    whether that may give the head a weight of its own. train, adapt: settings of Train and of Adapt."""

    to: Any
    init: str | None
    teacher: str | None
    transforms: Sequence[str]
    untie: bool
    train: dict[str, Any]
    adapt: dict[str, Any]

    @property
    def text(self) -> dict[str, Any]:
        """What is trained on, for what has to be found on text before."""
        length = self.train.get("max_length", Train.model_fields["max_length"].default)
        return {"calibration": self.train.get("data"), "max_length": length}

    def begun(self, keep: bool, codes: bool = False) -> list[Step]:
        """What goes before the step that makes a grid or codes: the teacher, as the model is, where the loss needs one,
        then transforms. keep, codes: see Teacher."""
        before: list[Step] = [
            Transform(name=name, scheme=self.to, untie=self.untie, **self.text) for name in self.transforms
        ]
        if self.train.get("loss", "ce") == "ce":
            return before
        return [Teacher(model=self.teacher, keep=keep or bool(before), codes=codes), *before]

    def adapted(self) -> Adapt:
        begins_on_text = adapters.start(self.adapt.get("init_lora_weights", True)).told == "moments"
        return Adapt(**{**(self.text if begins_on_text else {}), **self.adapt})

    def codes(self, learn: bool = False) -> Freeze:
        """By a solver, on what is trained on, if it needs text."""
        init = self.init or "rtn"
        text = self.text if solver(init).needs_data else {**self.text, "calibration": "none"}
        return Freeze(scheme=self.to, solver=init, learn=learn, **text)

    def seen(self) -> Step:
        """A grid over the weights, of which nothing can be dropped. Its scales are found anew from them at every step,
        or are learned, from a solver's on."""
        if self.adapt.get("lora_dropout"):
            raise InputError("--lora-dropout: through a grid W0 + s B A is seen whole; leave it out.")
        return Grid(scheme=self.to) if self.init is None else self.codes(learn=True)


@dataclass(frozen=True)
class Method:
    """needs_scheme: whether it needs --to, which its result is stored in; its loss may then be what that changed.
    adapts: whether it takes Adapt's settings. begins: whether its codes can be a solver's. norms: whether norms can be
    trained too."""

    steps: Callable[[Given], list[Step]]
    needs_scheme: bool = False
    adapts: bool = False
    begins: bool = False
    norms: bool = False


QA_LORA = "uint4-g32-affine"  # the paper's: 4 bits in groups of 32, with zero points that are floats


def shifting(given: Any) -> Scheme | Mix:
    """A scheme whose zero points take in what QA-LoRA adds. Raises InputError for one that has none."""
    chosen = to_scheme(given)
    if isinstance(chosen, Mix):
        formats = [parse(f) for f in (chosen.base, *(better for *_, better in chosen.better))]
    else:
        formats = [rule.weight for rule in chosen.rules if rule.weight is not None]
    if (why := next((w for f in formats if (w := no_shift(f)) is not None), None)) is not None:
        raise InputError(f"--method qa-lora --to {chosen.name}: {why}.")
    return chosen


METHODS: dict[str, Method] = {
    "full": Method(lambda g: [Dequantize(), Train(**g.train)]),
    "lora": Method(lambda g: [g.adapted(), Train(**g.train)], adapts=True),
    "qlora": Method(  # onto codes that are there already, or NF4; by rounding: an adapter's folder holds no codes
        lambda g: [
            Freeze(scheme=g.to or "NF4", keep=g.to is None, calibration="none"), g.adapted(), Train(**g.train),
        ],
        adapts=True,
    ),
    "qa-lora": Method(  # onto asymmetric codes, whose zero points take in what is learned when it is merged
        lambda g: [
            Freeze(scheme=shifting(g.to or QA_LORA), keep=g.to is None, calibration="none"),
            Adapt(**{**g.adapt, "use_qalora": True}), Train(**g.train),
        ],
        adapts=True,
    ),
    "qat": Method(
        lambda g: [Dequantize(), *g.begun(keep=True), g.seen(), Train(**g.train), Freeze()],
        needs_scheme=True,
        begins=True,
    ),
    "qat-lora": Method(  # W0 may be held as codes; from a solver's codes it is merged, as no adapter's folder has these
        lambda g: [
            *([] if g.init is None else [Dequantize()]), *g.begun(keep="modules_to_save" in g.adapt, codes=True),
            g.seen(), g.adapted(), Train(**g.train), *([] if g.init is None else [Merge(), Freeze()]),
        ],
        needs_scheme=True,
        adapts=True,
        begins=True,
    ),
    "scales": Method(
        lambda g: [*g.begun(keep=bool(g.train.get("norms"))), g.codes(), Train(**g.train)],
        needs_scheme=True,
        begins=True,
        norms=True,
    ),
}  # fmt: skip


def method_steps(
    method: str,
    to: Any,
    train: Mapping[str, Any],
    adapt: Mapping[str, Any] | None = None,
    init: str | None = None,
    teacher: str | None = None,
    transforms: Sequence[str] = (),
    untie: bool = False,
) -> list[Step]:
    """The steps of a method. `train` may hold Adapt's keys too (r, lora_alpha ...). transforms: those that are done to
    the floats first, in order; untie: whether they may give the head a weight of its own. Raises InputError for what
    does not go together, before anything is read."""
    if method not in METHODS:
        raise InputError(f"--method {method}: it is {', '.join(METHODS)}.")
    made = METHODS[method]
    own = {k: v for k, v in train.items() if k in Train.model_fields}
    rest = {**{k: v for k, v in train.items() if k not in own}, **(adapt or {})}
    if made.needs_scheme and to is None:
        raise InputError(f"--method {method} needs --to SCHEME: what the result will be stored in.")
    if to is not None and method in ("full", "lora"):
        name = to_scheme(to).name
        raise InputError(f"--method {method} takes no --to: it quantizes nothing. Train, then merge --to {name}.")
    if rest and not made.adapts:
        named = ", ".join("adapter" if k == "path" else k for k in rest)
        raise InputError(f"--method {method} has no adapter, and does not take {named}.")
    if own.get("norms") and not made.norms:
        takes = ", ".join(n for n, m in METHODS.items() if m.norms)
        raise InputError(f"--norms: norms are trained beside scales, by --method {takes}; {method} does not.")
    if rest.get("init_lora_weights") == "loftq" and method != "qlora":
        raise InputError(f"--init-lora-weights loftq makes good what --method qlora quantizes; {method} has floats.")
    _check_init(method, made, init)
    _check_transforms(method, made, init, transforms, untie)
    _check_loss(method, made, own.get("loss", "ce"), teacher)
    reader = _reads_text(init, transforms, rest)
    if reader is not None and own.get("eval_split"):
        raise InputError(f"{reader} --eval-split: it would see what is held out; give --eval-data FILE.")
    steps = made.steps(Given(to, init, teacher, transforms, untie, own, rest))
    if own.get("fake_quant_after_n_steps") and not any(_sees(s) for s in steps):
        raise InputError("--fake-quant-after-n-steps: nothing is seen through a grid here; leave it out.")
    return steps


def _check_init(method: str, made: Method, init: str | None) -> None:
    if init is None:
        return
    if not made.begins:
        takes = ", ".join(n for n, m in METHODS.items() if m.begins)
        raise InputError(f"--init {init}: codes to begin from are for --method {takes}.")
    if init not in SOLVERS:
        raise InputError(f"--init {init}: there is no such solver; those are {', '.join(SOLVERS)}.")


def _check_transforms(method: str, made: Method, init: str | None, names: Sequence[str], untie: bool) -> None:
    """A transform changes all weights, so that no adapter's folder would fit the model that it was trained on."""
    check_untie(untie, names)
    for name in names:
        transform(name)
        if not made.begins:
            takes = ", ".join(n for n, m in METHODS.items() if m.begins)
            raise InputError(f"--transform {name} makes a model ready for its codes: for --method {takes}.")
        if made.adapts and init is None:
            raise InputError(
                f"--transform {name} changes the base of the adapter: add --init SOLVER, by which it is merged."
            )


def _check_loss(method: str, made: Method, loss: str, teacher: str | None) -> None:
    if loss not in ("ce", *SHARES):
        raise InputError(f"--loss {loss}: it is ce, {', '.join(SHARES)}.")
    if loss != "ce" and not made.needs_scheme:
        takes = ", ".join(n for n, m in METHODS.items() if m.needs_scheme)
        raise InputError(f"--loss {loss} holds a model to what it was before it was quantized: for --method {takes}.")
    if teacher is not None and loss == "ce":
        raise InputError(f"--teacher {teacher}: the loss asks no teacher; add --loss kl or --loss both.")


def _reads_text(init: str | None, transforms: Sequence[str], adapt: Mapping[str, Any]) -> str | None:
    """The flag that has something found on the training text before it is trained on."""
    if init is not None and solver(init).needs_data:
        return f"--init {init}"
    if (name := next((n for n in transforms if transform(n).needs_data), None)) is not None:
        return f"--transform {name}"
    begins = adapt.get("init_lora_weights", True)
    return f"--init-lora-weights {begins}" if adapters.start(begins).told == "moments" else None


def check_learned(run: Run, steps: Sequence[Step], say: Callable[[str], None] = lambda line: None) -> None:
    """Of weights whose scales are codes themselves: says that these stay as they are found where others' are learned.
    Raises InputError, before a solver has worked, where scales alone would be trained and there are no others."""
    before = list(takewhile(lambda s: not isinstance(s, Train), steps))
    made = next((s for s in reversed(before) if isinstance(s, Freeze) and s.scheme is not None), None)
    tuned = made is not None and not made.learn and not any(isinstance(s, Grid | Adapt) for s in before)
    if made is None or len(before) == len(steps) or not (tuned or made.learn):
        return
    chosen = to_scheme(made.scheme, made.group_size)
    formats = [e.after for e in plan(run.model, chosen) if e.after is not None and not e.tied_to]
    stay = [f for f in formats if not learnable(f)]
    if tuned and stay and len(stay) == len(formats):
        check_learnable(stay[0])
    if stay:
        named = ", ".join(sorted({f.name for f in stay}))
        say(f"note: the scales of {len(stay)} weights ({named}) are codes themselves: they stay as they are found")


def _sees(step: Step) -> bool:
    """Whether weights are seen through a grid from a step on."""
    return isinstance(step, Grid) or (isinstance(step, Freeze) and step.learn)


def merge_steps(
    run: Run, to: Any = None, base: str = "trained", group_size: int | None = None, model: str | None = None,
    **settings: Any,
) -> list[Step]:  # fmt: skip
    """Merge, into `base` and `model` as that step says, then what makes codes: the scheme given, with further settings
    of Freeze, or the grid that the run was trained through."""
    gridded = any(w.grid is not None for w in weights(run.model).values())
    if to is None:
        return [Merge(base=base, model=model), *([Freeze()] if gridded else [])]
    freeze = Freeze(scheme=to, group_size=group_size, **settings)
    for w in weights(run.model).values():
        w.grid = None
    return [Merge(base=base, model=model), freeze]
