"""halfbyte train MODEL --data FILE --method METHOD -o OUT"""

from __future__ import annotations

import json as json_module
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte.cli.console import (
    Dtype,
    GroupSize,
    Json,
    ModelArgument,
    NoVerify,
    Output,
    Overwrite,
    Revision,
    Transforms,
    Untie,
    emit,
    progress,
    say,
    training_progress,
)
from halfbyte.cli.transforms import announce

if TYPE_CHECKING:
    from halfbyte.run import Run
    from halfbyte.steps import Step


def command(
    context: typer.Context,
    model: ModelArgument,
    data: Annotated[str, typer.Option(help=".jsonl, .json or .txt: text, messages, prompt/completion, text/label.")],
    output: Output,
    method: Annotated[str, typer.Option(help="full, lora, qlora, qa-lora, qat, qat-lora or scales.")] = "lora",
    to: Annotated[
        str | None, typer.Option(help="The scheme of qat, qat-lora, scales; of the base of qlora (NF4), qa-lora.")
    ] = None,
    group_size: GroupSize = None,
    eval_data: Annotated[str | None, typer.Option(help="Held-out data, measured while training.")] = None,
    eval_split: Annotated[float, typer.Option(help="Or this share of the data, by record.")] = 0.0,
    eval_steps: Annotated[int, typer.Option(help="Steps between held-out losses; 0 is ten times a run.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Steps in all; the data is cycled.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Or passes over the data (3 if neither is given).")] = None,
    batch_size: int = 8,
    gradient_accumulation_steps: int = 1,
    max_length: Annotated[int, typer.Option(help="Tokens a row; longer text is split, never dropped.")] = 512,
    packing: Annotated[bool, typer.Option(help="Several samples share a row.")] = True,
    completion_only_loss: Annotated[bool, typer.Option(help="Prompts are read, not learnt.")] = True,
    assistant_only_loss: Annotated[bool, typer.Option(help="Only the assistant's turns are learnt.")] = True,
    lr: Annotated[float | None, typer.Option(help="2e-4 adapters, 2e-5 full and scales, 1e-5 qat.")] = None,
    loss: Annotated[str, typer.Option(help="ce: the text's; kl: from the model as it was; or both.")] = "ce",
    teacher: Annotated[str | None, typer.Option(help="A MODEL that --loss kl holds it to instead.")] = None,
    cache_teacher: Annotated[
        bool, typer.Option("--cache-teacher", help="Run it once; keep its states on disk.")
    ] = False,
    teacher_top_k: Annotated[int | None, typer.Option(help="Or the likeliest tokens alone, as many.")] = None,
    init: Annotated[str | None, typer.Option(help="The solver whose codes qat, qat-lora, scales begin from.")] = None,
    transform: Transforms = None,
    untie: Untie = False,
    scale_lr_ratio: Annotated[float, typer.Option(help="The rate of scales that are learned, over --lr.")] = 1.0,
    loraplus_lr_ratio: Annotated[float, typer.Option(help="The rate of LoRA's B, over --lr (LoRA+).")] = 1.0,
    norms: Annotated[bool, typer.Option("--norms", help="--method scales trains norms too.")] = False,
    fake_quant_after_n_steps: Annotated[int, typer.Option(help="Steps of qat that see no grid yet.")] = 0,
    lr_scheduler_type: str = "cosine",
    warmup_ratio: float = 0.03,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    bf16: Annotated[bool, typer.Option("--bf16", help="Products in bfloat16, for models in float32.")] = False,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Less memory, a third more time.")] = False,
    seed: int = 0,
    r: Annotated[int, typer.Option("--r", help="The rank of LoRA.")] = 16,
    lora_alpha: float = 32,
    lora_dropout: float = 0.0,
    use_rslora: Annotated[bool, typer.Option("--use-rslora", help="Scale by alpha / sqrt(r).")] = False,
    use_dora: Annotated[bool, typer.Option("--use-dora", help="DoRA: train the norms of rows too.")] = False,
    init_lora_weights: Annotated[
        str | None, typer.Option(help="gaussian, orthogonal, pissa, pissa_niter_N, olora, loftq or eva.")
    ] = None,
    target_modules: Annotated[str, typer.Option(help="all-linear, a comma-separated list, or a regex.")] = "all-linear",
    adapter: Annotated[str | None, typer.Option(help="Go on from this adapter folder.")] = None,
    dtype: Dtype = None,
    revision: Revision = None,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints that --resume goes on from; 0: none.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from an interrupted run of this command.")] = False,
    overwrite: Overwrite = False,
    no_verify: NoVerify = False,
    json: Json = False,
) -> None:
    """Fine-tune a model: all of it, LoRA, QLoRA, quantization-aware, or only its scales."""
    from halfbyte.export import chosen
    from halfbyte.folders import check_free, finished
    from halfbyte.methods import METHODS, check_learned, method_steps
    from halfbyte.outputs import check, is_file
    from halfbyte.scheme import to_scheme
    from halfbyte.steps import Train, Transform

    if resume and finished(output, overwrite):
        say(f"{output} is finished; nothing to do.")
        if json:
            emit({"output": str(output), "method": method, **_finished(output)})
        return
    check_free(output, overwrite, model, data, eval_data, adapter)
    named = is_file(output) and group_size is None  # in a file, Q8_0 is the mix of llama.cpp's
    scheme = None if to is None else chosen(to) if named else to_scheme(to, group_size)
    narrator = _Narrator()
    settings = {k: v for k, v in context.params.items() if k in Train.model_fields}
    settings |= {"learning_rate": lr, "on_start": narrator.begin, "on_step": lambda row: narrator.step(row)}
    adapt: dict[str, Any] = {
        "r": r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout, "use_rslora": use_rslora,
        "use_dora": use_dora,
        "target_modules": target_modules.split(",") if "," in target_modules else _one(target_modules),
        "path": adapter,
        **({} if init_lora_weights is None else {"init_lora_weights": init_lora_weights}),
    }  # fmt: skip
    if not METHODS.get(method, METHODS["lora"]).adapts:  # it takes none, but says so only of those that were given
        adapt = {k: v for k, v in adapt.items() if _given(context, "adapter" if k == "path" else k)}
    plan = method_steps(method, scheme, settings, adapt, init, teacher, transform or [], untie)
    run = _load(model, data, eval_data, dtype, revision, seed)
    announce([step for step in plan if isinstance(step, Transform)], run)
    check_learned(run, plan, say)
    check(run, plan, output, say)
    if no_verify and not is_file(output):
        say("--no-verify is not used: a folder is not read back once it is trained.")
    take = partial(_take, run, plan, method)
    if is_file(output):
        told = _to_file(run, output, take, overwrite, resume, no_verify)
    else:
        told = _to_folder(run, output, take, overwrite, resume)
    assert run.log is not None
    summary = run.log.summary()
    say(f"{output}: {summary['steps']} steps in {summary['seconds']:.0f} s, loss {summary['loss']:.4f}")
    if json:
        emit({"output": str(output), "method": method, **summary, **_held(run.log.curve), **told})


def _take(run: Run, steps: Sequence[Step], method: str, checkpoint: Path) -> None:
    """The steps of a method in order, its training gone on with from the checkpoint where there is one."""
    from halfbyte.steps import Dequantize, Freeze

    run.checkpoint = checkpoint
    for step in steps:
        say(f"{type(step).__name__.lower()} ...")
        step(run)
        if isinstance(step, Dequantize) and (held := run.notes.get("dequantized")):
            dtype = str(run.loaded.config.dtype).removeprefix("torch.")
            say(f"the weights held as {', '.join(held)} are {dtype} from here on")
        if isinstance(step, Freeze) and (kept := run.notes.get("kept_codes")):
            say(f"{kept} weights stay the codes that they are")
    assert run.log is not None
    run.rows.append((f"trained ({method})", {"loss": run.log.curve[-1]["loss"], **_held(run.log.curve)}))


def _to_folder(
    run: Run, output: Path, take: Callable[[Path], None], overwrite: bool, resume: bool
) -> dict[str, Any]:  # fmt: skip
    """take: what is done, given the folder of its checkpoints."""
    from halfbyte.folders import CHECKPOINT, whole

    with whole(output, overwrite, resume) as unfinished:
        take(unfinished / CHECKPOINT)
        run.write(unfinished, output.resolve().name)
        if told := run.notes.get("peft"):
            say(f"note: {told}")
        _write_curve(unfinished / _CURVE, run)
    return {}


def _to_file(
    run: Run, output: Path, take: Callable[[Path], None], overwrite: bool, resume: bool, no_verify: bool
) -> dict[str, Any]:  # fmt: skip
    """Beside the file are its ledger and the curve of its training. Raises BudgetExceeded, but keeps what was trained,
    where its reader computes something else."""
    from halfbyte.errors import BudgetExceeded
    from halfbyte.export import Proof
    from halfbyte.folders import before, disk_bytes
    from halfbyte.outputs import write_file

    with before(output, overwrite, resume) as checkpoint:
        take(checkpoint)
        proof = None if no_verify else Proof(keep=True)
        done = write_file(run, output, proof, overwrite, True, say, progress("tensor"))
    _write_curve(output.with_suffix(f".{_CURVE}"), run)
    if done.differs:
        raise BudgetExceeded(done.differs)
    return {"bytes": disk_bytes(output), "read_back": done.read_back, "ledger": done.ledger}


_CURVE = "curve.jsonl"


def _write_curve(path: Path, run: Run) -> None:
    assert run.log is not None
    path.write_text("".join(json_module.dumps(row) + "\n" for row in run.log.curve))


def _given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _finished(output: Path) -> dict[str, Any]:
    """What the loss curve of a run that is done still tells."""
    path = output / _CURVE if output.is_dir() else output.with_suffix(f".{_CURVE}")
    lines = path.read_text().splitlines() if path.exists() else []
    curve = [json_module.loads(line) for line in lines]
    return {"steps": len(curve), "loss": curve[-1]["loss"] if curve else None, **_held(curve)}


def _one(target: str) -> str | list[str]:
    """A single word is a layer's name or ending; anything else a regular expression."""
    return [target] if target.replace("_", "").isalnum() and target != "all-linear" else target


def _held(curve: list[dict[str, float]]) -> dict[str, float]:
    return next(({"eval_loss": row["eval_loss"]} for row in reversed(curve) if "eval_loss" in row), {})


def _load(
    model: str, data: str, eval_data: str | None, dtype: str | None, revision: str | None, seed: int
) -> Run:  # fmt: skip
    """The model; a classifier of the data's labels where the architecture is an encoder."""
    from halfbyte import models, run
    from halfbyte.data import label_choices, read_records

    records = read_records(data)  # before the model: bad data should fail first
    if eval_data is not None:
        read_records(eval_data)
    labels = label_choices(records) if records[0].kind == "label" and models.is_encoder(model, revision) else None
    return run.load(model, dtype, revision, seed, labels)


class _Narrator:
    """Tells of a training: what it begins with, then its steps."""

    def begin(self, rows: Any, held: Any, args: Any, what: str) -> None:
        self.step = training_progress(args.steps)
        held_out = "" if held is None else f", {held.target_tokens} held-out targets"
        say(
            f"training {what}: {len(rows)} rows of {rows.kind}, {rows.tokens} tokens of which {rows.target_tokens} "
            f"are targets{held_out}; {args.steps} steps, lr {args.learning_rate:g}"
        )
        if rows.skipped:
            say(f"{rows.skipped} pieces of long prompts hold no target and are left out.")
