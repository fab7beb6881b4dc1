"""A run: a model with what was done to it so far, read from any MODEL and written as a folder."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from halfbyte import adapters, calibrate, data, evaluate, models, observe
from halfbyte.card import write_card
from halfbyte.containers import container_for, peft
from halfbyte.containers.delta import files_of, weight_files
from halfbyte.containers.shards import read_json, sha256_of
from halfbyte.errors import InputError
from halfbyte.folders import beside
from halfbyte.formats import Format
from halfbyte.layers import Codes, Embedding, Grid, Linear, Op, ops, weights
from halfbyte.models import Loaded
from halfbyte.plan import inventory, plan, totals
from halfbyte.scheme import Mix, Scheme, custom, scheme, static
from halfbyte.solvers import Solver, solver
from halfbyte.train import Log

NOTES, MASTERS = "halfbyte.json", "masters"
DTYPES = {"float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
          "float16": torch.float16, "fp16": torch.float16}  # fmt: skip


@dataclass
class Run:
    """loaded: the model and what belongs to it. notes: what was done, kept as halfbyte.json beside the result.
    log: of the last training. rows: the ledger so far, (stage, figures). files: what it was read from.
    checkpoint: the folder where training, or quantizing, keeps its state, and goes on from what is there. from_disk:
    whether weights are read when they are needed. masters: floats that were trained and then made codes. teacher: a
    model whose predictions training may be held to. waiting: notes and files of adapters that are not in use, by
    name."""

    loaded: Loaded
    seed: int = 0
    notes: dict[str, Any] = field(default_factory=dict)
    log: Log | None = None
    files: list[Path] = field(default_factory=list)
    checkpoint: Path | None = None
    from_disk: bool = False
    masters: dict[str, Tensor] = field(default_factory=dict)
    teacher: Any = field(default=None, repr=False)
    waiting: dict[str, tuple[dict[str, Any], list[Path]]] = field(default_factory=dict)
    rows: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    @property
    def model(self) -> Any:
        """A plain nn.Module: generate(), other trainers, torch.compile take it."""
        return self.loaded.model

    def read_weights(self) -> None:
        """Reads what is still on disk."""
        if self.from_disk and self.loaded.checkpoint is not None:
            self.loaded.checkpoint.materialize(self.model, self.loaded.config.dtype)

    @property
    def tokenizer(self) -> Any:
        return self.loaded.tokenizer

    @property
    def needs_tokenizer(self) -> Any:
        """The tokenizer. Raises InputError if the model came without one."""
        if self.tokenizer is None:
            raise InputError(f"{self.loaded.source} has no tokenizer, and text needs one.")
        return self.tokenizer

    @property
    def labels(self) -> list[str]:
        """A classifier's labels, by class id."""
        config = self.model.config
        return [config.id2label[i] for i in range(config.num_labels)]

    @property
    def causal(self) -> bool:
        return not type(self.model).__name__.endswith("ForSequenceClassification")

    def write(self, folder: Path, name: str) -> None:
        """The result, into an existing folder that will be called `name`: an adapter folder as PEFT's while
        adapters are unmerged, else a model folder; with notes, ledger and model card. Raises InputError."""
        self.notes.pop("peft", None)
        if adapters.attached(self.model):
            self._write_adapter(folder)
        else:
            if any(w.grid is not None for w in weights(self.model).values()):
                raise InputError("the weights are still seen through a grid: freeze them before saving.")
            models.save(self.loaded, folder)
            self._note_original()
        if self.masters:
            (folder / MASTERS).mkdir(exist_ok=True)
            save_file(self.masters, str(folder / MASTERS / "masters.safetensors"))
        self.describe(folder, name)

    def _note_original(self) -> None:
        """Notes what codes were made from, where nothing else was done to the weights."""
        since = {"trained", "transforms", "merged", "dequantized", "kept_codes"}
        if self.notes.get("stored") and not self.notes.keys() & since:
            source = self.loaded.source
            named = os.path.abspath(source) if Path(source).exists() else source
            self.notes["original"] = {"model": named, "sha256": self.loaded.sha256 or models.sha256(self.loaded.path)}

    def describe(self, folder: Path, name: str) -> None:
        """Notes, with the weights' hash, ledger and model card beside a result that is written; anew, where there are
        some already."""
        weights = weight_files(files_of(folder)).values()
        (folder / NOTES).write_text(json.dumps({**self.notes, "sha256": sha256_of(weights)}, indent=1) + "\n")
        size = disk_bytes(folder)
        (folder / evaluate.LEDGER).unlink(missing_ok=True)
        for stage, row in self.rows:
            evaluate.write_ledger(folder, stage, {**row, "bytes": row.get("bytes") or size})
        write_card(folder, name, self.loaded, self.notes, self.rows)

    def _write_adapter(self, folder: Path) -> None:
        found, parameters = adapters.join(self.model, adapters.attached(self.model))
        settings = {**adapters.settings(found), "target_parameters": parameters or None}
        if self.notes.get("calibrated"):
            raise InputError(
                "the adapter's base are codes that calibration found: save them as a model before adapting."
            )
        if settings.get("peft_type") != "LORA":
            raise InputError("this adapter has no folder layout that others read; merge it before saving.")
        linear = [n for n, op in ops(self.model) if isinstance(op, Linear | Embedding)]
        turned = any(op.transposed for n, op in ops(self.model) if n in found)
        states = {n: a.state() for n, a in found.items()}
        base = self.loaded.source
        if Path(base).exists():
            base = os.path.abspath(base)
        saved = adapters.whole.state(self.model)
        settings |= {"modules_to_save": list(adapters.whole.kept(self.model)) or None}
        peft.write(folder, states, settings, base, linear, fan_in_fan_out=turned, saved=saved)
        if apart := adapters.apart(self.model, found):
            self.notes["peft"] = (
                f"PEFT may not load this folder, which halfbyte does: {apart[0]} is an adapter of a single expert, and "
                "PEFT has one for all, of one rank, without DoRA, QA-LoRA and dropout."
            )
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        if getattr(self.model, "generation_config", None) is not None:
            self.model.generation_config.save_pretrained(folder)

    def holds(self, chosen: Scheme | Mix) -> None:
        """Raises InputError now, rather than when saving, if no folder layout holds what the scheme makes."""
        if isinstance(chosen, Mix):
            raise InputError(
                f"{chosen.name} is a mix of ggml's blocks, which only a file holds: name the output OUT.gguf."
            )
        entries = [e for e in plan(self.model, chosen) if e.after is not None]
        sites = {e.name: (e.after, e.role) for e in entries if e.after is not None}
        if sites:
            container_for(sites, models.own_container(self.loaded), any(e.input for e in entries))

    def holds_as_it_is(self) -> bool:
        """Whether a folder layout holds the codes that the model has."""
        role = models.roles(self.model)
        sites = {
            n: (op.weight.stored.q.format, role[n]) for n, op in ops(self.model) if isinstance(op.weight.stored, Codes)
        }
        try:
            return not sites or bool(container_for(sites, models.own_container(self.loaded)))
        except InputError:
            return False

    def bits_per_weight(self) -> float:
        """Bits that the whole model takes in memory for each of its parameters."""
        n, size, _ = totals(inventory(self.model))
        return 8 * size / n


def disk_bytes(path: Path) -> int:
    """Bytes of the weight files of a folder, or of a file and what lies beside it."""
    if path.is_file():
        return path.stat().st_size + (beside(path).stat().st_size if beside(path).is_file() else 0)
    return sum(f.stat().st_size for f in path.iterdir() if f.suffix in (".safetensors", ".gguf"))


def parse_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """Raises InputError for a dtype that is not one to compute in."""
    if name is None or isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise InputError(f"--dtype {name}: it is float32, bfloat16 or float16.")
    return DTYPES[name]


def load(
    source: str | Path,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    seed: int = 0,
    labels: list[str] | None = None,
    weights: bool = True,
    base: str | None = None,
) -> Run:
    """Reads any MODEL: a Hugging Face folder or hub id, a .gguf file, a PEFT adapter folder, or a folder that
    halfbyte wrote. weights=False leaves on disk what can be read a block at a time; an adapter and its base cannot.

    An adapter's base is read too, checked against the hash that halfbyte recorded, and brought into the form
    that the adapter was trained on (4-bit codes, a grid). base: the MODEL where that is, if not where the adapter's
    folder says. labels: see halfbyte.models.load. Raises InputError.
    """
    torch.manual_seed(seed)
    path = models.resolve(source, revision)
    if path.is_dir() and (path / peft.CONFIG).exists():
        return _load_adapter(path, parse_dtype(dtype), seed, base)
    if base is not None:
        raise InputError(f"--base-model {base}: {source} is no adapter folder, and has no base.")
    loaded = models.load(source, parse_dtype(dtype), revision, labels, weights)
    return Run(loaded, seed, files=[path], from_disk=not weights and loaded.checkpoint is not None)


def _load_adapter(path: Path, dtype: torch.dtype | None, seed: int, given: str | None = None) -> Run:
    named, *_ = peft.read(path)
    base = given or named
    if Path(base).is_absolute() and not Path(base).exists():
        beside = path.absolute().parent / Path(base).name  # moved together, as a demo's or a project's folder is
        if not beside.exists():
            raise InputError(f"{path}: its base model is no longer at {base}; put it back, or correct {peft.CONFIG}.")
        base = str(beside)
    notes = notes_of(path)
    run = Run(models.load(base, parse_dtype(notes.get("dtype")) or dtype), seed)
    check_base(run, path)
    bring(run, notes)
    if dtype is not None:  # not before: the codes that it was trained on have scales in the dtype of then
        _cast(run, dtype)
    attach_from(run, path)
    run.notes = {k: v for k, v in notes.items() if k != "sha256"}  # of that folder, not of what is made of it
    return run


@torch.no_grad()
def _cast(run: Run, dtype: torch.dtype) -> None:
    """Computes in another dtype; codes and scales stay."""
    for w in weights(run.model).values():
        if isinstance(w.stored, Codes):
            w.store(replace(w.stored.q, dtype=dtype))
    for p in run.model.parameters():  # not model.to(dtype), which would round the rotary frequencies too
        p.data = p.data.to(dtype)
    run.loaded.config.dtype = dtype


def notes_of(path: Path) -> dict[str, Any]:
    """The notes beside a result; none beside what others wrote. Raises InputError for a broken file."""
    return read_json(path / NOTES) if (path / NOTES).exists() else {}


def bring(run: Run, notes: Mapping[str, Any]) -> None:
    """The base into the form that an adapter of these notes was trained on."""
    if notes.get("dequantized"):
        dequantize(run)
    if notes.get("stored"):
        keep = bool(notes.get("kept_codes"))
        freeze(run, to_scheme(notes["stored"]), solver(notes.get("solver", "rtn")), keep=keep)
    if notes.get("grid"):
        see_through(run, to_scheme(notes["grid"]), notes.get("grid_search", "minmax"))


def check_base(run: Run, path: Path) -> None:
    """Raises InputError if an adapter was trained on other weights, by the hash that halfbyte recorded."""
    wanted, here = notes_of(path).get("base_sha256"), run.loaded.sha256
    if wanted and wanted != here:
        raise InputError(
            f"{path}: this adapter was trained on other weights than those now at {run.loaded.source} "
            f"(sha256 {wanted[:12]}..., found {here[:12]}...)."
        )


def attach_from(run: Run, path: Path, called: str = adapters.NAME) -> None:
    """Attaches the LoRA of a PEFT folder. Raises InputError if it was trained on other weights (by the hash that
    halfbyte recorded), or the model lacks one of its layers, or a shape differs."""
    _, settings, states, saved = peft.read(path)
    check_base(run, path)
    try:
        adapters.check(settings)
        states, settings = adapters.split(run.model, states, settings)
        adapters.check_folder(run.model, settings, states, saved)
        if whole := settings.get("modules_to_save"):
            adapters.whole.keep(run.model, whole)
            adapters.whole.load(run.model, saved, "modules_to_save")
        own = {k: v for k, v in settings.items() if k != "modules_to_save"}
        adapters.fill(adapters.attach(run.model, list(states), "lora", called, **own), states, called)
    except InputError as e:
        raise InputError(f"{path}: {e}") from None
    run.model.eval()
    run.files = [run.loaded.path, path]
    run.notes = {**run.notes, "adapter": {"adapter": "lora", **settings}}


def see_through(run: Run, chosen: Scheme | Mix, how: str | None = None) -> None:
    """Gives every weight that the scheme quantizes a grid, and its op the input format."""
    by_name = dict(ops(run.model))
    for e in plan(run.model, chosen):
        if e.after is not None:
            op = by_name[e.name.removesuffix(".weight")]
            op.weight.grid = Grid(e.after, how)
            _set_input(op, e.input)
    run.notes |= {"grid": chosen.notation(), "grid_search": how}


@torch.no_grad()
def freeze(
    run: Run, chosen: Scheme | Mix, by: Solver, batches: list[data.Batch] | None = None,
    on_block: Callable[[int, int], None] = lambda done, total: None, keep: bool = False, inputs: str = "mse",
    squares: Mapping[str, Tensor] | None = None, on_batch: Callable[[int, int], None] = lambda done, total: None,
    store: calibrate.Store = calibrate.IN_MEMORY,
) -> None:  # fmt: skip
    """Makes codes of every weight that the scheme quantizes, but of those that are such codes already; with `keep`, of
    none that are codes. inputs: how observe finds the scales of inputs, where the scheme has static ones; it does so
    once all weights are codes. squares, store: see calibrate.freeze. Raises InputError before any is touched if one
    cannot be; where weights are on disk, when it is read."""
    check_static(chosen, batches)
    by_name = dict(ops(run.model))
    formats, observed = {}, {}
    held = {n: w.stored.q.format for n, op in by_name.items() if isinstance((w := op.weight).stored, Codes)}
    if keep and held:
        run.notes["kept_codes"] = len({id(by_name[n].weight) for n in held})
    for e in plan(run.model, chosen):
        name = e.name.removesuffix(".weight")
        if e.after is None or e.tied_to or (keep and name in held):
            continue
        if held.get(name) != e.after:
            if by_name[name].weight.device.type != "meta":
                calibrate.finite(name, by_name[name], e.after)
            formats[name] = e.after
        _set_input(by_name[name], None if static(e.input) else e.input)
        if static(e.input) and isinstance(by_name[name], Linear):
            observed[name] = e.input
    calibrate.freeze(run.model, formats, by, batches, on_block, squares, store)
    run.notes |= {"stored": chosen.notation(), "solver": by.name, "calibrated": bool(batches or squares)}
    if observed and batches:
        run.read_weights()
        observe.observe(run.model, observed, batches, inputs, on_batch)
        run.notes["input_search"] = inputs


def sharing(run: Run) -> Run:
    """A run whose floats are the same tensors, so that its codes are all that it adds."""
    same: dict[int, Any] = {id(p): p for p in run.model.parameters()}
    loaded = replace(run.loaded, model=copy.deepcopy(run.model, same))
    return replace(run, loaded=loaded, notes=dict(run.notes), rows=[], masters={}, teacher=None)


def check_static(chosen: Scheme | Mix, text: Any) -> None:
    """Raises InputError where a scheme has static inputs and there is no text to find their scales on."""
    if chosen.static and not text:
        raise InputError(
            f"{chosen.name} rounds inputs by scales that are found on text: quantizing to it needs --calibration FILE."
        )


def dequantize(run: Run) -> None:
    """Makes floats, in the model's dtype, of every weight that is codes; inputs are rounded no more."""
    held = {w.stored.q.format.name for w in weights(run.model).values() if isinstance(w.stored, Codes)}
    for _, op in ops(run.model):
        if isinstance(op.weight.stored, Codes):
            op.weight.dequantize()
            _set_input(op, None)
    if held:
        run.notes["dequantized"] = sorted(held)


def _set_input(op: Op, f: Format | None) -> None:
    if isinstance(op, Linear):
        op.input = f


def to_scheme(given: Any, group_size: int | None = None) -> Scheme | Mix:
    """A scheme's name, a Scheme, or a recipe's own list of rules {match, weight, input, why}. Raises InputError."""
    if isinstance(given, str | Scheme | Mix):
        return scheme(given, group_size)
    own = custom(given)
    return own if group_size is None else own.with_group(group_size)
