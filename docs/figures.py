"""Draws the figures of docs/training from what halfbyte computes (`make figures`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt

from halfbyte import kernels
from halfbyte.formats import parse
from halfbyte.kernels import qparams
from halfbyte.qtensor import QParams

HERE = Path(__file__).parent / "training"
POINTS = 2001
mpl.rcParams |= {
    "svg.hashsalt": "halfbyte", "svg.fonttype": "path", "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False, "figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3,
}  # fmt: skip


@contextmanager
def figure(name: str, panels: int = 1) -> Iterator[Any]:
    """Axes to draw on, written as NAME.svg: the same bytes from the same numbers."""
    drawn, axes = plt.subplots(1, panels, figsize=(3.6 * panels, 2.6), squeeze=False)
    yield axes[0] if panels > 1 else axes[0][0]
    drawn.savefig(HERE / f"{name}.svg", metadata={"Date": None})
    plt.close(drawn)
    print(HERE.name, f"{name}.svg")


def seen(bits: int, scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, each in a group of its own with one scale; their values in the format, dw^/dw and dw^/ds."""
    f = parse(f"int{bits}-channel")
    w = torch.linspace(-1.5 * 2 ** (bits - 1), 1.5 * 2 ** (bits - 1), POINTS)[:, None].requires_grad_()
    s = torch.full_like(w, scale).requires_grad_()
    value = kernels.fake(w * scale, f, QParams(s, None))
    dw, ds = torch.autograd.grad(value.sum(), (w, s))
    return w.detach()[:, 0], value.detach()[:, 0] / scale, dw[:, 0] / scale, ds[:, 0]


def straight_through() -> None:
    w, value, dw, _ = seen(3, 0.5)
    with figure("ste", 2) as (left, right):
        left.plot(w, w, ":", color="grey", label="w")
        left.plot(w, value, label="w^ = s clip(round(w / s))")
        left.set(xlabel="w / s", ylabel="value / s", title="forward")
        left.legend(frameon=False)
        right.plot(w, dw, color="C1", label="straight through")
        right.axhline(0, color="C0", linestyle="--", label="of the stairs, nearly everywhere")
        right.set(xlabel="w / s", ylabel="dw^ / dw", title="backward")
        right.legend(frameon=False)


def learned_step() -> None:
    w, _, _, ds = seen(3, 1.0)
    with figure("lsq") as axes:
        axes.plot(w, ds, color="C1")
        axes.set(xlabel="w / s", ylabel="dw^ / ds", title="what a weight tells its scale")


def merges() -> None:
    """W, an adapter's s B A of several sizes, and what rounding the sum does to it."""
    torch.manual_seed(0)
    out, inputs, r = 256, 1024, 16
    w = torch.randn(out, inputs) * 0.05
    low = torch.randn(out, r) @ torch.randn(r, inputs)
    sizes = torch.logspace(-3, 0, 13)
    with figure("merges") as axes:
        for name in ("int8-g64", "int4-g64", "int3-g64", "int2-g64"):
            lost = []
            for size in sizes:
                delta = low / low.std() * w.std() * size
                q = kernels.quantize(w + delta, name, qparams(w + delta, parse(name), "minmax"))
                lost.append(float((q.dequantize() - w - delta).norm() / delta.norm()))
            axes.loglog(sizes, lost, marker=".", label=name)
        axes.axhline(1, color="grey", linestyle=":")
        axes.set(xlabel="|s B A| / |W0|", ylabel="|Q(W) - W| / |s B A|", title="W = W0 + s B A: rounded away / learned")
        axes.legend(frameon=False)


if __name__ == "__main__":
    straight_through()
    learned_step()
    merges()
