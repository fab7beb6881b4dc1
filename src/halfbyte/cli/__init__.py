"""The command line. A verb is a file here, imported when called, and a row in VERBS."""

from __future__ import annotations

import errno
import os
import sys
from importlib import import_module
from typing import Annotated

import typer

from halfbyte.errors import BudgetExceeded, InputError

VERBS = ("demo", "quantize", "train", "merge", "evaluate", "generate", "plan", "inspect", "run", "doctor")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"halfbyte {version('halfbyte')}")
        raise typer.Exit


def _app(argv: list[str]) -> typer.Typer:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)

    @app.callback()
    def halfbyte(
        version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    ) -> None:
        """Make a pretrained language model small, fast and yours, and measure what each step cost."""

    called = next((a for a in argv if not a.startswith("-")), None)
    for verb in (called,) if called in VERBS else VERBS:
        app.command(verb)(import_module(f"halfbyte.cli.{verb}").command)
    return app


def main(argv: list[str] | None = None) -> None:
    """Runs a command. Exit status: 0 done; 2 bad input or usage; 3 a budget was exceeded; 1 anything else."""
    argv = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        _app(argv)(argv)
    except InputError as e:
        _fail(2, str(e))
    except BudgetExceeded as e:
        _fail(3, str(e))
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            _fail(2, f"no space left on the disk for {e.filename or 'the output'}; nothing was kept.")
        if e.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EISDIR):
            _fail(2, f"{e.filename}: {e.strerror}.")
        raise
    except KeyboardInterrupt:
        _fail(130, "stopped.")


def _fail(status: int, sentence: str) -> None:
    print(f"halfbyte: {sentence}", file=sys.stderr, flush=True)
    raise SystemExit(status)
