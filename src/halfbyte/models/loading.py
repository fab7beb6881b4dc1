"""Any MODEL that is no adapter -> a model whose layers are ops."""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halfbyte.containers.gguf import File
from halfbyte.containers.shards import Shards, read_json, sha256_of
from halfbyte.errors import InputError, reason
from halfbyte.experts import Experts, fused
from halfbyte.layers import swap
from halfbyte.models import gguf, gguf_tokenizer
from halfbyte.models.checkpoint import Checkpoint, Folder, Slice, check_dtype
from halfbyte.models.names import Names

_GENERATION = "generation_config.json"
DTYPES = {"float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
          "float16": torch.float16, "fp16": torch.float16}  # fmt: skip


@dataclass
class Loaded:
    """A model whose linear layers and embeddings are ops, with what belongs to it.

    source: what the user named; path: where it was found on this machine; sha256: of its weight files; checkpoint:
    what the weights were, or can be, read from.
    """

    model: Any  # a transformers model; typed so since its attributes are its class's own
    tokenizer: Any
    source: str
    path: Path
    sha256: str = ""
    checkpoint: Checkpoint | None = None

    @property
    def config(self) -> Any:
        return self.model.config


def resolve(source: str | Path, revision: str | None = None) -> Path:
    """A folder or .gguf file as it is; anything of the form owner/name is fetched from the hub (HF_TOKEN, offline
    mode and cache as the hub library has them). Raises InputError."""
    path = Path(source)
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)) or path.suffix in (
        ".gguf",
        ".safetensors",
        ".yaml",
    ):
        raise InputError(f"{source}: there is no such file or folder.")
    import huggingface_hub

    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md"]
        return Path(huggingface_hub.snapshot_download(str(source), revision=revision, allow_patterns=patterns))
    except Exception as e:
        raise InputError(f"{source}: no such folder here, and the hub did not give it: {reason(e)}") from None


def parse_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """Raises InputError for a dtype that is not one to compute in."""
    if name is None or isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise InputError(f"--dtype {name}: it is float32, bfloat16 or float16.")
    return DTYPES[name]


def sha256(path: Path) -> str:
    """One hash for the weights of a folder or file, as a model that was read from there has it. Raises InputError."""
    if path.is_dir() and not (path / "config.json").exists() and len(files := list(path.glob("*.gguf"))) == 1:
        path = files[0]
    return Shards.of_folder(path).sha256() if path.is_dir() else sha256_of([path])


def load(
    source: str | Path,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    labels: list[str] | None = None,
    weights: bool = True,
) -> Loaded:
    """Reads a Hugging Face folder (plain, or quantized in a layout of CONTAINERS), a hub id or a .gguf file.

    dtype: of the float tensors; None keeps the checkpoint's own (bfloat16 for a gguf file). labels: makes it a
    classifier of these, with a new head where the checkpoint has none. weights=False leaves all on the meta
    device (for `inspect` and `plan`). Raises InputError for what cannot be read; nothing is executed from the
    checkpoint.
    """
    path = resolve(source, revision)
    _quiet()
    if path.is_dir() and not (path / "config.json").exists() and len(files := list(path.glob("*.gguf"))) == 1:
        path = files[0]  # as ollama's folders and many a hub's are
    if path.suffix == ".gguf":
        return _load_gguf(source, path, dtype or torch.bfloat16, weights)
    if not path.is_dir():
        raise InputError(f"{path} is neither a model's folder nor a .gguf file.")
    config = _config(path)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        del config.quantization_config
    if (mlx := getattr(config, "quantization", None)) is not None:  # MLX names no method, and says it twice
        quantization = {**mlx, "quant_method": "mlx"} if isinstance(mlx, dict) else None
        del config.quantization
    shards = Shards.of_folder(path)
    layers, held = getattr(config, "num_hidden_layers", None), len(list(shards))
    if isinstance(layers, int) and layers > held:  # making them all would take memory without end
        raise InputError(f"{path / 'config.json'} speaks of {layers} layers, and its weights are {held} tensors.")
    try:
        model = skeleton(config, labels)
    except InputError as e:
        raise InputError(f"{path / 'config.json'}: {e}") from None
    except Exception as e:  # whatever a class makes of sizes that cannot be
        raise InputError(f"{path / 'config.json'} describes no model that can be made: {reason(e)}") from None
    if model.generation_config is not None and (path / _GENERATION).exists():
        model.generation_config = _generation(path)
    dtype = torch.float32 if (dtype := dtype or config.dtype) is None else dtype
    check_dtype(dtype)
    config.dtype = dtype
    _check_experts(model, shards, path)
    swap(model)
    names = _names(model, shards)
    checkpoint = None
    if names is None:
        if quantization is not None:
            raise InputError(f"{path}: the names of its quantized tensors are not those of {type(model).__name__}.")
        _check_size(model, shards, path)
        model = _by_transformers(type(model), path, dtype)
        swap(model)
    else:
        checkpoint = Checkpoint(Folder(shards, names, quantization))
        _will_be(model, dtype)
        checkpoint.materialize(model, dtype if weights else None)
    sha256 = shards.sha256() if weights else ""
    return Loaded(model.eval(), _tokenizer(path), str(source), path, sha256, checkpoint)


def _will_be(model: nn.Module, dtype: torch.dtype) -> None:
    """Gives what is on the meta device the dtype that it will have, for all that asks before it is read."""
    for p in model.parameters():
        if p.device.type == "meta" and p.dtype.is_floating_point:
            p.data = p.data.to(dtype)


def _quiet() -> None:
    """No progress bars of transformers' own: they would mix with ours on standard error."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _config(path: Path) -> Any:
    from transformers import AutoConfig

    raw = read_json(path / "config.json")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as e:
        if "auto_map" in raw:
            raise InputError(
                f"{path}: its code is in the folder itself (auto_map); halfbyte runs no code from a checkpoint."
            ) from None
        raise InputError(f"{path / 'config.json'} cannot be used: {reason(e)}") from None


def _generation(path: Path) -> Any:
    """What ends an answer, and how tokens are chosen, as the folder says it."""
    from transformers import GenerationConfig

    read_json(path / _GENERATION)
    try:
        return GenerationConfig.from_pretrained(path)
    except Exception as e:
        raise InputError(f"{path / _GENERATION} cannot be used: {reason(e)}") from None


def is_encoder(source: str | Path, revision: str | None = None) -> bool:
    """Whether a MODEL would need a classification head to tell labels apart: its class is no causal model's."""
    path = resolve(source, revision)
    if not path.is_dir() or not (path / "config.json").exists():
        return False
    raw = read_json(path / "config.json").get("architectures")
    named = raw[0] if isinstance(raw, list) and raw else "?"
    return not str(named).endswith(("ForCausalLM", "LMHeadModel"))


def skeleton(config: Any, labels: list[str] | None = None) -> Any:
    """The model of a config with its parameters on the meta device and its buffers real; ties are made."""
    import transformers
    from accelerate import init_empty_weights

    if labels is not None:
        config.num_labels = len(labels)
        config.id2label, config.label2id = dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}
        cls = transformers.AutoModelForSequenceClassification._model_mapping[type(config)]
    else:
        named = getattr(transformers, (getattr(config, "architectures", None) or ["?"])[0], None)
        mapping = transformers.AutoModelForCausalLM._model_mapping
        cls = named or mapping.get(type(config), None)
    if cls is None:
        raise InputError(f"transformers has no model class for architectures {config.architectures}.")
    with init_empty_weights(include_buffers=False):
        model: Any = cls(config)  # pyright: ignore[reportCallIssue]
    model.tie_weights()
    model.generation_config = getattr(model, "generation_config", None)
    return model


def _names(model: nn.Module, shards: Shards) -> dict[str, str | Slice] | None:
    """Parameter's name -> its name on disk, without ".weight" for quantized ones told apart later; or where it lies in
    the tensor of all experts.

    Checkpoints of a bare model lack the base's prefix, or have one more. None if neither way covers the model:
    then transformers' own loader knows what was renamed.
    """
    names = Names(model)
    there = {re.sub(r"\.(weight_packed|weight_scale|qweight)$", ".weight", n) for n in shards}
    present: dict[str, str] = {names.held(n): n for n in there} | {n: n for n in there}
    layouts = {name: m.fused for name, m in model.named_modules() if isinstance(m, Experts)}
    prefix = getattr(model, "base_model_prefix", "") + "."
    groups: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(p), []).append(name.removesuffix(".stored"))
    ways = (lambda n: n, lambda n: n.removeprefix(prefix), lambda n: prefix + n)
    for way in ways:

        def where(name: str, way: Callable[[str], str] = way) -> str | Slice | None:
            if (own := present.get(way(name))) is not None or (part := names.fused(name)) is None:
                return own
            target, expert, i, n = part
            whole = present.get(way(target))
            return None if whole is None else Slice(whole, expert, i, n, layouts[target.rpartition(".")[0]])

        found = {n: at for g in groups.values() for n in g if (at := where(n)) is not None}
        missing = [g[0] for g in groups.values() if not any(n in found for n in g)]
        if all(m.split(".")[0] in ("classifier", "score", "pre_classifier") for m in missing):
            return found
    return None


def _check_experts(model: nn.Module, shards: Shards, path: Path) -> None:
    """Raises InputError where the config describes more experts than the weights can be of: each becomes modules."""
    described = sum(next(m.parameters()).shape[0] for m in model.modules() if fused(m) is not None)
    held = len(list(shards)) + sum(shards.shape(n)[0] for n in shards if len(shards.shape(n)) == 3)
    if described > held:
        raise InputError(f"{path / 'config.json'} speaks of {described} experts, and its weights are not of so many.")


def _check_size(model: nn.Module, shards: Shards, path: Path) -> None:
    """Raises InputError where the config describes a far larger model than the weights hold: transformers would
    fill the memory with random ones first."""
    needed, held = sum(p.numel() for p in model.parameters()), sum(math.prod(shards.shape(n)) for n in shards)
    if needed > 2 * held:
        raise InputError(f"{path}: config.json describes {needed:,} parameters, but its weights are {held:,}.")


def _by_transformers(cls: Any, path: Path, dtype: torch.dtype) -> Any:
    """The whole model through from_pretrained: for checkpoints whose tensors it renames or fuses."""
    try:
        model, info = cls.from_pretrained(path, dtype=dtype, use_safetensors=True, output_loading_info=True)
    except Exception as e:
        raise InputError(f"{path} cannot be loaded as {cls.__name__}: {reason(e)}") from None
    if info["missing_keys"]:
        raise InputError(
            f"{path} lacks weights that {cls.__name__} needs: {', '.join(sorted(info['missing_keys'])[:5])}."
        )
    return model


def _load_gguf(source: str | Path, path: Path, dtype: torch.dtype, weights: bool) -> Loaded:
    """A file of an architecture that halfbyte knows: its codes as they are. Others by transformers, in floats."""
    file = File(path)
    try:
        config = gguf.read_config(file)
        model = None if config is None else skeleton(config)
    except InputError:
        raise
    except Exception as e:  # whatever a class makes of numbers that cannot be
        raise InputError(f"{path} describes no model that can be made: {reason(e)}") from None
    if config is None or model is None:
        return _load_other_gguf(source, file, dtype)
    config.dtype = dtype
    model.generation_config.eos_token_id = gguf_tokenizer.read_ends(file)
    stored = gguf.Stored(file, config, dtype)
    stored.check(dict(model.named_parameters(remove_duplicate=False)))
    swap(model)
    checkpoint = Checkpoint(stored)
    _will_be(model, dtype)
    checkpoint.materialize(model, dtype if weights else None)
    sha256 = sha256_of([path]) if weights else ""
    return Loaded(model.eval(), gguf_tokenizer.read(file), str(source), path, sha256, checkpoint)


def _load_other_gguf(source: str | Path, file: File, dtype: torch.dtype) -> Loaded:
    from transformers import AutoModelForCausalLM

    path = file.path
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the reader's progress bar
            model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    except Exception as e:
        raise InputError(f"{path} cannot be read as a gguf model: {reason(e)}") from None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for p in model.parameters():  # not model.to(dtype), which would round the rotary frequencies too
        p.data = p.data.to(dtype)
    model.config.dtype = dtype
    swap(model)
    return Loaded(model.eval(), gguf_tokenizer.read(file), str(source), path, sha256_of([path]))


def _tokenizer(path: Path) -> Any:
    """The folder's tokenizer, or None if it has none. Raises InputError for one that is broken."""
    from transformers import AutoTokenizer

    if not any(
        (path / n).exists() for n in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    ):
        return None
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as e:
        raise InputError(f"{path}: its tokenizer cannot be read: {reason(e)}") from None
