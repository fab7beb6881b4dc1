"""What `export` writes: a kind is a file here and a row in KINDS. Each knows what it can hold, how it is written, and
the program of others that reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from halfbyte.errors import InputError
from halfbyte.folders import FILES
from halfbyte.formats import Format
from halfbyte.kinds import folders, gguf, gguf_lora, ollama, onnx
from halfbyte.models import Loaded
from halfbyte.qtensor import QTensor


@dataclass
class Job:
    """What is to be written. formats: op's name -> what its weight is rounded to while it is written. floats: the
    dtype that all others get, codes among them; None leaves them as they are."""

    loaded: Loaded
    formats: Mapping[str, Format] = field(default_factory=dict)
    floats: torch.dtype | None = None
    on_tensor: Callable[[int, int], None] = lambda done, total: None


class Kind(Protocol):
    """One thing that models are exported to."""

    NAME: str
    SUFFIX: str  # of the file that is written; "" for a folder
    READER: str  # whose reader it is, for messages
    ADAPTERS: bool  # whether an adapter is exported, and not a model

    def refuses(self, job: Job) -> str | None:
        """Why it cannot be written, in words; None if it can. Called before anything is."""
        ...

    def remarks(self, job: Job) -> list[str]:
        """What the readers of the result do otherwise than the model does, in words."""
        ...

    def fitting(self, q: QTensor) -> QTensor | None:
        """The same values, codes and scales unchanged, in a format that it holds; None if none has them."""
        ...

    def write(self, job: Job, path: Path) -> None:
        """Writes the file, or into the existing folder."""
        ...

    def ours(self, job: Job) -> Loaded | None:
        """The model as it was written, in float32, where halfbyte does not read what it wrote; None where it does."""
        ...

    def missing(self) -> str | None:
        """Why the reader cannot be asked, or how to install it; None if it is there."""
        ...

    def open(self, path: Path, context: int) -> nn.Module:
        """The reader's model of what was written, whose call gives logits as transformers' does."""
        ...

    def beside(self, job: Job, path: Path, context: int) -> nn.Module:
        """As `open` of an adapter, which computes nothing alone: with its base. Only of kinds with ADAPTERS."""
        ...

    def differs(self, reader: nn.Module, loaded: Loaded) -> str | None:
        """What the reader makes otherwise of texts and conversations than the model's own tokenizer and chat template
        do, or where it does not end an answer, in words; None if it is all the same."""
        ...


KINDS: dict[str, Kind] = {
    k.NAME: k  # pyright: ignore[reportAssignmentType]
    for k in (gguf, gguf_lora, ollama, onnx, *folders.FOLDERS)
}


def kind(name: str | None, output: Path) -> Kind:
    """A kind by name, or by the suffix of what is to be written. Raises InputError, also for an output whose name says
    that it is something else."""
    if name is None:
        by_suffix = (k for k in KINDS.values() if k.SUFFIX and output.suffix == k.SUFFIX)
        if output.suffix == ".delta":
            raise InputError(f"{output}: a delta is made of a folder that is there, by `halfbyte export --to delta`.")
        if (found := next(by_suffix, None)) is None:
            raise InputError(f"--to is missing, and the name {output} does not tell: it is {', '.join(KINDS)}.")
    elif (found := KINDS.get(name)) is None:
        raise InputError(f"--to {name}: it is {', '.join(KINDS)}.")
    if found.SUFFIX and output.suffix != found.SUFFIX:
        raise InputError(f"--to {name} writes a file: name it {output.name}{found.SUFFIX}, not {output}.")
    if found.SUFFIX and output.is_dir():
        raise InputError(f"{output} is a folder, where a file is to be written; choose another -o.")
    if not found.SUFFIX and output.suffix in FILES:
        raise InputError(f"--to {name} writes a folder, and {output} is a name of a file; choose another -o.")
    return found
