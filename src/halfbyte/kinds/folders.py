"""Hugging Face folders: plain ones, and those in a layout of CONTAINERS. A row of FOLDERS is a kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from halfbyte import models
from halfbyte.containers import CONTAINERS, Container, compressed_tensors
from halfbyte.errors import InputError
from halfbyte.layers import Linear, ops
from halfbyte.qtensor import QTensor

if TYPE_CHECKING:
    from halfbyte.kinds import Job
    from halfbyte.models import Loaded


@dataclass(frozen=True)
class Folder:
    """A folder whose quantized weights are in `container`'s layout (None: it holds floats alone).

    NAME, SUFFIX, READER, ADAPTERS: see Kind. needs: the modules that its reader is made of; none: no reader runs here.
    model: the reader's model of a folder.
    """

    NAME: str
    READER: str
    container: Container | None
    needs: tuple[str, ...]
    model: Callable[[Path], nn.Module]
    SUFFIX: str = ""
    ADAPTERS: bool = False

    def refuses(self, job: Job) -> str | None:
        """See Kind."""
        loaded = job.loaded
        role = models.roles(loaded.model)
        for name, op in ops(loaded.model):
            f = job.formats.get(name) or (None if job.floats else op.weight.format)
            if f is None:
                continue
            why = "it holds floats alone" if self.container is None else self.container.refuses(f, role[name])
            if why is None and isinstance(op, Linear) and op.input and self.container is not compressed_tensors:
                why = f"its inputs are rounded to {op.input}, which {self.READER} do not do"
            if why is not None:
                return f"{name}: {why}"
        return None

    def remarks(self, job: Job) -> list[str]:
        """See Kind."""
        return [] if job.loaded.tokenizer is not None else ["there is no tokenizer to go with it"]

    def fitting(self, q: QTensor) -> QTensor | None:
        """See Kind. Codes come as the layout has them or not at all."""
        return q if self.container is not None and self.container.refuses(q.format, "linear") is None else None

    def write(self, job: Job, path: Path) -> None:
        """See Kind. One tensor at a time."""
        models.save(job.loaded, path, self.container, job.formats, job.floats, job.on_tensor)

    def ours(self, job: Job) -> Loaded | None:
        """See Kind."""
        return None

    def missing(self) -> str | None:
        """See Kind."""
        if not self.needs:
            return "none of them runs on every machine, so only halfbyte reads it here"
        lacking = [n for n in self.needs if find_spec(n) is None]
        return f"pip install {' '.join(lacking).replace('_', '-')}" if lacking else None

    def open(self, path: Path, context: int) -> nn.Module:
        """See Kind."""
        return self.model(path)

    def differs(self, reader: nn.Module, loaded: Loaded) -> str | None:
        """See Kind. The tokenizer's files are its own."""
        return None


def _transformers(path: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path)
    except Exception as e:
        raise InputError(f"transformers cannot read {path}: {e}") from None
    for m in model.modules():
        if type(m).__name__ == "Linear4bit":  # on CPUs with AVX512-BF16 it would repack weights, and round otherwise
            m.support_avx512bf16_for_cpu = False
    return model.eval()


class MLX(nn.Module):
    """A folder in mlx-lm: its logits."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.mx: Any = import_module("mlx.core")
        self.model, _ = import_module("mlx_lm").load(str(path))

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        """input_ids (rows, n), filled up on the right -> .logits (rows, n, vocabulary) float32."""
        logits = self.model(self.mx.array(input_ids.numpy())).astype(self.mx.float32)
        return SimpleNamespace(
            logits=torch.frombuffer(bytearray(bytes(memoryview(logits))), dtype=torch.float32).reshape(logits.shape)
        )


def _row(method: str, needs: tuple[str, ...], model: Callable[[Path], nn.Module]) -> Folder:
    return Folder(method, CONTAINERS[method].READER, CONTAINERS[method], needs, model)


FOLDERS = (
    Folder("hf", "transformers", None, ("transformers",), _transformers),
    _row("compressed-tensors", ("compressed_tensors",), _transformers),
    _row("bitsandbytes", ("bitsandbytes",), _transformers),
    _row("gptq", (), _transformers),
    _row("mlx", ("mlx", "mlx_lm"), MLX),
)
