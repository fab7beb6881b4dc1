"""Recipes: a method is a list of steps, and a file can be one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from halfbyte import adapters
from halfbyte.errors import InputError
from halfbyte.folders import check_free, whole
from halfbyte.layers import weights
from halfbyte.qtensor import no_shift
from halfbyte.run import Run, load, to_scheme
from halfbyte.scheme import Mix, Scheme
from halfbyte.solvers import SOLVERS, solver
from halfbyte.steps import SHARES, STEPS, Adapt, Dequantize, Freeze, Grid, Merge, Step, Teacher, Train, checked, read


@dataclass(frozen=True)
class Given:
    """What a method is made from. to: its scheme. init: the solver that its codes begin from, if any. teacher: a MODEL
    that the loss holds it to, instead of what it was itself. train, adapt: settings of Train and of Adapt."""

    to: Any
    init: str | None
    teacher: str | None
    train: dict[str, Any]
    adapt: dict[str, Any]

    def taught(self, **how: bool) -> list[Step]:
        """What goes before the step that changes the weights, where the loss needs a teacher."""
        return [] if self.train.get("loss", "ce") == "ce" else [Teacher(model=self.teacher, **how)]

    def adapted(self) -> Adapt:
        """What has to be found on text for the adapter's start is found on what is trained on."""
        text = {k: self.train[k] for k in ("data", "max_length") if k in self.train}
        text = {"calibration" if k == "data" else k: v for k, v in text.items()}
        begins_on_text = adapters.start(self.adapt.get("init_lora_weights", True)).told == "moments"
        return Adapt(**{**(text if begins_on_text else {}), **self.adapt})

    def codes(self, learn: bool = False) -> Freeze:
        """By a solver, on what is trained on, if it needs text."""
        init = self.init or "rtn"
        length = self.train.get("max_length", Train.model_fields["max_length"].default)
        source = self.train.get("data") if solver(init).needs_data else "none"
        return Freeze(scheme=self.to, solver=init, calibration=source, max_length=length, learn=learn)

    def seen(self) -> Step:
        """Scales found anew from the weights at every step; or learned, from a solver's on."""
        return Grid(scheme=self.to) if self.init is None else self.codes(learn=True)


@dataclass(frozen=True)
class Method:
    """needs_scheme: whether it needs --to, which its result is stored in; its loss may then be what that changed.
    adapts: whether it takes Adapt's settings. begins: whether its codes can be a solver's."""

    steps: Callable[[Given], list[Step]]
    needs_scheme: bool = False
    adapts: bool = False
    begins: bool = False


QA_LORA = "uint4-g32-affine"  # the paper's: 4 bits in groups of 32, with zero points that are floats


def shifting(given: Any) -> Scheme | Mix:
    """A scheme whose zero points take in what QA-LoRA adds. Raises InputError for one that has none."""
    chosen = to_scheme(given)
    for rule in chosen.rules if isinstance(chosen, Scheme) else ():  # a mix's formats are known with the model
        if rule.weight is not None and (why := no_shift(rule.weight)) is not None:
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
        lambda g: [Dequantize(), *g.taught(keep=True), g.seen(), Train(**g.train), Freeze()],
        needs_scheme=True,
        begins=True,
    ),
    "qat-lora": Method(  # W0 may be held as codes; from a solver's codes it is merged, as no adapter's folder has these
        lambda g: [
            *([] if g.init is None else [Dequantize()]), *g.taught(keep=False, codes=True), g.seen(), g.adapted(),
            Train(**g.train), *([] if g.init is None else [Merge(), Freeze()]),
        ],
        needs_scheme=True,
        adapts=True,
        begins=True,
    ),
    "scales": Method(
        lambda g: [*g.taught(keep=False), g.codes(), Train(**g.train)],
        needs_scheme=True,
        begins=True,
    ),
}  # fmt: skip


def method_steps(
    method: str,
    to: Any,
    train: Mapping[str, Any],
    adapt: Mapping[str, Any] | None = None,
    init: str | None = None,
    teacher: str | None = None,
) -> list[Step]:
    """The steps of a method. `train` may hold Adapt's keys too (r, lora_alpha ...). Raises InputError."""
    if method not in METHODS:
        raise InputError(f"--method {method}: it is {', '.join(METHODS)}.")
    made = METHODS[method]
    if made.needs_scheme and to is None:
        raise InputError(f"--method {method} needs --to SCHEME: what the result will be stored in.")
    if to is not None and method in ("full", "lora"):
        name = to_scheme(to).name
        raise InputError(f"--method {method} takes no --to: it quantizes nothing. Train, then merge --to {name}.")
    if init is not None and not made.begins:
        takes = ", ".join(n for n, m in METHODS.items() if m.begins)
        raise InputError(f"--init {init}: codes to begin from are for --method {takes}.")
    if init is not None and init not in SOLVERS:
        raise InputError(f"--init {init}: there is no such solver; those are {', '.join(SOLVERS)}.")
    own = {k: v for k, v in train.items() if k in Train.model_fields}
    if init is not None and solver(init).needs_data and own.get("eval_split"):
        raise InputError(f"--init {init} --eval-split: the solver would see what is held out; give --eval-data FILE.")
    loss = own.get("loss", "ce")
    if loss not in ("ce", *SHARES):
        raise InputError(f"--loss {loss}: it is ce, {', '.join(SHARES)}.")
    if loss != "ce" and not made.needs_scheme:
        takes = ", ".join(n for n, m in METHODS.items() if m.needs_scheme)
        raise InputError(f"--loss {loss} holds a model to what it was before it was quantized: for --method {takes}.")
    if teacher is not None and loss == "ce":
        raise InputError(f"--teacher {teacher}: the loss asks no teacher; add --loss kl or --loss both.")
    if own.get("cache_teacher") and loss == "ce":
        raise InputError("--cache-teacher: the loss asks no teacher; add --loss kl or --loss both.")
    rest = {**{k: v for k, v in train.items() if k not in own}, **(adapt or {})}
    if rest and not made.adapts:
        raise InputError(f"method {method} does not take {', '.join(rest)}.")
    if rest.get("init_lora_weights") == "loftq" and method != "qlora":
        raise InputError(f"--init-lora-weights loftq makes good what --method qlora quantizes; {method} has floats.")
    return made.steps(Given(to, init, teacher, own, rest))


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


_FILES = ("data", "eval_data", "calibration")  # the fields of steps that name files to read
_NO_FILES = ("self", "none")


class _Fields(BaseModel):
    """A recipe's keys, before anything is made of them."""

    model_config = ConfigDict(extra="forbid")
    model: str
    output: str | None = None
    seed: int = 0
    dtype: str | None = None
    steps: list[Any] | None = None
    method: str | None = None
    to: Any = None
    train: dict[str, Any] = {}
    adapt: dict[str, Any] = {}
    init: str | None = None
    teacher: str | None = None


@dataclass
class Recipe:
    """model: a MODEL. output: the folder to write. steps: what is done, in order. seed, dtype: of the run."""

    model: str
    steps: list[Step]
    output: str | None = None
    seed: int = 0
    dtype: str | None = None

    def run(self, overwrite: bool = False, say: Callable[[str], None] = lambda line: None) -> Run:
        """Loads, takes every step, saves. Raises InputError before work begins for an output that exists, for data
        that cannot be read, and for a scheme that no folder holds."""
        files = [
            f
            for s in self.steps
            for k in _FILES
            if isinstance(f := getattr(s, k, None), str | Path) and f not in _NO_FILES
        ]
        if self.output is not None:
            check_free(Path(self.output), overwrite, self.model, *files)
        for file in files:
            read(file)
        run = load(self.model, self.dtype, seed=self.seed)
        made = next((s for s in reversed(self.steps) if isinstance(s, Freeze | Grid | Merge)), None)
        if self.output is not None and isinstance(made, Freeze | Grid) and made.scheme is not None:
            run.holds(to_scheme(made.scheme, made.group_size))
        if self.output is not None and _adapts_what_text_made(self.steps):
            raise InputError(
                "an adapter onto codes that calibration found needs these as its base: quantize to a folder, then "
                "adapt that folder."
            )
        for i, step in enumerate(self.steps):
            say(f"step {i + 1}/{len(self.steps)}: {type(step).__name__.lower()}")
            step(run)
        if self.output is not None:
            save(run, self.output, overwrite)
        return run


def _adapts_what_text_made(steps: list[Step]) -> bool:
    """Whether the result would be an adapter whose base, codes found on text, is nowhere on disk."""
    last = next((s for s in reversed(steps) if isinstance(s, Adapt | Merge)), None)
    if not isinstance(last, Adapt):
        return False
    before = [s for s in steps[: steps.index(last)] if isinstance(s, Freeze)]
    return bool(before) and (before[-1].calibration is not None or before[-1].imatrix is not None)


def read_recipe(path: str | Path) -> Recipe:
    """A recipe from a YAML file. Raises InputError that names the file and the key."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        raw = yaml.safe_load(text)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such recipe.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(e).split())[:200]}") from None
    return parse_recipe(raw, f"{path}: ")


def parse_recipe(raw: Any, where: str = "") -> Recipe:
    """A recipe from a mapping: model, output, seed, dtype, and either `steps` (a list of one-key mappings, step to
    its settings) or `method` with `to`, `train`, `adapt`, `init` and `teacher`. Raises InputError."""
    known = _Fields.model_fields
    if not isinstance(raw, Mapping) or "model" not in raw:
        raise InputError(f"{where}a recipe is a mapping with a model and steps, or a method.")
    if extra := [k for k in raw if k not in known]:
        raise InputError(f"{where}unknown key {extra[0]!r}; known are {', '.join(known)}.")
    if ("steps" in raw) == ("method" in raw):
        raise InputError(f"{where}a recipe has either steps or a method.")
    given: _Fields = _named(lambda: checked(lambda: _Fields(**raw)), where)
    if given.method is not None:
        to = None if given.to is None else _named(lambda: to_scheme(given.to), f"{where}to: ")
        steps = _named(
            lambda: method_steps(str(given.method), to, given.train, given.adapt, given.init, given.teacher), where
        )
    else:
        steps = [_step(item, f"{where}steps[{i}]: ") for i, item in enumerate(given.steps or [])]
    if not steps:
        raise InputError(f"{where}the recipe has no steps.")
    return Recipe(given.model, steps, given.output, given.seed, given.dtype)


def _named(make: Callable[[], Any], where: str) -> Any:
    """Calls `make`; a complaint then says where it belongs."""
    try:
        return make()
    except InputError as e:
        raise InputError(f"{where}{e}") from None


def _step(item: Any, where: str) -> Step:
    if isinstance(item, str):
        item = {item: {}}
    if not isinstance(item, Mapping) or len(item) != 1:
        raise InputError(f"{where}a step is a name, or one name with its settings.")
    ((name, settings),) = item.items()
    if name not in STEPS:
        raise InputError(f"{where}there is no step {name!r}; those are {', '.join(STEPS)}.")
    if not isinstance(settings, Mapping | None):
        raise InputError(f"{where}the settings of {name} are a mapping, not {settings!r}.")
    return _named(lambda: STEPS[name](**(settings or {})), f"{where}{name}: ")


def save(run: Run, folder: str | Path, overwrite: bool = False) -> Path:
    """Writes a run's result as a folder that appears whole or not at all. Raises InputError if it exists."""
    target = Path(folder)
    with whole(target, overwrite) as partial:
        run.write(partial, target.name)
    return target
