"""Which search of scales is best where no data may be used: KL of a rounded model, a format and a search a row.

    python benchmarks/accuracy/searches.py [--formats int4-g128,int3-g64] [--windows 8]

The model is SmolLM2-135M from its package, taken off the Q4_1 grid that it was rounded to (seeded uniform noise of
half a step), since formats like that grid would look better than they are. The text is what the demo *trains* on:
choosing by held-out text would spoil it for the demo's figures.
"""

from __future__ import annotations

import argparse
import copy
import json
import time

import torch
from setting import off_the_grid

from halfbyte import data, evaluate, kernels, models, run, sample_data
from halfbyte.cli.demo import packaged
from halfbyte.formats import parse
from halfbyte.layers import ops

FORMATS = "int8-channel,int4-g128,int4-g32,uint4-g128,int3-g64,uint3-g64,int2-g32"


def rounded(reference: torch.nn.Module, role: dict[str, str], name: str, how: str) -> torch.nn.Module:
    """A copy of the reference with its projections seen through a format."""
    model = copy.deepcopy(reference)
    for site, op in ops(model):
        if role[site] == "linear":
            w, f = op.weight.base().detach(), parse(name)
            if isinstance(f.group, int) and w.shape[1] % f.group:
                f = f.with_group(64)
            op.weight.store(kernels.fake(w, f, kernels.qparams(w, f, how)).detach())
    return model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--windows", type=int, default=8)
    args = parser.parse_args()
    loaded = run.load(packaged(), "float32")
    run.dequantize(loaded)
    role = models.roles(loaded.model)
    off_the_grid(loaded.model, role)
    sets = {"domain": sample_data.domain_text()["train"], "docstrings": sample_data.docstring_task()["train"][:400]}
    rows = {k: data.encode(data.records(v), loaded.tokenizer, 512) for k, v in sets.items()}
    for r in rows.values():
        r.rows[:] = r.rows[: args.windows]
    references = {k: evaluate.Reference(loaded.model, keep=2_000_000_000) for k in rows}
    for name in args.formats.split(","):
        for how in ("minmax", "absmax", "mse", "weighted"):
            began = time.perf_counter()
            model = rounded(loaded.model, role, name, how)
            seconds = time.perf_counter() - began
            found = {k: evaluate.measure(model, rows[k], references[k]) for k in rows}
            kl = {k: [round(m.kl_mean or 0, 4), round(m.kl_error or 0, 4)] for k, m in found.items()}
            print(json.dumps({"format": name, "search": how, "seconds": round(seconds, 1), "kl": kl}), flush=True)


if __name__ == "__main__":
    main()
