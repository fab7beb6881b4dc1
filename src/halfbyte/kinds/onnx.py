"""ONNX files of decoders with a cache, read by onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from halfbyte.errors import InputError
from halfbyte.layers import Codes, Linear, ops
from halfbyte.models import Loaded
from halfbyte.qtensor import QTensor
from halfbyte.scheme import static

if TYPE_CHECKING:
    from halfbyte.kinds import Job
    from halfbyte.models.onnx_saving import Graph

NAME, SUFFIX = "onnx", ".onnx"
READER = "onnxruntime"
ADAPTERS = False
PRECISE = "session.x64quantprecision"  # onnxruntime's setting: exact sums of products of unsigned with signed integers


def _graph(job: Job) -> Graph:
    from halfbyte.models import onnx_graph  # imports onnx, which other kinds do not need

    if job.floats == torch.bfloat16:
        raise InputError("onnxruntime's CPU computes little in bfloat16; choose F32 or F16.")
    return onnx_graph.build(job.loaded, job.formats, job.floats)


def refuses(job: Job) -> str | None:
    """See Kind."""
    try:
        _graph(job)
    except InputError as e:
        return str(e).rstrip(".")
    return None


def remarks(job: Job) -> list[str]:
    """See Kind."""
    out = ["the tokenizer is no part of the file: programs take it from the model's folder"]
    if _graph(job).outgrows:
        out.append(
            "its weights are more than one file holds: they are in a second one, NAME.data, which stays beside it"
        )
    if job.floats is None and job.loaded.config.dtype == torch.bfloat16:
        out.append("bfloat16 is written as float32, since onnxruntime's CPU computes little in it; F16 is smaller")
    named = dict(ops(job.loaded.model))
    rounded = {name: op.input for name, op in named.items() if isinstance(op, Linear) and op.input}
    held = {n: job.formats.get(n) or (None if job.floats else op.weight.format) for n, op in named.items()}
    if any(f is not None and f.bits == 8 and name not in rounded for name, f in held.items()):
        out.append("products of floats with codes of 8 bits need onnxruntime 1.23 or later")
    if rounded:
        out.append("inputs are rounded to 8 bits: a last digit can turn a code over, so that programs that compute the "
                   "same differ by about what that rounding costs; --max-kl may have to be raised")  # fmt: skip
    if any(static(f) for f in rounded.values()):
        out.append(f"on x86 without VNNI onnxruntime's sums of 8-bit products are cut off unless {PRECISE} is set to 1")
    return out


def fitting(q: QTensor) -> QTensor | None:
    """See Kind. Codes are held as they are or not at all."""
    from halfbyte.models.onnx_weights import refuses

    return q if len(q.shape) == 2 and "order" not in q.parts and refuses(q.format, q.shape[1]) is None else None


def write(job: Job, path: Path) -> None:
    """See Kind. One weight at a time."""
    _graph(job).write(path, job.on_tensor)


def missing() -> str | None:
    """See Kind."""
    return None if find_spec("onnxruntime") else "pip install onnxruntime"


def open(path: Path, context: int) -> nn.Module:
    """See Kind."""
    return OnnxRuntime(path)


def differs(reader: nn.Module, loaded: Loaded) -> str | None:
    """See Kind. The file has no tokenizer."""
    return None


@torch.no_grad()
def ours(job: Job) -> Loaded:
    """The model as `write` has just written it, in float32: halfbyte does not read ONNX. It is the job's own, whose
    weights are what they became."""
    loaded = job.loaded
    if loaded.checkpoint is not None:
        loaded.checkpoint.materialize(loaded.model, loaded.config.dtype)
    for _, op in ops(loaded.model):
        if job.floats is not None:
            op.weight.dequantize()
        if isinstance(op.weight.stored, Codes):
            op.weight.store(replace(op.weight.stored.q, dtype=torch.float32))
    for p in loaded.model.parameters():
        p.data = p.data.to(job.floats or loaded.config.dtype).float()
    loaded.config.dtype = torch.float32
    return loaded


class OnnxRuntime(nn.Module):
    """An ONNX file in onnxruntime, on the CPU: its logits, and the cache that goes on from them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        runtime: Any = import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry(PRECISE, "1")
        self.session: Any = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.past = {i.name: i for i in self.session.get_inputs() if i.name.startswith("past_key_values.")}

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: Mapping[str, Any] | None = None, **_: Any,
    ) -> Any:  # fmt: skip
        """input_ids (rows, n), filled up on either side -> .logits (rows, n, vocabulary) float32, and
        .past_key_values, with which the next tokens go on. attention_mask: (rows, past + n)."""
        past = self._nothing(len(input_ids)) if past_key_values is None else past_key_values
        known = next(iter(past.values())).shape[2]
        mask = input_ids.new_ones(len(input_ids), known + input_ids.shape[1])
        mask = mask if attention_mask is None else attention_mask.long()
        if position_ids is None:
            position_ids = (mask.cumsum(1) - 1).clamp(min=0)[:, known:]
        given = {"input_ids": input_ids, "attention_mask": mask, "position_ids": position_ids}
        found = self.session.run(None, {**{k: v.contiguous().numpy() for k, v in given.items()}, **past})
        logits, *present = found
        return SimpleNamespace(
            logits=torch.from_numpy(logits).float(), past_key_values=dict(zip(past, present, strict=True))
        )

    def _nothing(self, rows: int) -> dict[str, Any]:
        """A cache of no tokens."""
        dtypes = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}
        return {
            name: torch.zeros(rows, i.shape[1], 0, i.shape[3], dtype=dtypes[i.type]).numpy()
            for name, i in self.past.items()
        }
