"""What a run's result is written as: a folder, or the file that the output's name says it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from halfbyte import adapters, export
from halfbyte.errors import BudgetExceeded, InputError
from halfbyte.folders import FILES, whole
from halfbyte.kinds import KINDS, kind
from halfbyte.run import MASTERS, Run
from halfbyte.scheme import Mix, Scheme, to_scheme
from halfbyte.steps import Adapt, Dequantize, Freeze, Grid, Merge, Step

Say = Callable[[str], None]


def is_file(output: Path) -> bool:
    """Whether the output's name says that it is a file."""
    return output.suffix in FILES


def check(run: Run, steps: Sequence[Step], output: Path, say: Say = lambda line: None) -> None:
    """Raises InputError now, rather than when it is written, where the output cannot hold what the steps make of the
    run's model. An adapter may be merged into any output: it says so where that has to be a file."""
    adapter, chosen = _result(steps)
    if adapter and is_file(output):
        raise InputError(f"-o {output}: an adapter is a folder of PEFT's. `halfbyte merge` then writes the file.")
    if is_file(output):
        why = export.refuses(run.loaded, kind(None, output), chosen)
        if why is not None:
            raise InputError(f"{run.loaded.source} cannot be written as {output.name}: {why}.")
    elif adapter and chosen is not None:
        _check_merged(run, chosen, say)
    elif chosen is not None:
        run.holds(chosen)


def _result(steps: Sequence[Step]) -> tuple[bool, Scheme | Mix | None]:
    """Whether an adapter comes out, and the scheme that the weights are then in, or an adapter's sums are seen
    through."""
    adapter, grid, codes = False, None, None
    for s in steps:
        if isinstance(s, Adapt):
            adapter, codes = True, None  # a sum on codes is made floats when it is merged
        elif isinstance(s, Merge):
            adapter, codes = False, None
        elif isinstance(s, Grid):
            grid = to_scheme(s.scheme, s.group_size)
        elif isinstance(s, Freeze):
            made = grid if s.scheme is None else to_scheme(s.scheme, s.group_size)
            adapter, grid, codes = False, made if s.learn else None, made
        elif isinstance(s, Dequantize):
            codes = None
    return adapter, grid or codes


def _check_merged(run: Run, chosen: Scheme | Mix, say: Say) -> None:
    try:
        run.holds(chosen)
    except InputError:
        files = [k for k in KINDS.values() if k.SUFFIX and not k.ADAPTERS]
        fits = [k.SUFFIX for k in files if export.refuses(run.loaded, k, chosen) is None]
        if not fits:
            raise
        say(f"note: no folder layout holds {chosen.name}: merge the adapter into OUT{' or OUT'.join(fits)}")


def write_file(
    run: Run, output: Path, proof: export.Proof | None = None, overwrite: bool = False, resume: bool = False,
    say: Say = lambda line: None, on_tensor: Callable[[int, int], None] = lambda done, total: None,
    source: str | None = None,
) -> export.Exported:  # fmt: skip
    """The result as one file, read back by the program that it is for unless proof is None, its ledger beside it.
    source: the MODEL that it is measured against; the run's own if left out. Raises InputError and BudgetExceeded as
    `export.export` does, and InputError for an adapter."""
    if adapters.attached(run.model):
        raise InputError(f"{output}: an adapter is a folder of PEFT's; merge it into the file.")
    target = kind(None, output)
    job = export.prepare(run.loaded, target, None, False, say)
    job.on_tensor = on_tensor
    if run.masters:
        say(f"the floats that were trained are not kept: a folder has {MASTERS}/ for them, {output.name} has no place")
    return export.export(source or run.loaded.source, job, target, output, proof, overwrite, say, resume, run.rows)


def save(run: Run, output: str | Path, overwrite: bool = False, say: Say = lambda line: None) -> Path:
    """Writes the result, whole or not at all: a PEFT adapter folder while adapters are unmerged, else a model's folder
    or, by the output's name, a file, which the program that it is for reads back. Raises InputError if it exists, and
    BudgetExceeded where that program computes something else than we do, of what is kept all the same."""
    target = Path(output)
    if is_file(target):
        done = write_file(run, target, export.Proof(keep=True), overwrite, say=say)
        if done.differs:
            raise BudgetExceeded(done.differs)
        return target
    with whole(target, overwrite) as partial:
        run.write(partial, target.name)
    return target
