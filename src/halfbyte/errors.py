"""What a user can get wrong, as exceptions; the command line turns them into exit codes."""


class InputError(ValueError):
    """Bad input or usage: one sentence that names the file, line or flag and what to do. Exit status 2."""


class BudgetExceeded(RuntimeError):
    """A limit that the user set (--max-kl, --max-loss) was exceeded. Exit status 3."""
