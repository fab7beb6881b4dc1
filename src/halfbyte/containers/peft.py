"""PEFT's adapter folder: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import functools
import json
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import regex
from safetensors.torch import save_file
from torch import Tensor

from halfbyte.containers.shards import Shards, read_json
from halfbyte.errors import InputError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE = ".base_layer.weight"
_PREFIX = "base_model.model."
# What PEFT writes that changes what an adapter computes, and the value that means it does not.
_NEUTRAL: dict[str, Any] = {
    "bias": "none", "lora_bias": False, "megatron_config": None, "layer_replication": None,
    "trainable_token_indices": None, "target_parameters": None, "alora_invocation_tokens": None,
    "corda_config": None, "arrow_config": None, "exclude_modules": None, "layers_to_transform": None,
}  # fmt: skip
# Says nothing of what the adapter computes, once its weights are there.
_SILENT = {
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode",
    "target_modules", "fan_in_fan_out", "layers_pattern", "megatron_core", "loftq_config", "eva_config",
    "lora_ga_config", "ensure_weight_tying",
}  # fmt: skip
_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # init_lora_weights that leave the base as it is
_RESIDUAL = ("pissa", "olora")  # that take a part out of it, found anew from the base; others draw it at random
_SETTINGS = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "use_qalora", "qalora_group_size")
_EMBEDDING = {"embedding_A": "lora_B.weight", "embedding_B": "lora_A.weight"}
_QUANTIFIERS = 4  # of a regular expression that names layers
_KEYS, _LONGEST, _CHOICES = 4096, 300, 128  # of a pattern: keys, characters of one, quantifiers and bars of all
_PATTERNS = ("rank_pattern", "alpha_pattern")
_LISTS = ("modules_to_save", "target_parameters")


def write(
    folder: Path, adapters: Mapping[str, Mapping[str, Tensor]], settings: Mapping[str, Any], base: str,
    linear_names: list[str], task_type: str = "CAUSAL_LM", fan_in_fan_out: bool = False,
    saved: Mapping[str, Tensor] = {},
) -> None:  # fmt: skip
    """adapters: op's name -> tensors by PEFT's names. linear_names: all linear layers of the model, to tell
    whether the short endings that PEFT users expect in target_modules meet just these. saved: parameter's name ->
    tensor of the modules that settings name as modules_to_save. Those that settings name as target_parameters have
    adapters by the parameter's name."""
    parameters = settings.get("target_parameters") or []
    modules = sorted(adapters.keys() - set(parameters))
    endings = sorted({n.rpartition(".")[2] for n in modules})
    met = [n for n in linear_names if n.rpartition(".")[2] in endings]
    config = {
        **_NEUTRAL,
        **{key: {} for key in _PATTERNS},
        **settings,
        "base_model_name_or_path": base,
        "target_modules": endings if sorted(met) == modules else modules,
        "task_type": task_type,
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    wrapped = {name: w for w, name in wrappers(parameters).items()}
    flat = {
        f"{_PREFIX}{wrapped.get(n, n)}.{key}": t.cpu().contiguous()
        for n, ts in adapters.items()
        for key, t in ts.items()
    }
    flat |= {f"{_PREFIX}{n}": t.cpu() for n, t in saved.items()}
    save_file(flat, str(folder / WEIGHTS), metadata={"format": "pt"})


def wrappers(parameters: list[str]) -> dict[str, str]:
    """What PEFT calls the wrapper of a parameter, by which its tensors are named -> the parameter's full name. Those of
    one module are around each other, in the order in which it has them."""
    by_module: dict[str, list[str]] = {}
    for name in parameters:
        by_module.setdefault(name.rpartition(".")[0], []).append(name)
    return {m + ".base_layer" * i: n for m, names in by_module.items() for i, n in enumerate(reversed(names))}


def read(folder: Path) -> tuple[str, dict[str, Any], dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The base's name, the settings, op's name -> tensors by PEFT's names, and parameter's name -> tensor of the
    modules that the settings name as modules_to_save.

    Raises InputError for an adapter that is no LoRA, or that needs something of PEFT's which is not known here.
    """
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise InputError(f"{folder / CONFIG}: peft_type {config.get('peft_type')!r} is not known; LORA is.")
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str):
        raise InputError(f"{folder / CONFIG}: base_model_name_or_path is missing.")
    settings = _settings(config, f"{folder / CONFIG}: ")
    return base, settings, *_tensors(folder / WEIGHTS, settings)


def _settings(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Those that change what the adapter computes."""
    for key, value in config.items():
        if key in _SILENT or key in _SETTINGS or key in _PATTERNS or key in _LISTS:
            continue
        if key == "init_lora_weights" and value in (*_STARTS, *_RESIDUAL):
            continue
        if value not in (_NEUTRAL.get(key), None, False, {}, []):  # a switch that is on, also one newer than this
            raise InputError(f"{where}{key}={value!r} is not known to halfbyte.")
    settings = {k: config[k] for k in _SETTINGS if k in config}
    if not settings.get("use_qalora"):  # PEFT states a group size beside every LoRA
        settings = {k: v for k, v in settings.items() if "qalora" not in k}
    wrong = [k for k, v in settings.items() if not isinstance(v, int | float)]
    if wrong or not isinstance(settings.get("r"), int):
        raise InputError(f"{where}{(wrong or ['r'])[0]} should be a number.")
    settings |= {k: check_pattern(config[k], k, where) for k in _PATTERNS if config.get(k)}
    if (begin := config.get("init_lora_weights")) in _RESIDUAL:
        settings["init_lora_weights"] = begin
    for key in _LISTS:
        names = config.get(key) or []
        if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
            raise InputError(f"{where}{key} should be a list of names.")
        settings |= {key: names} if names else {}
    return settings


def _tensors(file: Path, settings: Mapping[str, Any]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Op's name -> tensors by PEFT's names, and those of modules that were trained whole."""
    if not file.exists():
        raise InputError(f"{file} is missing; adapters in pickle files are not read.")
    keys = ["lora_A.weight", "lora_B.weight", *(["lora_magnitude_vector"] if settings.get("use_dora") else [])]
    shards = Shards([file])
    out: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for name in shards:
        stem, _, key = name.removeprefix(_PREFIX).rpartition(".lora_")
        if name.startswith(_PREFIX) and not stem and (settings.get("modules_to_save") or name.endswith(BASE)):
            saved[key] = shards.get(name)
            continue
        if name.startswith(_PREFIX) and key in _EMBEDDING:  # as that of a linear layer whose inputs are tokens, one-hot
            if len(shape := shards.shape(name)) != 2:
                raise InputError(f"{file}: {name} has the shape {shape}, and should be a matrix.")
            out.setdefault(stem, {})[_EMBEDDING[key]] = shards.get(name).T.contiguous()
            continue
        if not name.startswith(_PREFIX) or f"lora_{key}" not in keys:
            raise InputError(f"{file}: the tensor {name!r} is not known to halfbyte.")
        out.setdefault(stem, {})[f"lora_{key}"] = shards.get(name)
    if bad := [n for n, t in out.items() if len(t) != len(keys)]:
        raise InputError(f"{file}: {bad[0]} lacks {' or '.join(k.removesuffix('.weight') for k in keys)}.")
    return out, saved


def check_pattern(pattern: Any, key: str, where: str = "") -> dict[str, float]:
    """A rank_pattern or alpha_pattern, as `key` says. Raises InputError where it is none, or one whose regular
    expressions are too many, or leave too many ways to try."""
    if not isinstance(pattern, dict) or not all(type(v) in (int, float) and v > 0 for v in pattern.values()):
        raise InputError(f"{where}{key} should give numbers above 0 by layers' names.")
    if key == "rank_pattern" and not all(isinstance(v, int) for v in pattern.values()):
        raise InputError(f"{where}{key} should give whole numbers.")
    if len(pattern) > _KEYS:
        raise InputError(f"{where}{key} has {len(pattern)} keys, and at most {_KEYS} are read.")
    for name in pattern:
        if not isinstance(name, str) or len(name) > _LONGEST:
            raise InputError(f"{where}{key}: {reprlib.repr(name)} is no layer's name.")
        try:
            re.compile(_named(name))  # as PEFT does
            _compiled(name)
        except (re.error, regex.error, RecursionError, OverflowError) as e:
            raise InputError(f"{where}{key}: {name!r} is no regular expression: {e}.") from None
        if re.search(r"\)[*+?{]", name) or len(re.findall(r"[*+?{]", name)) > _QUANTIFIERS:
            raise InputError(f"{where}{key}: {name[:80]!r} repeats too much to be a layer's name.")
    if sum(len(re.findall(r"[*+?{|]", name)) for name in pattern) > _CHOICES:
        raise InputError(f"{where}{key} leaves too much to try: give layers' names, or fewer of its expressions.")
    return pattern


def meets(key: str, name: str) -> bool:
    """PEFT's rule (get_pattern_key): the key, a regular expression, is the name, or its end from a dot on. Raises
    InputError for one that takes too long."""
    try:
        return _compiled(key).match(name, timeout=0.1) is not None
    except TimeoutError:
        raise InputError(f"rank_pattern, alpha_pattern: {key[:80]!r} takes too long to match.") from None


def _named(key: str) -> str:
    return rf"(.*\.)?({key})$"


@functools.lru_cache(maxsize=_KEYS)
def _compiled(key: str) -> Any:
    return regex.compile(_named(key))
