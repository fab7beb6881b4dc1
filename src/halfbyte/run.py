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
from halfbyte.folders import disk_bytes
from halfbyte.formats import Format
from halfbyte.layers import Codes, Embedding, Grid, Linear, Op, ops, round_inputs_of_codes, weights
from halfbyte.models import Loaded, parse_dtype
from halfbyte.plan import inventory, plan, totals
from halfbyte.scheme import Mix, Scheme, check_static, static, to_scheme
from halfbyte.solvers import Solver, solver
from halfbyte.train import Log

NOTES, MASTERS = "halfbyte.json", "masters"


@dataclass
class Run:
    """loaded: the model and what belongs to it. notes: what was done, kept as halfbyte.json beside the result.
    log: of the last training. rows: the ledger so far, (stage, figures). files: what it was read from.
    checkpoint: the folder where training keeps its state, and goes on from what is there. from_disk: whether weights
    are read when they are needed. masters: floats that were trained and then made codes. teacher: a model whose
    predictions training may be held to. waiting: of adapters that are not in use, by name, what they have for
    themselves: notes, log, files and rows."""

    loaded: Loaded
    seed: int = 0
    notes: dict[str, Any] = field(default_factory=dict)
    log: Log | None = None
    files: list[Path] = field(default_factory=list)
    checkpoint: Path | None = None
    from_disk: bool = False
    masters: dict[str, Tensor] = field(default_factory=dict)
    teacher: Any = field(default=None, repr=False)
    waiting: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    @property
    def model(self) -> Any:
        """A plain nn.Module: generate(), other trainers, torch.compile take it."""
        return self.loaded.model

    def read_weights(self) -> None:
        """Reads what is still on disk."""
        if self.from_disk and self.loaded.checkpoint is not None:
            self.loaded.checkpoint.materialize(self.model, self.loaded.config.dtype)

    def leave_weights(self) -> None:
        """Lets go of what can be read from disk again."""
        if self.from_disk and self.loaded.checkpoint is not None:
            self.loaded.checkpoint.release(self.model, "")

    @property
    def tokenizer(self) -> Any:
        return self.loaded.tokenizer

    @property
    def needs_tokenizer(self) -> Any:
        """The tokenizer. Raises InputError if the model came without one, or reads one text and writes another."""
        if self.tokenizer is None:
            raise InputError(f"{self.loaded.source} has no tokenizer, and text needs one.")
        if (takes := getattr(self.model, "main_input_name", "input_ids")) != "input_ids":
            raise InputError(
                f"{self.loaded.source} takes {takes}, and not text. It can be quantized without: --calibration none, "
                "by rtn or hqq."
            )
        if getattr(self.model.config, "is_encoder_decoder", False):
            raise InputError(
                f"{self.loaded.source} reads one text and writes another: text is put only to models that read and "
                "write the same one. It can be quantized without: --calibration none, by rtn or hqq."
            )
        return self.tokenizer

    @property
    def labels(self) -> list[str]:
        """A classifier's labels, by class id."""
        config = self.model.config
        return [config.id2label[i] for i in range(config.num_labels)]

    @property
    def causal(self) -> bool:
        return not type(self.model).__name__.endswith("ForSequenceClassification")

    def let_go(self) -> None:
        """Of what went with weights that are now others: adapters that wait were trained beside what was there before,
        and once none is in use, what was trained whole is the model's own."""
        self.waiting.clear()
        for w in weights(self.model).values():
            w.waiting.clear()
        if not adapters.attached(self.model):
            adapters.whole.let_go(self.model)

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
        entries = plan(self.model, chosen)
        sites = {e.name: (e.after, e.role) for e in entries if e.after is not None}
        codes = {f"{n}.weight": op.weight.stored for n, op in ops(self.model) if isinstance(op.weight.stored, Codes)}
        kept = {
            e.name: (codes[e.name].q.format, e.role)
            for e in entries
            if e.after is None and e.name in codes and not e.tied_to
        }
        if not sites:
            return
        rounded, own = any(e.input for e in entries if e.after is not None), models.own_container(self.loaded)
        dtypes = {self.model.dtype}
        container_for(sites, own, rounded, dtypes)
        try:
            container_for({**sites, **kept}, own, rounded, dtypes)
        except InputError:
            shown = ", ".join(f"{n} ({f.name})" for n, (f, _) in list(kept.items())[:3])
            raise InputError(
                f"{self.loaded.source} has {shown} in codes of its own, for which no folder layout has a place beside "
                f"{chosen.name}: name the output OUT.gguf, or make floats of all first, by `halfbyte export` with "
                "--to hf --format BF16 --requantize."
            ) from None

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
    notes = inherited(path)
    run = Run(models.load(base, parse_dtype(notes.get("dtype")) or dtype), seed)
    check_base(run, path)
    bring(run, notes)
    if dtype is not None:  # not before: the codes that it was trained on have scales in the dtype of then
        _cast(run, dtype)
    attach_from(run, path)
    run.notes = notes
    return run


def fixed_dtype(model: Any) -> torch.dtype | None:
    """That of an embedding which is seen through a grid: what is looked up gives the dtype that all others compute in.
    None where there is no such embedding."""
    return next((op.weight.dtype for _, op in ops(model) if isinstance(op, Embedding) and op.weight.grid), None)


@torch.no_grad()
def _cast(run: Run, dtype: torch.dtype) -> None:
    """Computes in another dtype; codes and scales stay, and so what a grid makes codes of. Raises InputError where that
    is looked up, and so gives the dtype that all others compute in."""
    seen = [w for w in weights(run.model).values() if w.grid is not None]
    if fixed_dtype(run.model) not in (None, dtype):
        own = str(run.loaded.config.dtype).removeprefix("torch.")
        raise InputError(f"{run.loaded.source}: its embedding was trained through a grid in {own}: leave out --dtype.")
    stay = {id(p) for w in seen for p in w.parameters()}
    for w in weights(run.model).values():
        if w.grid is None and isinstance(w.stored, Codes):
            w.store(replace(w.stored.q, dtype=dtype))
    for p in run.model.parameters():  # not model.to(dtype), which would round the rotary frequencies too
        if id(p) not in stay:
            p.data = p.data.to(dtype)
    run.loaded.config.dtype = dtype


def notes_of(path: Path) -> dict[str, Any]:
    """The notes beside a result; none beside what others wrote. Raises InputError for a broken file."""
    return read_json(path / NOTES) if (path / NOTES).exists() else {}


def inherited(path: Path) -> dict[str, Any]:
    """The notes of a folder for a run that goes on from it: the hash is of that folder, not of what is made of it."""
    return {k: v for k, v in notes_of(path).items() if k != "sha256"}


FORM = ("dequantized", "stored", "kept_codes", "solver", "grid", "grid_search")  # notes that `bring` needs


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


def learn_from_codes(run: Run, floats: Mapping[str, Tensor]) -> None:
    """Weights that are codes become floats again, near those given by name, seen through grids that learn the codes'
    scales. Raises InputError where no scale can be learned."""
    for name, w in weights(run.model).items():
        if isinstance(w.stored, Codes):
            w.see_through(w.stored.q, floats[name])
    run.notes["grid"] = run.notes.pop("stored")


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
    none that are codes. Adapters on them are folded in; where all stay, so do modules trained whole. inputs:
    how observe finds the scales of inputs, where the scheme has static ones; it does so once all weights are codes.
    squares, store: see calibrate.freeze. Raises InputError before any is touched if one cannot be; where weights are on
    disk, when it is read."""
    check_static(chosen, batches)
    by_name = dict(ops(run.model))
    formats, observed = {}, {}
    held = {n: w.stored.q.format for n, op in by_name.items() if isinstance((w := op.weight).stored, Codes)}
    sites = {}
    for e in plan(run.model, chosen):
        name = e.name.removesuffix(".weight")
        if e.after is not None and not e.tied_to and not (keep and name in held):
            sites[name] = (e.after, e.input)
    folds = any(by_name[n].weight.adapters for n, (f, _) in sites.items() if held.get(n) != f)
    if adapters.attached(run.model) and not folds:
        inside = adapters.whole.inside(run.model)
        sites = {n: site for n, site in sites.items() if not inside(n)}
        if not sites:
            return  # the adapters' notes say what these codes are
    if keep and held:
        run.notes["kept_codes"] = len({id(by_name[n].weight) for n in held})
    for name, (f, rounded) in sites.items():
        if held.get(name) != f:
            if by_name[name].weight.device.type != "meta":
                calibrate.finite(name, by_name[name], f)
            formats[name] = f
        _set_input(by_name[name], None if static(rounded) else rounded)
        if static(rounded) and isinstance(by_name[name], Linear):
            observed[name] = rounded
    calibrate.freeze(run.model, formats, by, batches, on_block, squares, store)
    if formats:
        run.let_go()
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


def dequantize(run: Run) -> None:
    """Makes floats, in the model's dtype, of every weight that is codes; inputs are rounded no more."""
    held = {w.stored.q.format.name for w in weights(run.model).values() if isinstance(w.stored, Codes)}
    for w in weights(run.model).values():
        w.dequantize()
    round_inputs_of_codes(run.model)
    if held:
        run.notes["dequantized"] = sorted(held)


def _set_input(op: Op, f: Format | None) -> None:
    if isinstance(op, Linear):
        op.input = f
