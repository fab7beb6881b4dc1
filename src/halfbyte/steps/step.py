"""What a step is, and what steps share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from halfbyte import data
from halfbyte.errors import InputError
from halfbyte.run import Run

T = TypeVar("T")
Positive = Annotated[int, Field(ge=1)]


def checked(make: Callable[[], T]) -> T:
    """Calls `make`, which makes a pydantic model; what that finds wrong becomes one sentence. Raises InputError."""
    try:
        return make()
    except ValidationError as e:
        first = e.errors()[0]
        if isinstance(own := first.get("ctx", {}).get("error"), InputError):
            raise own from None
        key = ".".join(str(p) for p in first["loc"])
        said = {"extra_forbidden": "there is no such key", "missing": "it is missing"}.get(first["type"])
        said = said or f"{first['msg'].replace('Input', 'it', 1)} (got {str(first['input'])[:60]!r})"
        raise InputError(f"{key or 'value'}: {said}.") from None


class Step(BaseModel):
    """Something done to a run. Fields are checked when it is made: InputError for a misspelt or impossible one."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    if not TYPE_CHECKING:  # a type checker knows the fields better

        def __init__(self, **settings: Any) -> None:
            checked(lambda: super(Step, self).__init__(**settings))

    def __call__(self, run: Run) -> None:
        """Moves the run on. Raises InputError for what cannot be done."""
        raise TypeError(f"{type(self).__name__} is no step by itself.")


def check_length(rows: data.Dataset, run: Run, flag: str) -> None:
    """Raises InputError if a row is longer than the model has positions for."""
    longest, most = max(map(len, rows.rows)), getattr(run.model.config, "max_position_embeddings", None)
    if most is not None and longest > most:
        raise InputError(f"rows of {longest} tokens are more than the {most} that this model takes: {flag} {most}.")


def read(source: Any) -> list[data.Record]:
    """Records from a file's path, or from objects given in Python."""
    if isinstance(source, str | Path):
        return data.read_records(source)
    source = list(source)
    return source if source and isinstance(source[0], data.Record) else data.records(source)


def is_word(source: Any, word: str) -> bool:
    """Whether a source of text is a word that stands for one, such as "self"; it may be records, or a Dataset."""
    return isinstance(source, str) and source == word


def pad_id(run: Run) -> int:
    """What rows are filled up with; it is never trained, so that any id will do."""
    pad = run.needs_tokenizer.pad_token_id
    return pad if pad is not None else data.end_of_text(run.tokenizer)
