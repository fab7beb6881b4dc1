"""What a user can get wrong, as exceptions; the command line turns them into exit codes."""

_SAID = 240  # characters of what another library says: whole sentences, where one fits


class InputError(ValueError):
    """Bad input or usage: one sentence that names the file, line or flag and what to do. Exit status 2."""


def reason(e: BaseException) -> str:
    """What another library's exception says, as the end of a sentence."""
    said = " ".join((str(e) or type(e).__name__).split())
    if len(said) > _SAID:
        whole = said[:_SAID].rpartition(". ")[0]
        said = whole or said[:_SAID].rpartition(" ")[0]
    return said.rstrip(".!: ") + "."


class BudgetExceeded(RuntimeError):
    """A limit that the user set (--max-kl, --max-loss) was exceeded. Exit status 3."""


class Diverged(RuntimeError):
    """A loss or gradient became infinite or NaN: nothing worth keeping came out. Exit status 1."""


class Differs(RuntimeError):
    """What was verified is not what was claimed. Exit status 1."""
