"""Recipes: a method is a list of steps (methods.py), and a file can be one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from halfbyte.errors import InputError
from halfbyte.folders import check_free
from halfbyte.methods import check_learned, method_steps
from halfbyte.outputs import check, save
from halfbyte.run import Run, load
from halfbyte.scheme import to_scheme
from halfbyte.steps import STEPS, Adapt, Freeze, Merge, Step, checked, read

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
    transforms: list[str] = []
    untie: bool = False


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
        check_learned(run, self.steps, say)
        if self.output is not None:
            check(run, self.steps, Path(self.output), say)
        if self.output is not None and _adapts_what_text_made(self.steps):
            raise InputError(
                "an adapter onto codes that calibration found needs these as its base: quantize to a folder, then "
                "adapt that folder."
            )
        for i, step in enumerate(self.steps):
            say(f"step {i + 1}/{len(self.steps)}: {type(step).__name__.lower()}")
            step(run)
        if self.output is not None:
            save(run, self.output, overwrite, say)
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
    its settings) or `method` with `to`, `train`, `adapt`, `init`, `teacher`, `transforms` and `untie`. Raises
    InputError."""
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
            lambda: method_steps(
                str(given.method), to, given.train, given.adapt, given.init, given.teacher, given.transforms,
                given.untie,
            ),
            where,
        )  # fmt: skip
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
