"""Training that knows the format it ships in: what it wins back, and what it costs.

    python benchmarks/qat [--only kl,domain,seeds,roads,ranks,steps] [--steps 36] [--seeds 4] [--train] [--windows 6]
        [--novels FILE] [--json FILE]
    python benchmarks/qat --table FILE ...

The model is SmolLM2-135M off its grid (benchmarks/accuracy/setting.py), the text what it is calibrated on there: 4 rows
of 512 tokens a step, products in bfloat16, all else in float32. All is measured in float32, on held-out windows of two
domains, of which one was trained on; learning rates were chosen on windows of the training part that training does not
see (`--train --rates LR,LR`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "accuracy"))

import costs
import seeds
import tables
import trials
from setting import Setting

SECTIONS = {
    "kl": trials.held_to_the_teacher, "domain": trials.domain, "seeds": seeds.seeds, "roads": trials.roads,
    "ranks": costs.ranks, "steps": costs.steps,
}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, " + ",".join(SECTIONS))
    parser.add_argument("--rows", help="of a section: those in whose name this regular expression is found")
    parser.add_argument("--rates", help="learning rates, instead of each row's own")
    parser.add_argument("--steps", type=int, default=36)
    parser.add_argument("--seeds", type=int, default=4, help="of the section of that name")
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--train", action="store_true", help="measure on windows of the training part")
    parser.add_argument("--novels", type=Path, help="prose from this file, see accuracy/novels.py")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path, nargs="+")
    return parser.parse_args()


def rows(args: argparse.Namespace) -> Iterator[dict]:
    setting = Setting(args.windows, not args.train, 16, args.novels)
    rates = [float(r) for r in args.rates.split(",")] if args.rates else []
    for name in args.only.split(","):
        for row in SECTIONS[name](setting, trials.Asked(args.steps, args.rows or "", rates, args.seeds)):
            yield {"section": name, **row}


def main() -> None:
    args = arguments()
    if args.table:
        tables.show([json.loads(line) for file in args.table for line in file.read_text().splitlines()])
        return
    for row in rows(args):
        line = json.dumps(row)
        print(line, flush=True)
        if args.json:
            with args.json.open("a") as f:
                f.write(line + "\n")


if __name__ == "__main__":
    main()
