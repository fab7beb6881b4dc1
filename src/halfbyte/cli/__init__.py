"""The command line. A verb is a file here, imported when called, and a row in VERBS."""

from __future__ import annotations

import difflib
import errno
import os
import re
import sys
from importlib import import_module
from typing import Annotated, NoReturn

import typer

from halfbyte.errors import BudgetExceeded, Differs, Diverged, InputError

VERBS = (
    "demo",
    "quantize",
    "train",
    "merge",
    "evaluate",
    "generate",
    "export",
    "apply",
    "verify",
    "plan",
    "inspect",
    "run",
    "doctor",
)
_USAGE: type[Exception] = typer.BadParameter.__mro__[2]  # the parser's own complaints: click's ClickException
_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"halfbyte {version('halfbyte')}")
        raise typer.Exit


def _app(argv: list[str]) -> typer.Typer:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @app.callback()
    def halfbyte(
        version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    ) -> None:
        """Make a pretrained language model small, fast and yours, and measure what each step cost."""

    called = _called(argv)
    for verb in (called,) if called in VERBS else VERBS:
        app.command(verb)(import_module(f"halfbyte.cli.{verb}").command)
    return app


def _called(argv: list[str]) -> str | None:
    return next((a for a in argv if not a.startswith("-")), None)


def main(argv: list[str] | None = None) -> None:
    """Runs a command. Exit status: 0 done; 2 bad input or usage; 3 a budget was exceeded; 1 anything else."""
    argv = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch's large buffers in huge pages: fewer page faults
    try:
        status = _app(argv)(argv or ["--help"], prog_name="halfbyte", standalone_mode=False)
    except InputError as e:
        _fail(2, str(e))
    except BudgetExceeded as e:
        _fail(3, str(e))
    except (Diverged, Differs) as e:
        _fail(1, str(e))
    except _USAGE as e:
        _fail(2, _usage(e, argv))
    except KeyboardInterrupt:
        _fail(130, "stopped.")
    except Exception as e:
        if reason := _disk(e):
            _fail(2, reason)
        raise
    if status == 130:  # how typer gives back an interrupt
        _fail(130, "stopped.")
    if status or not argv:
        raise SystemExit(status or 2)


def _usage(e: Exception, argv: list[str]) -> str:
    """The parser's complaint in one sentence, with the nearest verb or the page that helps."""
    said = " ".join(e.format_message().split()).rstrip(".")  # pyright: ignore[reportAttributeAccessIssue]
    verb = _called(argv)
    if verb is None or verb in VERBS:
        return f"{said}; see halfbyte {f'{verb} ' if verb else ''}--help."
    near = difflib.get_close_matches(verb, VERBS, 1, 0.5)
    return f"there is no command {verb!r}{f'; did you mean {near[0]}?' if near else ''}; see halfbyte --help."


def _disk(e: Exception) -> str | None:
    """What the file system refused, in a sentence; None for any other failure."""
    code, where = (e.errno, e.filename) if isinstance(e, OSError) else (None, None)
    if code is None and (found := re.search(r"\(os error (\d+)\)", str(e))):  # safetensors' writer says it in words
        code = int(found[1])
    if code in _FULL:
        return f"no space left on the disk for {where or 'the output'}; nothing was kept."
    if code in _REFUSED:
        return f"{where or 'the output'}: {os.strerror(code)}."
    return None


def _fail(status: int, sentence: str) -> NoReturn:
    print(f"halfbyte: {sentence}", file=sys.stderr, flush=True)
    raise SystemExit(status)
