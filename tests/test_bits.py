"""Formats chosen by what they cost, and the climb to a limit."""

import re
from dataclasses import replace

import pytest
import torch

import miniatures
from halfbyte import bits, data, evaluate, models, run
from halfbyte.allocate import Option
from halfbyte.errors import InputError
from halfbyte.layers import ops
from halfbyte.plan import plan
from halfbyte.scheme import to_scheme
from halfbyte.steps import Freeze

TEXT = [{"text": t} for t in miniatures._TEXT]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A miniature whose predictions differ, and what formats cost it in a folder. Changed by no test."""
    torch.manual_seed(0)
    out = run.load(miniatures.folder(tmp_path_factory.mktemp("m") / "m", "llama-untied", words=miniatures.bpe()))
    with torch.no_grad():
        for _, op in ops(out.model):
            op.weight.store(op.weight.base().detach() * 6)
    measured = bits.Measured(calibration=TEXT, max_length=64)
    rows = measured.rows(out)
    return out, rows, measured.costs(out, bits.check(out.loaded, None, False), rows)


def kl(made, scheme, rows):
    out = bits.sharing(made)
    Freeze(scheme=scheme)(out)
    return evaluate.measure(out.model, rows, evaluate.Reference(made.model), 1).kl_mean


@pytest.mark.parametrize(("said", "meant"), [("90MB", 90_000_000), ("1.5GB", 1_500_000_000), ("80 MiB", 80 << 20),
                                             ("7kb", 7000)])  # fmt: skip
def test_sizes(said, meant):
    assert bits.parse_size(said) == meant


@pytest.mark.parametrize("said", ["", "90", "MB", "-1MB", "1e3MB", "90 m", "0MB", "9XB", "90MBit"])
def test_what_is_no_size(said):
    with pytest.raises(InputError, match="--target-size"):
        bits.parse_size(said)


def test_what_is_chosen_is_what_a_plan_makes(made):
    out, _, costs = made
    budget = (costs.footprint.least + costs.footprint.most) // 2
    choice = costs.within(budget)
    assert choice.size <= budget
    after = {e.name.removesuffix(".weight"): e.after for e in plan(out.model, choice.scheme)}
    assert {n: f.name for n, f in after.items() if f is not None} == {n: o.name for n, o in choice.options.items()}
    assert choice.loss == pytest.approx(sum(costs.losses[n][o.name] for n, o in choice.options.items()))
    assert len({o.name for o in choice.options.values()}) > 1


def test_a_choice_loses_less_than_one_format_of_its_size(made):
    out, rows, costs = made
    choice = costs.within(bits.check(out.loaded, [bits.parse("int4-g64")], False).most)
    assert kl(out, choice.scheme, rows) < 0.9 * kl(out, "int4-g64", rows)


def test_more_bytes_never_cost_more_and_the_smallest_is_found(made):
    costs = made[2]
    budgets = torch.linspace(costs.footprint.least, costs.footprint.most, 9).long().tolist()
    losses = [costs.within(b).loss for b in budgets]
    assert losses == sorted(losses, reverse=True)
    for loss in losses[1:-1]:
        found = costs.smallest(loss)
        assert found.loss <= loss
        assert costs.within(int(found.size * 0.998)).loss > loss
    assert costs.smallest(0).size == max(costs.within(costs.footprint.most).size, costs.footprint.least)
    assert costs.smallest(1e9).size == costs.footprint.least


def test_the_climb_ends_near_the_limit(made):
    out, rows, costs = made
    held, seen = bits.held_out(out, TEXT, 64), []
    limit = 0.5 * kl(out, "int4-g64", held)
    climb = bits.Climb(out, costs, limit, held, {"calibration": rows}, on_try=seen.append)
    best = climb(("rtn",))
    assert best.kl <= limit
    assert len(seen) == len(climb.tries) <= bits.TRIES
    assert best.choice.size == min(t.choice.size for t in climb.tries if t.kl <= limit)
    assert best.kl > 0.5 * limit
    assert all(w.format is not None for n, w in ((n, op.weight) for n, op in ops(best.run.model)) if "layers" in n)
    assert all(op.weight.format is None for _, op in ops(out.model))


@pytest.mark.parametrize("factor", [0.1, 10])
def test_what_is_measured_corrects_what_is_predicted(made, factor):
    out, rows, costs = made
    losses = {n: {f: factor * loss for f, loss in of.items()} for n, of in costs.losses.items()}
    held = bits.held_out(out, TEXT, 64)
    limit = 0.5 * kl(out, "int4-g64", held)
    best = bits.Climb(out, replace(costs, losses=losses), limit, held, {"calibration": rows})(("rtn",))
    assert 0.5 * limit < best.kl <= limit


def test_a_better_solver_is_tried_and_what_it_needs_no_more_bytes_for_is_kept(made):
    out, rows, costs = made
    held = bits.held_out(out, TEXT, 64)
    climb = bits.Climb(out, costs, 0.5 * kl(out, "int4-g64", held), held, {"calibration": rows})
    best = climb()
    assert {t.solver for t in climb.tries} == {"rtn", "gptq"}
    sizes = [t.choice.size for t in climb.tries if t.kl <= climb.limit]
    assert best.choice.size == min(sizes)


def test_a_limit_that_nothing_meets_gives_the_nearest(made):
    out, rows, costs = made
    held = replace(rows, rows=rows.rows[:1])
    climb = bits.Climb(out, costs, 1e-12, held, {"calibration": rows})
    best = climb()
    assert best.kl > climb.limit
    assert best.kl == min(t.kl for t in climb.tries)
    assert [t.solver for t in climb.tries] == ["rtn", "gptq", "autoround"]  # the most bits there are, by each
    assert best.as_dict()["kl_mean"] == best.kl


def test_a_climb_takes_what_one_before_it_kept(made, tmp_path):
    out, rows, costs = made
    held = bits.held_out(out, TEXT, 64)
    settings = (out, costs, 0.5 * kl(out, "int4-g64", held), held, {"calibration": rows}, tmp_path)
    best = bits.Climb(*settings)(("rtn", "gptq"))
    there = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*.safetensors")}
    assert {f.parent.name for f in there} >= {"try-1", "try-2"}
    again = bits.Climb(*settings)(("rtn", "gptq"))
    assert {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*.safetensors")} == there
    assert again.as_dict() == best.as_dict()
    codes, same = ({n: op.weight.stored.q for n, op in ops(t.run.model) if op.weight.format} for t in (best, again))
    assert codes.keys() == same.keys()
    assert all(torch.equal(codes[n].dequantize(), same[n].dequantize()) for n in codes)


def test_costs_that_are_kept_are_not_measured_again_and_others_are_refused(made, tmp_path, monkeypatch):
    out, rows, costs = made
    first = bits.Measured(calibration=TEXT, max_length=64, work=tmp_path).costs(out, costs.footprint, rows)
    monkeypatch.setattr(bits.sensitivity, "fishers", None)
    again = bits.Measured(calibration=TEXT, max_length=64, work=tmp_path).costs(out, costs.footprint, rows)
    assert again.losses == first.losses == costs.losses
    fewer = replace(rows, rows=rows.rows[:1], sha256="other")
    with pytest.raises(InputError, match=r"--resume: .* begun with text"):
        bits.Measured(calibration=TEXT, max_length=64, work=tmp_path).costs(out, costs.footprint, fewer)


def test_what_is_shared_is_not_copied(made):
    out = made[0]
    other = bits.sharing(out)
    mine, theirs = dict(out.model.named_parameters()), dict(other.model.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(theirs[n] is p for n, p in mine.items())
    assert not {id(m) for m in out.model.modules()} & {id(m) for m in other.model.modules()}
    Freeze(scheme="int4-g64")(other)
    assert out.model.model.layers[0].mlp.up_proj.weight.format is None
    assert "stored" in other.notes
    assert "stored" not in out.notes


def test_tied_weights_stay_tied_in_what_is_shared(tmp_path):
    out = run.load(miniatures.folder(tmp_path / "m", words=miniatures.bpe()))
    other = bits.sharing(out)
    assert models.tied(other.model) == models.tied(out.model)
    assert other.model.lm_head.weight is other.model.model.embed_tokens.weight


def test_what_it_is_measured_on_is_not_what_it_is_calibrated_on(made):
    out = made[0]
    held = bits.held_out(out, None, 24)
    mine = bits.Measured(max_length=24).rows(out)
    assert held.kind == mine.kind == "self"
    assert held.sha256 != mine.sha256
    with pytest.raises(InputError, match="--calibration none"):
        bits.Measured(calibration="none").rows(out)


def test_weights_that_text_never_reached_have_a_cost(made, monkeypatch):
    out, rows, costs = made
    lost = "model.layers.1.mlp.up_proj"
    known = bits.sensitivity.fishers
    monkeypatch.setattr(
        bits.sensitivity, "fishers", lambda *a, **k: {n: s for n, s in known(*a, **k).items() if n != lost}
    )
    again = bits.Measured(calibration=rows).costs(out, costs.footprint, rows)
    assert 0 < again.losses[lost]["int8-g64"] < again.losses[lost]["int3-g64"]


def test_notation_of_a_choice_is_read_again(made):
    out, _, costs = made
    scheme = costs.within(costs.footprint.most).scheme
    assert re.fullmatch(r"\d+\.\d\d bits", scheme.name)
    rules = bits.Scheme("x", scheme.rules).notation()
    assert [e.after for e in plan(out.model, to_scheme(rules))] == [e.after for e in plan(out.model, scheme)]


def test_options_have_names_of_formats(made):
    assert all(isinstance(o, Option) and bits.parse(o.name) for o in made[2].within(10**9).options.values())
    assert isinstance(made[1], data.Dataset)


@pytest.mark.parametrize("name", ["minilm", "t5", "bert"])
def test_what_writes_no_text_is_refused(tmp_path, name):
    loaded = run.load(miniatures.folder(tmp_path / "m", name), weights=False).loaded
    with pytest.raises(InputError):
        bits.check(loaded, None, False)
