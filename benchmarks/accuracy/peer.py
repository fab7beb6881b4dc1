"""One peer's quantization of a model, as the weights that it would compute with, to measure beside ours.

    PYTHON benchmarks/accuracy/peer.py NAME MODEL ROWS.safetensors BITS GROUP OUT.safetensors [--iterations N]

PYTHON is that of a throw-away environment with the peers: nothing of halfbyte is imported here. MODEL is a Hugging Face
folder, taken in float32; ROWS holds `input_ids` int64 (n, 512), the very tokens to calibrate on. The projections inside
the blocks are quantized, the embeddings and the head are not. OUT gets the projections' weights in float32,
dequantized by the peer, under their Hugging Face names. The last line printed is JSON: the peer, its version, and the
seconds that quantizing took, without imports, loading and saving.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from types import SimpleNamespace
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")
BATCH = 8


@dataclass(frozen=True)
class Job:
    """What every peer is given."""

    model: nn.Module
    rows: Tensor
    bits: int
    group: int
    iterations: int | None

    def projections(self) -> dict[str, nn.Linear]:
        """The linear layers inside the blocks as they are now, by name."""
        from torch import nn

        inside = ((n, m) for n, m in self.model.named_modules() if n.startswith("model.layers."))
        return {name: module for name, module in inside if isinstance(module, nn.Linear)}

    def batches(self) -> list[dict[str, Tensor]]:
        """The rows in their order; a mask of ones, since peers without a tokenizer guess at padding."""
        import torch

        return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in self.rows.split(BATCH)]


Weights = dict[str, "Tensor"]


def timed(work: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def autoround(job: Job) -> tuple[Weights, float]:
    """Learned rounding. Without an export its model keeps the simulated weights."""
    from auto_round import AutoRound

    tuner = AutoRound(
        job.model,
        tokenizer=SimpleNamespace(),  # it insists on one, and asks it only for a padding token
        bits=job.bits,
        group_size=job.group,
        sym=True,
        iters=200 if job.iterations is None else job.iterations,
        dataset=job.batches(),
        seqlen=job.rows.shape[1],
        nsamples=len(job.rows),
        batch_size=BATCH,
        device_map="cpu",
        enable_torch_compile=False,  # no better a result, and on a CPU it took longer than it saved
        amp=False,  # else the whole model becomes bfloat16 on the CPUs that have it, and only on those
    )
    _, seconds = timed(tuner.quantize)
    return {name: linear.weight for name, linear in job.projections().items()}, seconds


def hqq(job: Job) -> tuple[Weights, float]:
    """Half-quadratic: no data; asymmetric, with a zero point that is a float."""
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    def quantize() -> dict[str, HQQLinear]:
        config = BaseQuantizeConfig(nbits=job.bits, group_size=job.group)
        keep = {"compute_dtype": torch.float32, "device": "cpu", "del_orig": False}
        return {name: HQQLinear(linear, config, **keep) for name, linear in job.projections().items()}

    layers, seconds = timed(quantize)
    return {name: layer.dequantize() for name, layer in layers.items()}, seconds


def llmcompressor(job: Job) -> tuple[Weights, float]:
    """GPTQ, block after block; its default order is by activation within fixed groups."""
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from torch.utils.data import DataLoader

    weights = {"num_bits": job.bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": job.group}
    scheme = {"targets": ["Linear"], "weights": weights}
    recipe = GPTQModifier(config_groups={"projections": scheme}, ignore=["lm_head"])
    _, seconds = timed(
        lambda: oneshot(
            model=job.model,
            processor=SimpleNamespace(),  # it insists on one; a loader of tokens never asks it for anything
            dataset=DataLoader(job.batches(), batch_size=None),  # a loader is taken as it is: no shuffling
            recipe=recipe,
        )
    )
    layers = job.projections().items()
    return {n: forward_quantize(m, m.weight, "weight", m.quantization_scheme.weights) for n, m in layers}, seconds


def bitsandbytes(job: Job) -> tuple[Weights, float]:
    """NF4: no data; blocks of GROUP along the flattened rows, their scales not quantized again."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    layers = job.projections()

    def quantize() -> dict[str, tuple]:
        # Flat, since its CPU kernel reads a matrix as if each row began a block, which its quantizer does not do.
        flat = {name: linear.weight.data.flatten() for name, linear in layers.items()}
        return {name: quantize_4bit(w, blocksize=job.group, quant_type="nf4") for name, w in flat.items()}

    packed, seconds = timed(quantize)
    return {name: dequantize_4bit(*packed[name]).view_as(linear.weight) for name, linear in layers.items()}, seconds


def plain(job: Job) -> tuple[Weights, float]:
    """GPTQ and no more, see plain.py: no package's, but the measure of time."""
    import plain

    _, seconds = timed(lambda: plain.quantize(job.model, job.batches(), job.bits, job.group))
    return {name: linear.weight for name, linear in job.projections().items()}, seconds


@dataclass(frozen=True)
class Peer:
    run: Callable[[Job], tuple[Weights, float]]
    package: str  # the version this was written for
    bits: tuple[int, ...] = (2, 3, 4, 8)
    says: str = ""  # what it is called in tables, where it is not a package's own

    @property
    def title(self) -> str:
        return self.says or self.package.replace("==", " ")


PEERS = {
    "autoround": Peer(autoround, "auto-round==0.16.1"),
    "hqq": Peer(hqq, "hqq==0.2.8.post1"),
    "llmcompressor": Peer(llmcompressor, "llmcompressor==0.14.0.1"),
    "bitsandbytes": Peer(bitsandbytes, "bitsandbytes==0.50.2", bits=(4,)),
    "plain": Peer(plain, "torch==2.13.0", says="GPTQ, plainly written in torch"),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", metavar="NAME", help=", ".join(PEERS))
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("rows", metavar="ROWS.safetensors")
    parser.add_argument("bits", metavar="BITS", type=int)
    parser.add_argument("group", metavar="GROUP", type=int)
    parser.add_argument("out", metavar="OUT.safetensors")
    parser.add_argument("--iterations", metavar="N", type=int, help="of autoround alone; its own default is 200")
    args = parser.parse_args()
    if args.name not in PEERS:
        sys.exit(f"There is no peer {args.name}; there are {', '.join(PEERS)}.")
    if args.bits not in PEERS[args.name].bits:
        sys.exit(f"{args.name} takes {' or '.join(map(str, PEERS[args.name].bits))} bits here, not {args.bits}.")
    if args.iterations is not None and args.name != "autoround":
        sys.exit(f"{args.name} has no iterations to set; only autoround has.")
    return args


def main() -> None:
    args = arguments()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything needed is in MODEL and ROWS
    peer = PEERS[args.name]
    try:
        version = metadata.version(peer.package.partition("==")[0])
        import torch
        from safetensors.torch import load_file, save_file
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
        job = Job(model, load_file(args.rows)["input_ids"], args.bits, args.group, args.iterations)
        before = {name: linear.weight.detach().clone() for name, linear in job.projections().items()}
        weights, seconds = peer.run(job)
    except ImportError as missing:  # PackageNotFoundError is one
        sys.exit(f"{args.name} needs {missing.name}: pip install transformers safetensors {peer.package}")
    except ValueError as refusal:  # of this group by these widths, for one
        sys.exit(f"{args.name} refuses: {refusal}")
    # A peer that steps over a layer says so in its log at best, and would look better than it is.
    left = [name for name, weight in before.items() if name not in weights or torch.equal(weights[name], weight)]
    if left:
        sys.exit(f"{args.name} did not quantize {len(left)} of {len(before)} projections: {', '.join(left[:7])}.")
    save_file({f"{n}.weight": w.detach().float().contiguous() for n, w in weights.items()}, args.out)
    print(json.dumps({"peer": args.name, "version": version, "seconds": round(seconds, 3)}))


if __name__ == "__main__":
    main()
