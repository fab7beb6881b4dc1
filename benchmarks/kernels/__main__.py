"""halfbyte's kernels beside their peers and the machine's limits, in one run.

    python benchmarks/kernels [--quick] [--only linear,gemm,...] [--shapes 4096x4096,...] [--json FILE]

Every target is a ratio of one race: all contenders take turns, medians are compared, and the machine's memory is one
of the contenders. Weights lie in memory so often that none comes from a cache (rows marked c: small ones that may).
What disagrees with its float64 reference is not timed, and the exit status is 1. HALFBYTE_ISA forces a kind of kernel.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import targets
import tensors
import torch
from contest import QUICK, Job, Plan, Shape, Space, attempt, checked, contest, ours, ours_int8
from peers import PEERS, Builder, Entrant, chosen
from race import Call, Contender, Limits, Pace, race
from report import Board, machine

from halfbyte.formats import parse


def limits(board: Board, plan: Plan) -> None:
    """DRAM, and torch's bfloat16 product as the limit of dot products."""
    board.compare("limits", "memory", "", 0, [board.limits.read, board.limits.copy])
    n = plan.square // 2
    x, w = torch.randn(n, n).bfloat16(), torch.randn(n, n).bfloat16()
    product = Contender("torch bf16", [partial(torch.nn.functional.linear, x, w)], 3 * x.nbytes)
    board.dots = 2 * n**3 / race([product], board.pace)[0] / 1e9
    board.console.print(f"dot products: {board.dots:.0f} GFLOP/s, torch's bfloat16 product of {n}x{n}x{n}\n")


def linear(board: Board, plan: Plan) -> None:
    """Few rows: the weight's bytes decide. 4 and 8 bits apart, as all copies of a race are in memory at once."""
    jobs = [Job("linear", m) for m in plan.few]
    for bits in (4, 8):
        formats = {f: Entrant(bits, partial(ours, f)) for f in plan.formats if parse(f).bits == bits}
        peers = {k: v for k, v in PEERS.items() if v.bits == bits} | chosen(
            *(("torch bf16", "torch fp32") if bits == 4 else ())
        )
        for shape in plan.shapes:
            contest(board, "linear", shape, jobs, formats | peers, plan.space)


def gemm(board: Board, plan: Plan) -> None:
    """Many rows, and the gradient: dot products decide, and torch's own bfloat16 product is what is to be met."""
    jobs = [Job(op, m) for op in ("linear", "linear_grad") for m in plan.many]
    some = {"int4-g128", "int4-g64", "nf4-g64", "q4_k", "int8-channel", "int8-g128"}  # g64 where 128 does not divide

    def left_out(name: str, job: Job) -> bool:
        return name not in PEERS and name not in some and job.m != 512

    formats = {f: Entrant(8, partial(ours, f)) for f in plan.formats}
    for shape in plan.shapes:
        int4 = "torch int4 g128" if shape[1] % 128 == 0 else "torch int4 g64"
        peers = chosen("torch bf16", int4, "bitsandbytes NF4", "FBGEMM dynamic int8")
        contest(board, "gemm", shape, jobs, formats | peers, Space(80 << 20, 8), "torch bf16", left_out)


def int8(board: Board, plan: Plan) -> None:
    """Inputs in int8: rounded in the call, as FBGEMM does it, or before it."""
    formats: dict[str, Entrant] = {}
    for name, f in (("W8A8 int8-channel", "int8-channel"), ("W4A8 int4-g128", "int4-g128")):
        formats[name] = Entrant(parse(f).bits, partial(ours_int8, f, False))
        formats[f"int8 x, {name}"] = Entrant(parse(f).bits, partial(ours_int8, f, True))
    peers = chosen("torch bf16", "FBGEMM dynamic int8", "oneDNN dynamic int8")
    peers |= {k: v for k, v in PEERS.items() if k.startswith("ONNX Runtime") and k.endswith("int8 inputs")}
    jobs = [Job("linear", m) for m in plan.int8]
    untaken = (TypeError, AttributeError, NotImplementedError)  # no kernel takes a QTensor as input so far
    for shape in plan.shapes:
        contest(board, "int8", shape, jobs, formats | peers, plan.space, "FBGEMM dynamic int8", untaken=untaken)


# The products of a SmolLM2-135M layer, in the order of its forward.
LAYER: tuple[Shape, ...] = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
LAYERS = 30


def decode(board: Board, plan: Plan) -> None:
    """One token through all projections of SmolLM2-135M, each weight its own: the sum, with all that calling costs."""
    entrants: dict[str, tuple[str, str, Builder]] = {}
    entrants |= {f"int4-{g}": ("halfbyte", g, partial(ours, f"int4-{g}")) for g in ("g64", "g32")}
    entrants |= {f"torch int4 {g}": ("peer", g, PEERS[f"torch int4 {g}"].build) for g in ("g64", "g32")}
    entrants["nf4-g64"] = ("halfbyte", "nf4", partial(ours, "nf4-g64"))
    entrants["bitsandbytes NF4"] = ("peer", "nf4", PEERS["bitsandbytes NF4"].build)
    entrants["torch bf16"] = ("peer", "float", PEERS["torch bf16"].build)
    ws = {s: (torch.randn(s) * 0.02).bfloat16() for s in LAYER}
    xs = {k: torch.randn(1, k).bfloat16() for _, k in LAYER}
    contenders = []
    for name, (kind, like, build) in entrants.items():

        def model(build: Builder = build) -> tuple[Sequence[Call], int, float]:
            """All calls of a step in order, the bytes that they read, and the largest error."""
            calls: dict[Shape, Iterator[Call]] = {}
            nbytes, worst = 0, 0.0
            for shape, w in ws.items():
                weights = build(w, LAYERS * LAYER.count(shape))
                reference = weights.reference.double()
                off = checked(weights, reference, Job("linear", 1), xs[shape[1]], warm=True)
                if not off <= weights.tolerance:
                    raise ArithmeticError(f"error above {weights.tolerance}: {off:.2g} at {shape}")
                calls[shape], worst = iter(weights.linear(xs[shape[1]])), max(worst, off)
                nbytes += weights.copies * weights.nbytes
            return [next(calls[shape]) for _ in range(LAYERS) for shape in LAYER], nbytes, worst

        if made := attempt(board, name, "decode", kind, model):
            calls, nbytes, off = made

            def step(calls: Sequence[Call] = calls) -> None:
                for call in calls:
                    call()

            contenders.append(Contender(name, [step], nbytes, kind, like, error=off))
    board.compare("decode", "decode step", f"{LAYERS} layers of {len(LAYER)} products", 1, contenders)


SECTIONS: dict[str, Callable[[Board, Plan], None]] = {
    "linear": linear,
    "gemm": gemm,
    "int8": int8,
    "quantize": tensors.quantize,
    "fake": tensors.fake,
    "decode": decode,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, of " + ", ".join(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="fewer shapes, formats, copies and rounds")
    parser.add_argument("--shapes", help="of weights, as 4096x4096,576x1536 (out x in)")
    parser.add_argument("--total", type=int, help="MB that all copies of a weight take (600)")
    parser.add_argument("--json", type=Path, help="a file for the rows and the machine's facts")
    args = parser.parse_args()
    only = args.only.split(",")
    if unknown := sorted(set(only) - set(SECTIONS)):
        parser.error(f"no section {', '.join(unknown)}; those are: {', '.join(SECTIONS)}")
    plan = QUICK if args.quick else Plan()
    if args.shapes:
        pairs = [s.split("x") for s in args.shapes.split(",")]
        plan = replace(plan, shapes=tuple((int(n), int(k)) for n, k in pairs))
    if args.total:
        plan = replace(plan, space=replace(plan.space, total=args.total << 20))
    torch.manual_seed(0)
    pace = Pace(3, 1.0, 0.006, 0.002) if args.quick else Pace()
    board = Board(pace, Limits((128 if args.quick else 1024) << 20))
    board.console.print_json(data=machine(board.limits))
    with torch.inference_mode():
        limits(board, plan)
        for section in only:
            SECTIONS[section](board, plan)
    found = targets.judge(board.rows)
    targets.show(found, board.console)
    board.print_notes()
    if args.json:
        board.write(args.json, found)
    return 1 if board.notes.get("wrong") else 0


if __name__ == "__main__":
    sys.exit(main())
