"""Which directions of what blocks give matter."""

from dataclasses import replace

import pytest
import torch

from halfbyte import InputError, calibrate, data, feed, matters, models
from halfbyte.formats import parse
from halfbyte.kernels import half
from halfbyte.layers import ops
from halfbyte.solvers import Call, autoround
from miniatures import folder, tokenizer


@pytest.fixture(autouse=True)
def _float32(monkeypatch):
    """What is found block by block is compared to what the whole model gives."""
    monkeypatch.setattr(half, "fast", lambda: False)


def batches(rows=3):
    found = data.encode(data.records([{"text": f"the {n} of some words"} for n in range(rows)]), tokenizer(), 12)
    return data.stacked(list(data.eval_batches(found, 1, 0)), 2)


def whole(model, seed=0):
    """By autograd through all of the model at once: E[g g^T] of every block, token by token by its size, and those of
    the largest by no more than twice the median of those that a block is called with."""
    model.requires_grad_(True)
    generator, found = torch.Generator().manual_seed(seed), {}
    for batch in batches():
        sized: dict[str, list[torch.Tensor]] = {}
        for k in range(len(batch.input_ids)):
            given = {}
            handles = [
                block.register_forward_hook(lambda m, args, y, p=p, to=given: to.update({p: y}))
                for p, block in models.blocks(model)
            ]
            row = {n: v[k : k + 1] if isinstance(v, torch.Tensor) else v for n, v in batch.inputs.items()}
            likely = model(**row).logits.float().log_softmax(-1).flatten(0, 1)
            drawn = torch.multinomial(likely.detach().exp(), 1, generator=generator)
            gradients = torch.autograd.grad(likely.gather(1, drawn).sum(), list(given.values()))
            for (prefix, h), g in zip(given.items(), gradients, strict=True):
                sized.setdefault(prefix, []).append((g * h.norm(dim=-1, keepdim=True)).flatten(0, -2).detach())
            for handle in handles:
                handle.remove()
        for prefix, rows in sized.items():
            x = torch.cat(rows)
            most = matters.MOST * x.norm(dim=-1).median()
            x = torch.stack([g * min(1, float(most / g.norm())) for g in x])
            found[prefix] = found.get(prefix, 0) + x.T @ x
    return [m / m.diagonal().mean() for m in found.values()]


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "gemma3", "qwen3-moe"])
def test_block_by_block_as_through_the_whole_model(tmp_path, name):
    model = models.load(folder(tmp_path / "m", name)).model
    named = models.blocks(model)
    fed = feed.Feed(model, [m for _, m in named], batches())
    found = matters.directions(fed, named, calibrate.IN_MEMORY)
    for mine, theirs in zip(found, whole(model), strict=True):
        expected = (1 - matters.EVENLY) * theirs + matters.EVENLY * torch.eye(len(theirs))
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(fed.states, fed.floats, strict=True))


def test_no_more_text_is_asked_than_is_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(matters, "ROWS", 2)
    model = models.load(folder(tmp_path / "m", "llama")).model
    named, used = models.blocks(model), []
    fed = feed.Feed(model, [m for _, m in named], batches(20))
    handle = model.lm_head.register_forward_hook(lambda *_: used.append(1))
    matters.directions(fed, named, calibrate.IN_MEMORY)
    handle.remove()
    assert len(used) == 2


def test_a_model_without_logits_has_no_such_directions(tmp_path):
    model = models.load(folder(tmp_path / "m", "bert")).model
    named = models.blocks(model)
    fed = feed.Feed(model, [m for _, m in named], batches())
    assert matters.directions(fed, named, calibrate.IN_MEMORY) == []


@pytest.mark.parametrize("name", ["mlp.up_proj", "input_layernorm"])
def test_weights_that_hold_nan_are_named_as_ever(tmp_path, name):
    model = models.load(folder(tmp_path / "m", "llama")).model
    weight = model.get_submodule(f"model.layers.1.{name}")
    weight = weight.weight.value() if "norm" not in name else weight.weight
    weight.data[3] = float("nan")
    wanted = {n: parse("int4-g32") for n, _ in ops(model) if ".layers." in n}
    with pytest.raises(InputError, match=rf"model.layers.1.{name}.weight holds NaN"):
        calibrate.freeze(model, wanted, calibrate.SOLVERS["autoround"], batches())


def test_gradients_that_are_not_finite_tell_nothing_and_the_log_says_so(tmp_path, monkeypatch, caplog):
    model = models.load(folder(tmp_path / "m", "llama")).model
    named = models.blocks(model)
    fed = feed.Feed(model, [m for _, m in named], batches())
    back = fed.back
    monkeypatch.setattr(fed, "back", lambda i, *a: (lambda y, g: (y, [x * torch.inf for x in g]))(*back(i, *a)))
    assert matters.directions(fed, named, calibrate.IN_MEMORY) == []
    assert "all directions count alike" in caplog.text


def test_what_refines_a_blocks_codes_is_told_its_own(tmp_path):
    model = models.load(folder(tmp_path / "m", "llama")).model
    named, told = models.blocks(model), []
    found = matters.directions(feed.Feed(model, [m for _, m in named], batches()), named, calibrate.IN_MEMORY)

    def refine(block, inputs, targets, sites, codes):
        told.append([call.matter for call in inputs])
        return codes

    wanted = {n: parse("int8-g32") for n, _ in ops(model) if ".layers." in n}
    calibrate.freeze(model, wanted, replace(calibrate.SOLVERS["gptq"], refine=refine), batches())
    for mine, theirs in zip(told, found, strict=True):
        assert mine
        assert all(torch.equal(m, theirs) for m in mine)


def test_errors_count_by_the_directions_that_matter():
    g = torch.Generator().manual_seed(0)
    x, target, root = (torch.randn(2, 3, 8, generator=g), torch.randn(2, 3, 8, generator=g), torch.randn(8, 8))
    e, size = x - target, target.norm(dim=-1, keepdim=True)
    call = Call(x, matter=root @ root.T)
    torch.testing.assert_close(autoround._error(torch.nn.Identity(), call, target), (e / size @ root).square().sum())
    plain = autoround._error(torch.nn.Identity(), Call(x), target)
    torch.testing.assert_close(plain, (e / size).square().sum())
