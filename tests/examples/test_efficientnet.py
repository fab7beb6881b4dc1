"""The example's own parts, on a small network and images made here: what it prints, and what it refuses."""

import gzip
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from halfbyte import InputError, fold_batch_norms
from halfbyte.layers import OPS, Conv

FILE = Path(__file__).parents[2] / "examples" / "efficientnet.py"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("efficientnet_example", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look there
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "pretrained", Small)
    return module


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 8, stride=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self._fc = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._fc(self.body(x).mean((2, 3)))


def write(file: Path, t: torch.Tensor) -> None:
    head = bytes([0, 0, 8, t.ndim]) + b"".join(n.to_bytes(4, "big") for n in t.shape)
    file.write_bytes(gzip.compress(head + t.numpy().tobytes()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images whose brightness is their class."""
    for name, n in (("train", 400), ("t10k", 60)):
        labels = torch.arange(n, dtype=torch.uint8) % 10
        write(tmp_path / f"{name}-labels-idx1-ubyte.gz", labels)
        write(tmp_path / f"{name}-images-idx3-ubyte.gz", (labels * 25).view(-1, 1, 1).expand(-1, 28, 28).contiguous())
    return tmp_path


@pytest.mark.parametrize("to", ["W8A8", "W8A8_STATIC"])
def test_it_prints_what_was_measured(example, folder, capsys, to):
    example.main(["--data", str(folder), "--steps", "6", "--test-images", "50", "--to", to])
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("| on 50 test images | bytes | accuracy | loss |")
    rows = {cells[1]: cells[2:-1] for cells in ([c.strip() for c in line.split("|")] for line in lines)}
    assert list(rows) == ["float", f"{to}, rounded", f"{to}, trained (QAT)"]
    sizes = [int(row[0].replace(",", "")) for row in rows.values()]
    assert sizes[0] > 2 * sizes[1]
    assert sizes[1] == sizes[2]
    for row in list(rows.values())[1:]:
        assert all(re.fullmatch(r"[+-][\d.]+ \[[+-][\d.]+, [+-][\d.]+\]( %)?", cell) for cell in row[3:])


class Conv2dStaticSamePadding(nn.Conv2d):
    """As the package has it."""

    def __init__(self, *args: int, pad: tuple[int, ...] | None, **kwargs: int | bool) -> None:
        super().__init__(*args, **kwargs)
        self.stride = list(self.stride)
        self.static_padding = nn.Identity() if pad is None else nn.ZeroPad2d(pad)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.static_padding(x))


@pytest.mark.parametrize("pad", [None, (0, 1, 0, 1), (1, 1, 1, 1)])
@torch.no_grad()
def test_the_packages_convolutions_become_ops(example, monkeypatch, pad):
    monkeypatch.setitem(OPS, "Conv2dStaticSamePadding", example.same_padding)
    layer = Conv2dStaticSamePadding(4, 4, 3, stride=2, groups=4, bias=False, pad=pad)
    model, x = nn.Sequential(layer, nn.BatchNorm2d(4)).eval(), torch.randn(2, 4, 8, 8)
    before = model(x)
    torch.testing.assert_close(fold_batch_norms(model)(x), before, rtol=1e-5, atol=1e-5)
    assert isinstance(model[0], Conv)


def test_an_interval_holds_the_mean_and_shrinks(example):
    x = torch.randn(100).double() + 0.5
    mean, low, high = example.interval(x)
    assert low < mean < high
    assert high - low == pytest.approx(2 * 1.96 * float(x.std()) / 10, rel=0.2)
    assert example.interval(torch.zeros(9).double()) == (0, 0, 0)


@pytest.mark.parametrize("bytes_", [b"", b"\0\0\x08\x01", b"\0\0\x08\x01\xff\xff\xff\xff", b"\0\0\x09\x01\0\0\0\x01x",
                                    b"\0\0\x08\x01\0\0\0\x02x", b"\0\0\x08\x01\0\0\0\x01xx"])  # fmt: skip
def test_a_damaged_file_is_said(example, tmp_path, bytes_):
    (tmp_path / "x.gz").write_bytes(gzip.compress(bytes_))
    with pytest.raises(InputError, match="no IDX file"):
        example.idx(tmp_path / "x.gz", 1)


def test_what_is_not_gzipped_is_said(example, tmp_path):
    (tmp_path / "x.gz").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 1, 7]))
    with pytest.raises(InputError, match="cannot be read: Not a gzipped file"):
        example.idx(tmp_path / "x.gz", 1)


def test_a_missing_folder_is_said(example, tmp_path):
    with pytest.raises(SystemExit, match="is not there: `make vision` fetches it"):
        example.main(["--data", str(tmp_path / "none")])
