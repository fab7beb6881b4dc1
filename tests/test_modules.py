"""Plain modules of torch, without transformers, quantized through Python."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

import halfbyte
from halfbyte import InputError
from halfbyte.layers import Conv, Embedding, Linear, ops


class Small(nn.Module):
    """Convolutions in one and two dimensions, an embedding, and sizes that no group divides."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 4, stride=4))
        self.line = nn.Conv1d(16, 32, 3, padding=1)
        self.label = nn.Embedding(10, 32)
        self.out = nn.Sequential(nn.Linear(32, 50), nn.GELU(), nn.Linear(50, 10))

    def forward(self, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return self.out(self.line(self.image(x).flatten(2)).mean(-1) + self.label(label))


X = torch.randn(4, 3, 16, 16), torch.tensor([1, 2, 3, 1])
SCHEMES = ["W8A16", "W4A16", "W4A16_ASYM", "W8A8", "NF4", "FP8", "int8-channel"]


@pytest.mark.parametrize("to", SCHEMES)
@torch.no_grad()
def test_every_layer_of_a_module_takes_part(to):
    model = Small().eval()
    before = model(*X)
    made = halfbyte.quantize(model, to)
    assert made is model
    found = dict(ops(made))
    assert {type(op) for op in found.values()} == {Linear, Conv, Embedding}
    assert [n for n, op in found.items() if op.weight.format is None] == ["label"]
    limit = {"W8A16": 0.02, "W8A8": 0.03, "int8-channel": 0.02, "FP8": 0.15}.get(to, 0.5)
    assert 0 < (made(*X) - before).abs().max() < limit * before.abs().max()


@pytest.mark.parametrize("to", SCHEMES)
@torch.no_grad()
def test_the_state_dict_goes_there_and_back(tmp_path, to):
    made = halfbyte.quantize(Small().eval(), to)
    torch.save(made.state_dict(), tmp_path / "m.pt")
    other = halfbyte.quantize(Small().eval(), to)
    assert not torch.equal(other(*X), made(*X))
    other.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True))
    assert torch.equal(other(*X), made(*X))


@torch.no_grad()
def test_it_is_small():
    made = halfbyte.quantize(nn.Sequential(nn.Linear(512, 512, bias=False), nn.Conv2d(64, 64, 3, bias=False)), "W4A16")
    held = sum(t.nbytes for t in made.state_dict().values())
    assert held < (512 * 512 + 64 * 64 * 9) * (4 + 16 / 64) / 8 * 1.5  # scales are float32 here


@torch.no_grad()
def test_rules_of_ones_own():
    made = halfbyte.quantize(Small().eval(), [
        {"match": "@embedding", "weight": "int8-channel"}, {"match": r"image\.0"},
        {"match": "@convolution", "weight": "int4-channel"}, {"match": ".*", "weight": "int8-channel"},
    ])  # fmt: skip
    formats = {n: op.weight.format and op.weight.format.name for n, op in ops(made)}
    assert formats == {
        "label": "int8-channel", "image.0": None, "image.2": "int4-channel", "line": "int4-channel",
        "out.0": "int8-channel", "out.2": "int8-channel",
    }  # fmt: skip


@torch.no_grad()
def test_a_bare_layer_becomes_an_op():
    layer, x = nn.Linear(64, 8), torch.randn(2, 64)
    op = halfbyte.quantize(copy.deepcopy(layer), "W8A16")
    assert isinstance(op, Linear)
    assert op.weight.format is not None
    torch.testing.assert_close(op(x), layer(x), rtol=0, atol=0.05)


def test_a_tensor_is_quantized_as_ever():
    q = halfbyte.quantize(torch.randn(4, 64), "int4-g32")
    assert (q.format.name, q.shape) == ("int4-g32", (4, 64))


@pytest.mark.parametrize(
    ("to", "says"),
    [
        ("W4A17", "did you mean W4A16"),
        ("Q4_K_M", "mix of ggml's blocks"),
        ("W8A8_STATIC", "give calibration=BATCHES"),
        ("int4-g32", "does not divide its 27 inputs"),
        ([{"match": "@linear", "weight": "int8-channel"}], "says nothing of"),
    ],
)
def test_what_cannot_be_is_refused(to, says):
    with pytest.raises(InputError, match=says):
        halfbyte.quantize(Small(), to)


def test_nan_is_refused():
    model = Small()
    with torch.no_grad():
        model.out[0].weight[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"out\.0\.weight holds NaN"):
        halfbyte.quantize(model, "W8A16")


def test_it_needs_no_transformers():
    run = "import sys, halfbyte, torch; halfbyte.quantize(torch.nn.Sequential(torch.nn.Linear(64, 8)), 'W4A16'); "
    done = subprocess.run(
        [sys.executable, "-c", run + "import halfbyte.train; print('transformers' in sys.modules)"],
        capture_output=True, text=True, check=True,
    )
    assert done.stdout.strip() == "False"
