"""The ledger: what a model loses against a reference, on text that it was not trained on, with errors."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfbyte import kv_cache
from halfbyte.data import Batch, Dataset, Record, encode_choices, eval_batches, label_choices
from halfbyte.data import Row as EncodedRow
from halfbyte.errors import BudgetExceeded, InputError
from halfbyte.formats import Format

LEDGER = "ledger.json"
CONTEXT = 512  # tokens: pinned, so that numbers compare
_RESAMPLES = 2000
_QUANTILES = 200  # resamples of a quantile: each needs a pass over all tokens


@dataclass
class Row:
    """One line of the ledger. Errors are standard errors; the interval is 95%; all are bootstrapped over windows
    (records, for tasks), which are what is independent. None where there is no reference, or no labels. data_sha256:
    of the records; against_sha256: of the reference's weights, where it was read from a model's files."""

    perplexity: float | None = None
    perplexity_error: float | None = None
    loss: float | None = None
    loss_difference: float | None = None
    loss_difference_low: float | None = None
    loss_difference_high: float | None = None
    kl_mean: float | None = None
    kl_error: float | None = None
    kl_p99: float | None = None
    kl_p99_error: float | None = None
    top1_agreement: float | None = None
    top1_error: float | None = None
    accuracy: float | None = None
    accuracy_error: float | None = None
    tokens: int = 0
    windows: int = 0
    context: int = CONTEXT
    bytes: int = 0
    bits_per_weight: float | None = None
    conventions: str = ""
    data_sha256: str = ""
    against_sha256: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Reference:
    """A model's float32 logits on the batches of one data set; kept, while they fit, for the next stage.

    keep: bytes of memory they may take; what does not fit is computed again each time. sha256: of the files that the
    model is as it was read from, if it is.
    """

    def __init__(self, model: nn.Module, keep: int = 0, sha256: str = "") -> None:
        self.model, self.keep, self.sha256 = model.eval(), keep, sha256
        self._kept: dict[int, Tensor] = {}

    def log_probs(self, i: int, batch: Batch) -> Tensor:
        """(targets, vocabulary) float32 of the i-th batch."""
        if i in self._kept:
            return self._kept[i]
        out = _log_probs(self.model, batch)
        if self.keep >= out.nbytes:
            self._kept[i], self.keep = out, self.keep - out.nbytes
        return out


def _log_probs(model: nn.Module, batch: Batch, cache: Format | None = None) -> Tensor:
    """(targets, vocabulary) float32, rows of the batch one after the other."""
    logits = model(**_inputs(model, batch.inputs, cache)).logits[:, :-1]
    return F.log_softmax(logits[batch.labels[:, 1:] != -100].float(), -1)


def _inputs(model: nn.Module, inputs: dict[str, Any], cache: Format | None) -> dict[str, Any]:
    if cache is None:
        return inputs
    if "position_ids" in inputs:
        raise InputError("--kv-cache: samples that share a row would attend to each other; measure them unpacked.")
    return {**inputs, **kv_cache.quantized(model, cache)}


@torch.inference_mode()
def measure(
    model: nn.Module,
    dataset: Dataset,
    reference: Reference | None = None,
    batch_size: int = 4,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
    cache: Format | None = None,
) -> Row:
    """Perplexity and, with a reference, KL(reference || model), top-1 agreement and the paired loss difference.
    cache: a format that the model's keys and values are seen through, as when it writes with such a cache.

    Only the data set's targets count: all tokens but the first of a window of text; completions, for tasks.
    Logits are taken in each model's own dtype and compared in float32; every row counts by its tokens. Raises
    InputError where either computes NaN.
    """
    model.eval()
    found: dict[str, list[Tensor]] = {"nll": [], "kl": [], "same": [], "base": []}
    owner: list[Tensor] = []
    total = -(-len(dataset) // batch_size)
    for i, batch in enumerate(eval_batches(dataset, batch_size, 0)):
        ours = _log_probs(model, batch, cache)
        wanted = batch.labels[:, 1:] != -100
        labels = batch.labels[:, 1:][wanted][:, None]
        owner.append(wanted.nonzero()[:, 0] + i * batch_size)
        found["nll"].append(_numbers(-ours.gather(1, labels)[:, 0], "the model"))
        if reference is not None:
            theirs = reference.log_probs(i, batch)
            if theirs.shape != ours.shape:
                raise InputError(
                    f"the reference has {theirs.shape[1]} tokens in its vocabulary, the model {ours.shape[1]}."
                )
            found["base"].append(_numbers(-theirs.gather(1, labels)[:, 0], "the reference"))
            found["same"].append((ours.argmax(1) == theirs.argmax(1)).float())
            found["kl"].append(F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1))
        on_batch(i + 1, total)
    values = {k: torch.cat(v).double() for k, v in found.items() if v}
    row = _row(values, torch.cat(owner), dataset)
    if cache is not None:
        row.conventions += f"; keys and values in {cache.name}"
    return row


def _numbers(losses: Tensor, whose: str) -> Tensor:
    if losses.isnan().any():
        raise InputError(
            f"{whose} computes NaN on this text: a weight holds NaN or infinity, or numbers overflow in its dtype."
        )
    return losses


def _row(values: dict[str, Tensor], owner: Tensor, dataset: Dataset) -> Row:
    """Token values -> means, and errors from resampling whole windows."""
    windows = len(dataset)
    count = torch.zeros(windows, dtype=torch.double).index_add_(0, owner, torch.ones(len(owner), dtype=torch.double))
    picks = torch.randint(windows, (_RESAMPLES, windows), generator=torch.Generator().manual_seed(0))

    def resampled(v: Tensor) -> Tensor:
        sums = torch.zeros(windows, dtype=torch.double).index_add_(0, owner, v)
        return sums[picks].sum(1) / count[picks].sum(1).clamp(min=1)

    def error(v: Tensor) -> float | None:
        return resampled(v).std().item() if windows > 1 else None

    nll = values["nll"]
    loss = nll.mean().item()
    spread = error(nll)
    row = Row(perplexity=nll.mean().exp().item(), loss=loss, tokens=len(nll), windows=windows)
    row.data_sha256 = dataset.sha256
    row.perplexity_error = None if spread is None else row.perplexity * spread  # pyright: ignore
    longest = max(len(r) for r in dataset.rows)
    row.conventions = {
        "text": f"records joined by the end-of-text token, windows of {longest} that do not overlap",
        "self": f"rows of {longest} that the reference wrote itself, at temperature 1; only what it drew counts",
    }.get(dataset.kind, "each record alone; only its completion counts")
    if "kl" in values:
        difference = nll - values["base"]
        row.loss_difference = difference.mean().item()
        if windows > 1:
            low, high = resampled(difference).quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
            row.loss_difference_low, row.loss_difference_high = low, high
        row.kl_mean, row.kl_error = values["kl"].mean().item(), error(values["kl"])
        row.kl_p99 = values["kl"].quantile(0.99).item() if len(nll) < 1 << 24 else None
        row.kl_p99_error = _quantile_error(values["kl"], 0.99, owner, picks[:_QUANTILES]) if windows > 1 else None
        row.top1_agreement, row.top1_error = values["same"].mean().item(), error(values["same"])
        row.conventions += "; float32 logits of the reference"
    return row


def _quantile_error(values: Tensor, q: float, owner: Tensor, picks: Tensor) -> float:
    """Standard error of a quantile of token values, resampled by windows: a token counts as often as its window."""
    order = values.argsort()
    found = []
    for pick in picks:
        weight = torch.bincount(pick, minlength=picks.shape[1])[owner[order]].cumsum(0)
        at = torch.searchsorted(weight, weight[-1:] * q)
        found.append(values[order[at.clamp(max=len(order) - 1)]])
    return torch.cat(found).std().item()


@torch.inference_mode()
def accuracy(
    model: nn.Module,
    records: Sequence[Record],
    tokenizer: Any,
    max_length: int = CONTEXT,
    cache: Format | None = None,
) -> tuple[float, float]:
    """Share of labelled records whose own label a causal model finds likeliest, and the share's standard error. cache:
    see measure."""
    labels = label_choices(records)
    right = []
    for record in records:
        scores = [_likelihood(model, row, cache) for row in encode_choices(record, labels, tokenizer, max_length)]
        right.append(labels[int(torch.stack(scores).argmax())] == record["label"])
    return share_and_error(torch.tensor(right).double())


def _likelihood(model: nn.Module, row: EncodedRow, cache: Format | None) -> Tensor:
    """Log-probability of a row's targets."""
    inputs = _inputs(model, {"input_ids": row.input_ids[None], "use_cache": False}, cache)
    logits = model(**inputs).logits[0, :-1][row.targets[1:]].float()
    return F.log_softmax(logits, -1).gather(1, row.input_ids[1:][row.targets[1:]][:, None]).sum()


def share_and_error(right: Tensor) -> tuple[float, float]:
    """The mean of zeros and ones, and its standard error."""
    share = right.mean().item()
    return share, (share * (1 - share) / len(right)) ** 0.5


@torch.inference_mode()
def classification(model: nn.Module, dataset: Dataset, batch_size: int = 8) -> Row:
    """Accuracy and loss of a classification head."""
    right, losses = [], []
    for batch in eval_batches(dataset, batch_size, 0):
        logits = model(**batch.inputs).logits.float()
        right.append((logits.argmax(1) == batch.labels).double())
        losses.append(F.cross_entropy(logits, batch.labels, reduction="none").double())
    hit, loss = torch.cat(right), torch.cat(losses)
    share, error = share_and_error(hit)
    row = Row(accuracy=share, accuracy_error=error, loss=loss.mean().item(), tokens=dataset.tokens, windows=len(hit))
    row.data_sha256 = dataset.sha256
    return row


def check_budget(row: Row, max_kl: float | None, max_loss: float | None) -> None:
    """Raises BudgetExceeded if the mean KL or the loss is above what the user allows, InputError if it cannot be
    known without a reference."""
    if max_kl is not None:
        if row.kl_mean is None:
            raise InputError("--max-kl needs a reference: add --against MODEL.")
        if not row.kl_mean <= max_kl:
            raise BudgetExceeded(f"mean KL {row.kl_mean:.4f} is above --max-kl {max_kl}.")
    if max_loss is not None and not (row.loss or 0.0) <= max_loss:
        raise BudgetExceeded(f"loss {row.loss:.4f} is above --max-loss {max_loss}.")


def write_ledger(folder: Path, stage: str, row: dict[str, Any]) -> None:
    """Adds a line to ledger.json in a model's folder: a list of objects, one a stage."""
    file = folder / LEDGER
    rows = json.loads(file.read_text()) if file.exists() else []
    rows.append({"stage": stage, **row})
    file.write_text(json.dumps(rows, indent=1) + "\n")
