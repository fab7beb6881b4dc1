"""A format, a solver and an adapter from outside the package, in a recipe, without a change to any file of ours."""

import json

import pytest
import torch
from torch import Tensor, nn

from halfbyte import FORMATS, InputError, kernels
from halfbyte.adapters import ADAPTERS, attached
from halfbyte.formats import Format, Table
from halfbyte.kernels import half
from halfbyte.layers import Codes, ops, weights
from halfbyte.model import load
from halfbyte.recipe import parse_recipe, save
from halfbyte.solvers import SOLVERS, Solver
from miniatures import folder, logits

TERNARY = Format("toy-ternary", Table((-1.0, 0.0, 1.0)), 32)
TEXT = [{"text": "a small text that is learnt by heart, twice over and once again"}] * 4


class Shift(nn.Module):
    """y + x (a 1^T): the same column added to every column of the weight. The smallest thing that can be learnt."""

    def __init__(self, weight, strength: float = 1.0) -> None:
        super().__init__()
        out, self.inputs = weight.shape
        self.strength = strength
        self.a = nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.strength * x.sum(-1, keepdim=True) * self.a.to(x.dtype)

    def delta(self) -> Tensor:
        return self.strength * self.a.float()[:, None].expand(-1, self.inputs)

    def state(self) -> dict[str, Tensor]:
        return {"shift": self.a.detach()}

    def settings(self) -> dict:
        return {"strength": self.strength}


class Recorder:
    """A solver that rounds with halved scales, and keeps what it was given."""

    def __init__(self) -> None:
        self.seen: list[tuple] = []

    def __call__(self, block, inputs, targets, sites):
        self.seen.append((inputs, targets, set(sites)))
        out = {}
        for name, site in sites.items():
            w = site.op.weight.value()
            p = kernels.qparams(w, site.format)
            out[name] = kernels.quantize(w, site.format, type(p)(p.scale / 2, p.zero))
        return out


@pytest.fixture
def toys():
    """Registers the three, and takes them out again."""
    plain, calibrated = Recorder(), Recorder()
    FORMATS.register(TERNARY)
    SOLVERS["toy"] = Solver("toy", plain, False, "half the scale")
    SOLVERS["toy-data"] = Solver("toy-data", calibrated, True, "half the scale, seen")
    ADAPTERS["toy"] = Shift
    yield plain, calibrated
    del FORMATS._rows["toy-ternary"], SOLVERS["toy"], SOLVERS["toy-data"], ADAPTERS["toy"]


@pytest.fixture
def base(tmp_path):
    return str(folder(tmp_path / "base", words=True))


def train(**changes):
    return {"train": {"data": TEXT, "steps": 8, "batch_size": 2, "max_length": 24, "learning_rate": 1e-2, **changes}}


def coded(model):
    return {n: w.stored.q for n, w in weights(model).items() if isinstance(w.stored, Codes)}


def test_a_recipe_with_all_three(toys, base):
    """QLoRA, but with a ternary base, another rounding and another adapter; then merged and rounded again."""
    plain, _ = toys
    freeze = {"freeze": {"scheme": "toy-ternary", "solver": "toy"}}
    steps = [freeze, {"adapt": {"adapter": "toy", "strength": 0.5}}, train(), "merge", freeze]
    run = parse_recipe({"model": base, "steps": steps}).run()

    held = coded(run.model)
    assert len(held) == 14
    for q in held.values():
        assert q.format == TERNARY
        assert set(q.codes.unique().tolist()) <= {0, 1, 2}
        assert q.nbytes == q.codes.numel() // 4 + 4 * q.codes.numel() // 32  # two bits a code, really
        groups = q.dequantize().reshape(-1, 32)
        assert all(len(g.abs().unique()) <= 2 for g in groups)  # 0 and one magnitude
    assert run.log.curve[-1]["loss"] < run.log.curve[0]["loss"]
    assert not attached(run.model)
    assert [names for _, _, names in plain.seen][:2] == [names for _, _, names in plain.seen][2:]
    assert all(inputs is targets is None for inputs, targets, _ in plain.seen)


def test_what_the_toys_made_is_what_trains(toys, base):
    steps = [{"freeze": {"scheme": "toy-ternary", "solver": "toy"}}, {"adapt": {"adapter": "toy", "strength": 0.5}}]
    before = parse_recipe({"model": base, "steps": steps[:1]}).run()
    adapted = parse_recipe({"model": base, "steps": steps}).run()
    assert torch.equal(logits(adapted.model), logits(before.model))
    after = parse_recipe({"model": base, "steps": [*steps, train()]}).run()
    for name, q in coded(before.model).items():
        assert torch.equal(coded(after.model)[name].codes, q.codes)
    assert after.log.trainable == sum(op.out_features for n, op in ops(after.model) if n in attached(after.model))
    assert all(a.strength == 0.5 and a.a.abs().sum() > 0 for a in attached(after.model).values())


def test_a_solver_that_needs_data_sees_each_block_through_the_quantized_ones_before(toys, base, tmp_path, monkeypatch):
    monkeypatch.setattr(half, "fast", lambda: False)  # compared to the last digit
    _, solver = toys
    text = tmp_path / "calibration.jsonl"
    text.write_text("".join(json.dumps(r) + "\n" for r in TEXT))
    step = {"freeze": {"scheme": "toy-ternary", "solver": "toy-data", "calibration": str(text), "samples": 1}}
    run = parse_recipe({"model": base, "steps": [step]}).run()

    (first_in, first_out, first), (second_in, second_out, second) = solver.seen
    assert {n.split(".")[2] for n in first} == {"0"}
    assert {n.split(".")[2] for n in second} == {"1"}
    assert len(first_in) == 1
    first_in, second_in = ([call.x for call in calls] for calls in (first_in, second_in))
    assert first_in[0].shape == first_out[0].shape == second_in[0].shape
    float_layers = load(base).model.model.layers
    layers = run.model.model.layers
    embedding = run.model.model.rotary_emb
    position = embedding(first_in[0], torch.arange(first_in[0].shape[1])[None])
    with torch.no_grad():
        assert torch.equal(float_layers[0](first_in[0], position_embeddings=position), first_out[0])
        assert torch.equal(layers[0](first_in[0], position_embeddings=position), second_in[0])  # quantized by now
        # the target is what the float model gives, so that a block can make good what those before it lost
        assert torch.equal(float_layers[1](first_out[0], position_embeddings=position), second_out[0])


def test_a_toy_method_through_a_grid(toys, base):
    steps = [{"grid": {"scheme": "toy-ternary"}}, {"adapt": {"adapter": "toy"}}, train()]
    made = parse_recipe({"model": base, "steps": steps}).run()
    trained = logits(made.model)
    shipped = parse_recipe({"model": base, "steps": [*steps, "merge", "freeze"]}).run()
    assert torch.equal(logits(shipped.model), trained)
    assert {q.format for q in coded(shipped.model).values()} == {TERNARY}


def test_what_no_layout_holds_is_refused_before_the_work(toys, base, tmp_path):
    steps = [{"adapt": {"adapter": "toy"}}, train(), "merge", {"freeze": {"scheme": "toy-ternary"}}]
    with pytest.raises(InputError, match=r"no layout|no folder layout"):
        parse_recipe({"model": base, "output": str(tmp_path / "out"), "steps": steps}).run()
    assert not (tmp_path / "out").exists()


def test_a_toy_adapter_is_saved_once_it_is_merged(toys, base, tmp_path):
    steps = [{"adapt": {"adapter": "toy"}}, train()]
    run = parse_recipe({"model": base, "steps": steps}).run()
    with pytest.raises(InputError, match="merge it"):
        save(run, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    merged = parse_recipe({"model": base, "output": str(tmp_path / "out"), "steps": [*steps, "merge"]}).run()
    assert torch.equal(logits(load(tmp_path / "out").model), logits(merged.model))


def test_a_format_of_a_name_that_is_taken_is_refused(toys):
    assert FORMATS.register(TERNARY) is TERNARY  # the same again is no other
    with pytest.raises(InputError, match="toy-ternary"):
        FORMATS.register(Format("toy-ternary", Table((-1.0, 1.0)), 32))


def test_the_toys_are_gone_afterwards():
    assert "toy-ternary" not in FORMATS
    with pytest.raises(InputError, match="toy"):
        parse_recipe({"model": "m", "steps": [{"freeze": {"scheme": "toy-ternary"}}]})
