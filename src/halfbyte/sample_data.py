"""Data that every Python installation holds, as files to try things on: how such files are made.

    domain-*.jsonl       {"text"}                  the Python language reference, by topic
    docstrings-*.jsonl   {"prompt", "completion"}  functions of the standard library, and their docstrings

What is held out shares no topic and no module with what is trained on, and no passage, function or docstring
either: a model that has learnt its training data by heart would look as if it had learnt the domain.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

from halfbyte.errors import InputError

Split = dict[str, list[dict[str, str]]]  # "train" and "heldout"

INSTRUCTION = "\n# The docstring:\n"
_NOT_OURS = {
    "idlelib",
    "lib2to3",
    "turtledemo",
    "distutils",
    "ensurepip",
    "pydoc_data",
    "antigravity",
    "this",
}
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_vendor"}
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def domain_text(seed: int = 0, fraction: float = 0.12) -> Split:
    """{"text"} records, one a topic of the language reference, about `fraction` of the characters held out.

    Topics with a passage in common are on the same side; a topic of which less than a tenth is new is left out.
    Raises InputError if this Python comes without the reference.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise InputError("This Python has no pydoc_data, the language reference; use another.") from None
    # the largest first: smaller topics are often sections of larger ones
    names = sorted(topics, key=lambda name: (-len(topics[name]), name))
    texts: dict[str, str] = {}
    passages: dict[str, set[str]] = {}
    for name in names:
        own = _passages(topics[name])
        if len(own.difference(*passages.values())) > 0.1 * len(own):
            texts[name], passages[name] = topics[name].strip(), own
    limit = fraction * sum(map(len, texts.values()))
    held: set[str] = set()
    for group in sorted(_sharing(passages), key=lambda group: _hashed(seed, min(group))):
        size = sum(len(texts[name]) for name in held | group)
        if size <= limit:
            held |= group
    return {
        "train": [{"text": texts[name]} for name in sorted(texts.keys() - held)],
        "heldout": [{"text": texts[name]} for name in sorted(held)],
    }


def docstring_task(seed: int = 0, fraction: float = 0.12) -> Split:
    """{"prompt", "completion"} records: a function of the standard library without its docstring, and that.

    About `fraction` of the modules are held out, packages whole; no function and no docstring comes twice.
    Raises InputError if this Python comes without the sources of its library.
    """
    parts: Split = {"train": [], "heldout": []}
    for module, path in _library_sources():
        side = "heldout" if _hashed(seed, _family(module)) < fraction else "train"
        parts[side] += _documented_functions(path.read_text(encoding="utf-8"))
    if not parts["train"] or not parts["heldout"]:
        raise InputError("This Python has no sources of its standard library; use another.")
    seen: set[str] = set()
    return {side: [record for record in parts[side] if _new(record, seen)] for side in parts}


def write(folder: str | Path, seed: int = 0) -> list[Path]:
    """Writes {domain,docstrings}-{train,heldout}.jsonl into `folder`, made if needed; returns the paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, parts in (("domain", domain_text(seed)), ("docstrings", docstring_task(seed))):
        for side, records in parts.items():
            path = folder / f"{name}-{side}.jsonl"
            lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            path.write_text("".join(lines), encoding="utf-8", newline="\n")
            written.append(path)
    return written


def _hashed(seed: int, name: str) -> float:
    """A number in [0, 1) from the name: a module keeps its side when other Pythons add or lose modules."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:6]) / 2**48


def _passages(text: str, length: int = 16) -> set[str]:
    """Every run of `length` words: however a shared passage is laid out, both texts have one of these."""
    words = text.split()
    return {" ".join(words[i : i + length]) for i in range(len(words) - length + 1)}


def _sharing(passages: dict[str, set[str]]) -> list[set[str]]:
    """The names in groups: two with a passage in common, or linked by a chain of such, are in one group."""
    groups: list[tuple[set[str], set[str]]] = []
    for name, own in passages.items():
        linked = [group for group in groups if group[1] & own]
        groups = [group for group in groups if not group[1] & own]
        groups.append(({name}.union(*(g[0] for g in linked)), own.union(*(g[1] for g in linked))))
    return [names for names, _ in groups]


def _library_sources() -> Iterator[tuple[str, Path]]:
    """(top-level module, source file), in order of name."""
    library = Path(sysconfig.get_path("stdlib"))
    for module in sorted(sys.stdlib_module_names - _NOT_OURS):
        files = [library / f"{module}.py"] if (library / f"{module}.py").is_file() else []
        files += sorted((library / module).rglob("*.py"))
        yield from ((module, f) for f in files if _SKIPPED_FOLDERS.isdisjoint(f.relative_to(library).parts))


def _family(module: str) -> str:
    """`_pydecimal` is decimal in Python, `_strptime` a part of time: one side for both."""
    return module.removeprefix("_py").lstrip("_")


def _documented_functions(source: str) -> Iterator[dict[str, str]]:
    lines = source.split("\n")  # not splitlines(), which cuts at form feeds too, unlike the parser
    for function in _functions(ast.parse(source).body):
        docstring = ast.get_docstring(function)  # cleaned of its indentation
        if docstring is None or not 20 <= len(docstring) <= 400 or len(function.body) < 2:
            continue
        first = min(node.lineno for node in (function, *function.decorator_list))
        quoted, last = function.body[0], function.end_lineno or first
        above, below = lines[first - 1 : quoted.lineno - 1], lines[quoted.end_lineno : last]
        alone = function.body[1].lineno > (quoted.end_lineno or last) and function.lineno < quoted.lineno
        if not alone or last - first >= 60:
            continue
        while below and not below[0].strip():
            below.pop(0)
        code = textwrap.dedent("\n".join([*above, *below]))
        if not code.startswith(" "):  # it does where a string in it has lines at the left margin
            yield {"prompt": code + INSTRUCTION, "completion": docstring}


def _functions(body: Iterable[ast.stmt]) -> Iterator[_Function]:
    """Functions at the top level and methods of classes there."""
    for node in body:
        if isinstance(node, _Function):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield from (method for method in node.body if isinstance(method, _Function))


def _new(record: dict[str, str], seen: set[str]) -> bool:
    if not seen.isdisjoint(record.values()):
        return False
    seen.update(record.values())
    return True
