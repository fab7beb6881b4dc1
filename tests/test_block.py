"""One block while it is quantized: what a solver is told of weights that are solved in turn."""

import pytest
import torch

from halfbyte import InputError, calibrate, data, models
from halfbyte.formats import parse
from halfbyte.kernels import half
from halfbyte.layers import ops
from halfbyte.solvers import Solver, gptq
from miniatures import folder, tokenizer

INT4 = parse("int4-g32")


@pytest.fixture(autouse=True)
def _float32(monkeypatch):
    """What blocks compute is compared here."""
    monkeypatch.setattr(half, "fast", lambda: False)


def batches():
    rows = data.encode(data.records([{"text": f"the {n} of some words"} for n in range(6)]), tokenizer(), 12)
    return list(data.eval_batches(rows, 1, 0))


def stream(model):
    """What blocks are fed, after their attention, and what they give: by block a list over batches each."""
    found = [([], [], []) for _ in model.model.layers]
    handles = []
    for (before, middle, after), layer in zip(found, model.model.layers, strict=True):
        handles += [
            layer.register_forward_pre_hook(lambda m, args, to=before: to.append(args[0])),
            layer.post_attention_layernorm.register_forward_pre_hook(lambda m, args, to=middle: to.append(args[0])),
            layer.register_forward_hook(lambda m, args, y, to=after: to.append(y)),
        ]
    with torch.no_grad():
        for b in batches():
            model(**b.inputs)
    for handle in handles:
        handle.remove()
    return found


def test_weights_have_their_turn_and_what_adds_to_the_block_is_told_what_it_is_without_it(tmp_path):
    model = models.load(folder(tmp_path / "m", "llama")).model
    wanted = {n: INT4 for n, _ in ops(model) if ".layers." in n}
    floats, told = stream(model), []

    def solve(block, inputs, targets, sites):
        told.append((targets, {n: (s.closes, s.moments, list(s.left)) for n, s in sites.items()}))
        return gptq.solve(block, inputs, targets, sites)

    calibrate.freeze(model, wanted, Solver("watch", solve, True, "", "gram", in_turn=True), batches())
    codes = stream(model)
    short = [[n.rpartition(".")[2] for n in sites] for _, sites in told if sites]
    assert short == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]] * 2
    ends = [(targets, *sites.values()) for targets, sites in told if targets is not None]
    for i, ((middle, (_, _, left)), (after, (_, _, last))) in enumerate(zip(ends[::2], ends[1::2], strict=True)):
        for k in range(len(batches())):
            torch.testing.assert_close(middle[k], floats[i][1][k])
            torch.testing.assert_close(after[k], floats[i][2][k])
            torch.testing.assert_close(left[k].rest, codes[i][0][k])
            torch.testing.assert_close(last[k].rest, codes[i][1][k])
    assert all((m is None) == closes for _, sites in told for closes, m, _ in sites.values())


@pytest.mark.parametrize("kept", ["self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"])
def test_what_stays_a_float_beside_weights_that_are_solved(tmp_path, kept):
    model = models.load(folder(tmp_path / "m", "llama")).model
    before = {n: op.weight.value().clone() for n, op in ops(model)}
    wanted = {n: INT4 for n, _ in ops(model) if ".layers." in n and not n.endswith(kept)}
    calibrate.freeze(model, wanted, calibrate.SOLVERS["gptq"], batches())
    for n, op in ops(model):
        assert (op.weight.format == INT4) == (n in wanted)
        assert n in wanted or torch.equal(op.weight.value(), before[n])


def test_what_a_solver_raises_leaves_the_floats_and_no_hooks(tmp_path):
    model = models.load(folder(tmp_path / "m", "llama")).model
    wanted = {n: INT4 for n, _ in ops(model) if ".layers." in n}
    floats = {n: op.weight.value().clone() for n, op in ops(model)}

    def solve(block, inputs, targets, sites):
        if any("gate_proj" in n for n in sites):
            raise InputError("not this one")
        return gptq.solve(block, inputs, targets, sites)

    with pytest.raises(InputError, match="not this one") as held:  # which holds all frames
        calibrate.freeze(model, wanted, Solver("watch", solve, True, "", "gram", in_turn=True), batches())
    assert held
    for n, op in ops(model):
        assert not op._forward_pre_hooks
        assert not op._forward_hooks
        assert "forward" not in vars(op)
        assert torch.equal(op.weight.value(), floats[n])


def lost(model, before):
    return sum((a - b).square().sum() for a, b in zip(stream(model)[-1][-1], before[-1][-1], strict=True))


def test_what_was_lost_before_attention_adds_to_a_block_is_made_good_by_it(tmp_path, monkeypatch):
    """Beside the block's last weight alone."""
    found = []
    for most in (2, 1):
        model = models.load(folder(tmp_path / "m", "llama")).model
        before = stream(model)
        ends = calibrate.Feed.ends
        monkeypatch.setattr(calibrate.Feed, "ends", lambda self, i, most=most, ends=ends: ends(self, i)[-most:])
        wanted = {n: INT4 for n, _ in ops(model) if ".layers." in n}
        calibrate.freeze(model, wanted, calibrate.SOLVERS["gptq"], batches())
        found.append(lost(model, before))
        monkeypatch.setattr(calibrate.Feed, "ends", ends)
    assert found[0] < found[1]
