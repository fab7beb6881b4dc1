"""Plain modules of torch, without transformers, quantized through Python."""

import copy
import itertools
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import halfbyte
from halfbyte import InputError
from halfbyte.layers import Conv, Embedding, Linear, ops
from halfbyte.train import TrainingArguments, train


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


def test_a_convolution_rounds_its_inputs_by_sample():
    model = halfbyte.quantize(Small().eval(), "W8A8")
    assert {n: op.input and op.input.name for n, op in ops(model) if not isinstance(op, Embedding)} == dict.fromkeys(
        ("image.0", "image.2", "line", "out.0", "out.2"), "int8-token"
    )


# quantization-aware training


class Mobile(nn.Module):
    """What networks for images are made of: a convolution, one by channel, norms, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.block = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 16, 1)
        )
        self.drop, self.fc = nn.Dropout(0.1), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block(torch.relu(self.norm(self.stem(x))))
        return self.fc(self.drop(x.relu().mean((2, 3))))


@dataclass
class Images:
    pixels: torch.Tensor
    labels: torch.Tensor

    @property
    def targets(self) -> int:
        return len(self.labels)

    tokens = targets


def images(n: int) -> Images:
    """Stripes in four directions, in noise."""
    row, column, labels = torch.arange(12)[:, None], torch.arange(12), torch.arange(n) % 4
    stripes = torch.stack([row + 0 * column, column + 0 * row, row + column, row - column]).mul(1.5).sin()
    return Images((stripes[labels] + torch.randn(n, 12, 12))[:, None], labels)


def cross_entropy(model: nn.Module, batch: Images) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch.pixels), batch.labels, reduction="sum")


def fit(model: nn.Module, steps: int, rate: float = 1e-2) -> nn.Module:
    train(model, itertools.repeat(images(64)), TrainingArguments(steps, rate), loss_of=cross_entropy)
    return model


def folded() -> nn.Module:
    return halfbyte.fold_batch_norms(fit(Mobile(), 5))


IN_TRAINING = [
    "W8A8", "W8A8_STATIC", "W4A8", "W4A16", "FP8",
    [{"match": ".*", "weight": "int8-channel", "input": "uint8-token"}],
    [{"match": "fc", "weight": "int4-g8"}, {"match": ".*", "weight": "uint4-channel", "input": "uint8-tensor"}],
]  # fmt: skip


@pytest.mark.parametrize("learn", [False, True], ids=["found", "learned"])
@pytest.mark.parametrize("to", IN_TRAINING, ids=str)
def test_what_was_trained_is_what_is_frozen(tmp_path, to, learn):
    held = images(32)
    model = halfbyte.prepare_qat(folded(), to, [held.pixels, (held.pixels,), {"x": held.pixels}], learn)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    fit(model, 3)
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    with torch.no_grad():
        wanted = model.eval()(held.pixels)
    differentiable = model(held.pixels).detach()
    assert halfbyte.freeze(model) is model
    assert not [n for n, _ in model.named_parameters() if n.endswith("stored")]
    with torch.no_grad():
        assert torch.equal(model(held.pixels), wanted)
    assert torch.equal(model(held.pixels), differentiable)

    torch.save(model.state_dict(), tmp_path / "m.pt")
    other = halfbyte.quantize(folded(), to, calibration=[images(8).pixels])
    other.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True))
    with torch.no_grad():
        assert torch.equal(other.eval()(held.pixels), wanted)


def test_scales_are_learned_from_those_that_rounding_has():
    held, model = images(32), folded()
    rounded = halfbyte.quantize(copy.deepcopy(model), "W4A8").eval()
    halfbyte.prepare_qat(model, "W4A8", learn=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(held.pixels), rounded(held.pixels))
    scales = [n for n, p in model.named_parameters() if n.endswith("grid.scale") and p.requires_grad]
    assert len(scales) == len([n for n, p in model.named_parameters() if n.endswith("stored") and p.requires_grad]) > 0


def test_a_weight_that_two_layers_share_is_seen_through_one_grid():
    model = nn.Sequential(nn.Embedding(16, 64), nn.Linear(64, 16, bias=False))
    model[1].weight = model[0].weight
    halfbyte.prepare_qat(model, [{"match": ".*", "weight": "int4-g32"}], learn=True)
    assert model[0].weight is model[1].weight
    assert sum(n.endswith("grid.scale") for n, _ in model.named_parameters()) == 1


def test_any_loop_trains_it():
    seen, model = images(64), halfbyte.prepare_qat(folded(), "W8A8")
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-2), []
    for _ in range(60):
        loss = cross_entropy(model.train(), seen)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]


def test_few_bits_are_learned_to_live_with():
    rules = [{"match": ".*", "weight": "int2-channel", "input": "int4-token"}]
    seen, model = images(64), halfbyte.fold_batch_norms(fit(Mobile(), 40))
    loss = {}
    with torch.no_grad():
        loss["rounded"] = cross_entropy(halfbyte.quantize(copy.deepcopy(model), rules).eval(), seen)
    fit(halfbyte.prepare_qat(model, rules), 40)
    with torch.no_grad():
        loss["trained"] = cross_entropy(halfbyte.freeze(model), seen)
    assert loss["trained"] < 0.5 * loss["rounded"]


def test_calibration_leaves_the_mode_and_the_norms():
    model, held = Mobile().train(), images(32)
    model.norm.eval()
    before = model.block[1].running_mean.clone()
    halfbyte.prepare_qat(model, "W8A8_STATIC", calibration=[held.pixels])
    assert [n for n, m in model.named_modules() if not m.training] == ["norm"]
    assert torch.equal(model.block[1].running_mean, before)


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(InputError, match=r"stem is codes already"):
        halfbyte.prepare_qat(halfbyte.quantize(folded(), "W8A8"), "W8A8")
    with pytest.raises(InputError, match="give calibration=BATCHES"):
        halfbyte.prepare_qat(folded(), "W8A8_STATIC")
    model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(InputError, match=r"nf4-g64-dq.* quantized themselves"):
        halfbyte.prepare_qat(model, [{"match": ".*", "weight": "nf4-g64-dq"}], learn=True)
    with pytest.raises(InputError, match="call prepare_qat before"):
        halfbyte.freeze(folded())
    with pytest.raises(InputError, match="inputs of stem hold NaN"):
        halfbyte.prepare_qat(folded(), "W8A8_STATIC", calibration=[torch.full((1, 1, 12, 12), torch.nan)])


def test_it_needs_no_transformers():
    run = "import sys, halfbyte, torch; halfbyte.quantize(torch.nn.Sequential(torch.nn.Linear(64, 8)), 'W4A16'); "
    done = subprocess.run(
        [sys.executable, "-c", run + "import halfbyte.train; print('transformers' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"
