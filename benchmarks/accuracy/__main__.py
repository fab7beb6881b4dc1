"""Accuracy per bit: our solvers, files and choices of formats beside the peers', on text that nothing was chosen on.

    python benchmarks/accuracy [--only floor,eight,w4,w3,w2,mixes,ik,sizes] [--windows 6] [--calibration 16]
        [--rows gptq,...] [--text prose] [--novels FILE] [--peers PYTHON] [--ik PROGRAM] [--json FILE]
    python benchmarks/accuracy --table FILE ...

The model is SmolLM2-135M off its grid (see setting.py). Every row is measured on held-out windows of two domains, of
which calibration text is of one (`--text prose`, `docstrings`) or of none (`self`): the mean KL to the float model, the
difference of losses on the same tokens with its 95% interval, and how often the likeliest token is the same; errors are
bootstrapped over windows. `--train` measures on windows of the training part instead that calibration does not see: for
experiments, so that choices made here do not spoil the held-out text. --novels: prose is Jane Austen's instead of the
demo's, on which the targets were measured.

--peers: the Python of a throw-away environment with the peers of peer.py. --ik: ik_llama.cpp's llama-quantize. What is
not given is named, and left out. --json adds the rows to a file, a line each, which --table prints as Markdown.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import files
import projections
import table
import torch
from setting import TEXTS, Setting

SECTIONS = "floor,eight,w4,w3,w2,mixes,ik,sizes"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=SECTIONS, help="sections, " + SECTIONS)
    parser.add_argument("--rows", help="solvers and peers of eight, w4, w3 and w2, all of them if left out")
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--calibration", type=int, default=16, help="rows of 512 tokens")
    parser.add_argument("--text", default="prose", choices=[*TEXTS, "self"])
    parser.add_argument("--mixes", default=files.MIXES)
    parser.add_argument("--ik-mixes", default=files.IK_MIXES)
    parser.add_argument("--sizes", default=files.SIZES, help="MB")
    parser.add_argument("--solver", default="gptq", help="of the files whose sizes are given")
    parser.add_argument("--novels", type=Path, help="prose from this file, see novels.py")
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--ik", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path, nargs="+")
    return parser.parse_args()


def section(name: str, setting: Setting, args: argparse.Namespace) -> Iterator[dict]:
    text = args.text
    if name == "floor":
        same = {"what": "bfloat16", "by": "the reference itself", "calibration": "", "MB": 269.0, "seconds": None}
        yield {**same, **setting.noise_floor()}
    elif name in projections.SECTIONS:
        named = None if args.rows is None else args.rows.split(",")
        rows = tuple(r for r in projections.SECTIONS[name] if named is None or r.name in named)
        yield from projections.measured(setting, rows, text, args.peers)
    elif name == "mixes":
        made = lambda folder: files.by_mix(setting, folder, args.mixes, text, text == "prose")  # noqa: E731
        yield from files.measured(setting, made, None)
    elif name == "ik" and args.ik is not None:
        yield from files.measured(setting, lambda _: files.by_ik(setting, args.ik, args.ik_mixes, text), args.ik)
    elif name == "sizes":
        yield from files.measured(setting, lambda _: files.by_size(setting, args.sizes, text, args.solver), None)


def main() -> None:
    args = arguments()
    if args.table:
        table.show([json.loads(line) for file in args.table for line in file.read_text().splitlines()])
        return
    for flag, what in (
        (args.peers, "--peers: without it the peers' solvers"),
        (args.ik, "--ik: without it ik's files"),
    ):
        if flag is None:
            print(f"{what} are left out.", flush=True)
    setting = Setting(args.windows, not args.train, args.calibration, args.novels)
    for name in args.only.split(","):
        assert name in SECTIONS.split(","), f"--only {name}: sections are {SECTIONS}."
        for row in section(name, setting, args):
            line = json.dumps({"section": name, **row})
            print(line, flush=True)
            if args.json:
                with args.json.open("a") as f:
                    f.write(line + "\n")


if __name__ == "__main__":
    with torch.no_grad():
        main()
