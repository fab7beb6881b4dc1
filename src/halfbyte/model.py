"""The library in objects: what `halfbyte.load` gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halfbyte import adapters, methods, named_adapters, outputs, run
from halfbyte.evaluate import Row
from halfbyte.generate import generate
from halfbyte.run import Run
from halfbyte.steps import Evaluate, Freeze, Step


class Model(Run):
    """A run with the verbs of the command line. `.model` inside is a plain nn.Module, `.tokenizer` transformers'."""

    def apply(self, *steps: Step) -> Model:
        """Takes steps in order."""
        for step in steps:
            step(self)
        return self

    def quantize(self, to: str, group_size: int | None = None, **options: Any) -> Model:
        """Post-training quantization; options: those of the Freeze step (solver, calibration)."""
        return self.apply(Freeze(scheme=to, group_size=group_size, **options))

    def train(
        self, data: Any, method: str = "lora", to: str | None = None, init: str | None = None,
        teacher: str | None = None, transforms: Sequence[str] = (), untie: bool = False, **options: Any
    ) -> Model:  # fmt: skip
        """Fine-tunes on a file or records by a method of methods.METHODS; options: those of Train and Adapt.
        init: the solver that codes begin from; teacher: a MODEL that loss="kl" holds it to; transforms, untie: what is
        done to the floats first."""
        settings = {"data": data, **options}
        steps = methods.method_steps(method, to, settings, None, init, teacher, transforms, untie)
        methods.check_learned(self, steps)
        return self.apply(*steps)

    def load_adapter(self, path: str | Path, name: str = adapters.NAME) -> Model:
        """Reads an adapter folder under a name, beside others. The first is in use at once."""
        named_adapters.load_adapter(self, Path(path), name)
        return self

    def set_adapter(self, name: str) -> Model:
        """Has the adapter of that name in use, and no other: it answers, is trained on, merged and saved."""
        named_adapters.set_adapter(self, name)
        return self

    @property
    def active_adapter(self) -> str | None:
        """The name of the adapter in use, if any."""
        return adapters.active(self.model)

    def merge(self, to: str | None = None) -> Model:
        """Folds adapters in; `to` quantizes the result (a run trained through a grid takes its own)."""
        return self.apply(*methods.merge_steps(self, to))

    def evaluate(self, data: Any, against: Run | str | None = None, stage: str = "evaluate") -> Row:
        """A row of the ledger; `against`: the reference, a MODEL (read in float32) or a loaded one."""
        self.apply(Evaluate(data=data, against=against, stage=stage))
        return Row(**self.rows[-1][1])

    def generate(self, prompt: str, max_new_tokens: int = 64, chat: bool = False, temperature: float = 0.0) -> str:
        """The continuation of a prompt, or the answer to it as a chat; greedy at temperature 0."""
        return generate(self.model, self.needs_tokenizer, prompt, max_new_tokens, chat, temperature).text

    def save(self, output: str | Path, overwrite: bool = False) -> Path:
        """Writes the result: a PEFT adapter folder while adapters are unmerged, else a model's folder or, named so, a
        .gguf or .onnx file."""
        return outputs.save(self, output, overwrite)


def load(source: str | Path, dtype: Any = None, **options: Any) -> Model:
    """Reads any MODEL: a Hugging Face folder or hub id, a .gguf file, a PEFT adapter folder, or a folder that
    halfbyte wrote. See halfbyte.run.load for the options. Raises InputError."""
    return Model(**vars(run.load(source, dtype, **options)))
