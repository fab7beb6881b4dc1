"""Records: what a data file may hold, read and checked before anything else happens.

A record has one of four shapes, told apart by their keys, and a file holds one shape only:

    {"text"}                                domain text
    {"messages": [{"role", "content"}]}     a conversation
    {"prompt", "completion"}                a task
    {"text", "label"}                       labelled text
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.errors import InputError

SHAPES: dict[str, frozenset[str]] = {
    "text": frozenset({"text"}),
    "messages": frozenset({"messages"}),
    "completion": frozenset({"prompt", "completion"}),
    "label": frozenset({"text", "label"}),
}
_SHAPES_IN_WORDS = '"text", or "messages", or "prompt" and "completion", or "text" and "label"'


@dataclass(frozen=True)
class Record:
    """One checked record: its fields as in the file, its kind (a key of SHAPES), and where it was found."""

    kind: str
    fields: dict[str, Any]
    where: str

    def __getitem__(self, key: str) -> Any:
        return self.fields[key]

    @property
    def canonical(self) -> str:
        """The fields as JSON that does not depend on the order of keys or on spaces."""
        return json.dumps(self.fields, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def read_records(path: str | Path) -> list[Record]:
    """The records of a .jsonl file, of a .json file (a list), or of a .txt or .md file (one text record).

    Raises InputError, which names the file, the line (from 1; an index from 0 in .json) and the key, when
    the file cannot be read, is not UTF-8, holds no record, or holds a record that is not as described above.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if path.is_file() and suffix not in {".jsonl", ".json", ".txt", ".md"}:
        raise InputError(f"{path}: data is read from .jsonl, .json, .txt or .md files, not from {suffix!r}.")
    text = _read_text(path)
    if not text.strip():
        raise InputError(f"{path} is empty.")
    if suffix in {".txt", ".md"}:
        return [_checked({"text": text}, str(path))]
    if suffix == ".json":
        value = _parsed(text, str(path))
        if not isinstance(value, list):
            raise InputError(f"{path}: a .json data file is a list of records; use .jsonl for one per line.")
        return records(value, name=str(path))
    # only \n ends a line: JSON strings may hold U+2028 and other breaks that splitlines() would cut at
    lines = [(f"{path}, line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    return _uniform([_checked(_parsed(line, where), where) for where, line in lines], str(path))


def records(data: Iterable[Any], name: str = "data") -> list[Record]:
    """Checked records from dicts in memory; `name` and the index stand for file and line in errors.

    Raises InputError like read_records. Records that are checked already are passed on.
    """
    found = [d if isinstance(d, Record) else _checked(d, f"{name}, index {i}") for i, d in enumerate(data)]
    return _uniform(found, name)


def split(records: Sequence[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """(train, held out), each in the given order; about `fraction` of the distinct records are held out.

    Equal records stay on one side, since a held-out record that was trained on measures nothing. Raises
    InputError if `fraction` is not between 0 and 1 or if there are not two distinct records.
    """
    if not 0 < fraction < 1:
        raise InputError(f"The held-out fraction is {fraction}; it must lie between 0 and 1.")
    distinct = list(dict.fromkeys(r.canonical for r in records))
    if len(distinct) < 2:
        raise InputError(
            f"A held-out part needs two different records, not {len(distinct)}; give a held-out file instead."
        )
    count = min(max(1, round(len(distinct) * fraction)), len(distinct) - 1)
    held = set(random.Random(seed).sample(distinct, count))
    return [r for r in records if r.canonical not in held], [r for r in records if r.canonical in held]


def sha256(records: Iterable[Record]) -> str:
    """Hex SHA-256 of the records' canonical JSON, one a line: the same data has the same hash in any file."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(record.canonical.encode() + b"\n")
    return digest.hexdigest()


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise InputError(f"{path} is a folder; name the data file in it.")
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist.") from None
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e.strerror}.") from None
    if b"\0" in raw:
        raise InputError(f"{path} is a binary file (it holds a zero byte); data is UTF-8 text.")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = raw.count(b"\n", 0, e.start) + 1
        raise InputError(f"{path}, line {line} is not UTF-8; save the file as UTF-8.") from None


def _parsed(text: str, where: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f'the key "{twice}" appears twice')
        return value

    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{where}: not valid JSON ({e}).") from None


def _uniform(found: list[Record], name: str) -> list[Record]:
    if not found:
        raise InputError(f"{name} holds no records.")
    first = found[0]
    for record in found:
        if record.kind != first.kind:
            raise InputError(
                f"{record.where}: this record has the keys {_quoted(record.fields)}, but the first one "
                f"({first.where}) has {_quoted(first.fields)}; keep each shape in a file of its own."
            )
    return found


def _checked(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise InputError(f"{where}: a record is an object with keys, not {_named(value)}.")
    kind = next((kind for kind, shape in SHAPES.items() if shape == value.keys()), None)
    if kind is None:
        raise InputError(f"{where}: {_wrong_keys(value)}; a record holds {_SHAPES_IN_WORDS}, and nothing else.")
    if kind == "messages":
        return Record(kind, {"messages": _checked_messages(value["messages"], where)}, where)
    fields = dict(value)
    label = fields.get("label")
    if isinstance(label, int) and not isinstance(label, bool):
        fields["label"] = str(label)  # class numbers are common in data sets, and the label is learnt as text
    for key, field in fields.items():
        _check_string(field, f'"{key}"', where)
        if key in {"text", "label"} and not field.strip():
            raise InputError(f'{where}: "{key}" is empty; fill it in or remove the record.')
    return Record(kind, fields, where)


def _checked_messages(messages: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise InputError(f'{where}: "messages" must be a list of at least one message.')
    for i, message in enumerate(messages):
        name = f'"messages"[{i}]'
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            found = _quoted(message) if isinstance(message, dict) else _named(message)
            raise InputError(f'{where}: {name} must hold "role" and "content" and nothing else; it is {found}.')
        for key, field in message.items():
            _check_string(field, f'{name}["{key}"]', where)
        if not message["role"]:
            raise InputError(f'{where}: {name}["role"] is empty.')
    return [dict(m) for m in messages]


def _check_string(value: Any, key: str, where: str) -> None:
    if not isinstance(value, str):
        raise InputError(f"{where}: {key} must be a string, not {_named(value)}.")
    try:
        value.encode()
    except UnicodeEncodeError:
        # JSON can spell half of a surrogate pair, which no tokenizer takes
        raise InputError(f"{where}: {key} holds half of a surrogate pair, which is not a character.") from None


def _wrong_keys(value: dict[Any, Any]) -> str:
    """What is wrong with the keys, measured against the shape that they come closest to."""
    nearest = max(SHAPES.values(), key=lambda shape: (len(shape & value.keys()), -len(shape - value.keys())))
    if unknown := value.keys() - nearest:
        return f"unknown key {_quoted(unknown)}"
    return f"missing key {_quoted(nearest - value.keys())}"


def _quoted(keys: Iterable[Any]) -> str:
    return ", ".join(f'"{key}"' for key in sorted(map(str, keys))) or "no keys"


def _named(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    return names.get(type(value), "a list" if isinstance(value, list) else f"an object ({type(value).__name__})")
