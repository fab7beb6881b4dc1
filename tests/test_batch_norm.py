"""Batch norms folded: the same function in eval, and nothing left standing in silence."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from halfbyte import InputError, fold_batch_norms
from halfbyte.layers import Conv, Linear, ops


def used(norm: nn.Module) -> nn.Module:
    """A batch norm whose numbers are those of training: none of them is what it began as."""
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.1, 4)
        if norm.affine:
            norm.weight.normal_()
            norm.bias.normal_()
    return norm


class Block(nn.Module):
    """Norms called as EfficientNet-Lite calls them, by functions and within a Sequential, and a branch around."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.norm = nn.Conv2d(4, 8, 1, bias=False), used(nn.BatchNorm2d(8))
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), used(nn.BatchNorm2d(8, eps=1e-3)))
        self.project, self.last = nn.Conv2d(8, 4, 1), used(nn.BatchNorm2d(4, affine=False))
        self.fc = nn.Sequential(nn.Linear(4, 6, bias=False), used(nn.BatchNorm1d(6)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm(self.expand(x)))
        y = torch.relu(self.depthwise(y))
        return self.fc((x + self.last(self.project(y))).mean((2, 3)))


X = torch.randn(5, 4, 6, 6)


@torch.no_grad()
def test_it_computes_the_same_without_norms():
    model = Block().eval()
    before = model(X)
    assert fold_batch_norms(model) is model
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    assert all(op.bias is not None for _, op in ops(model))
    torch.testing.assert_close(model(X), before, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.train()(X), model.eval()(X))  # statistics stand still


@given(out=st.integers(1, 6), of=st.sampled_from([1, 2, 3, 0]), bias=st.booleans(), seed=st.integers(0, 1000))
@torch.no_grad()
def test_every_kind_of_layer_to_its_last_bits(out, of, bias, seed):
    torch.manual_seed(seed)
    convolution, norm = {1: (nn.Conv1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.BatchNorm2d), 3: (nn.Conv3d, nn.BatchNorm3d),
                         0: (nn.Linear, nn.BatchNorm1d)}[of]  # fmt: skip
    layer = nn.Linear(3, out, bias=bias) if of == 0 else convolution(3, out, 2, bias=bias)
    model = nn.Sequential(layer, used(norm(out))).double().eval()
    x = torch.randn(2, 3, *[4] * of).double()
    before = model(x)
    torch.testing.assert_close(fold_batch_norms(model)(x), before, rtol=1e-12, atol=1e-12)


def test_what_was_trained_still_is():
    model = fold_batch_norms(Block())
    model(X).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    frozen = fold_batch_norms(Block().requires_grad_(False))
    assert not any(p.requires_grad for p in frozen.parameters())


class Before(nn.Sequential):
    """A norm before its convolution, as some networks have it."""

    def __init__(self) -> None:
        super().__init__(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(self.norm(self.conv(x))))


class Elsewhere(Twice):
    """What the convolution gives goes around the norm too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return y + self.norm(y)


class Branching(Twice):
    """A path that only numbers decide, which no tracing follows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x))
        return y if y.sum() > 0 else -y


class Shared(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self[2].weight = self[0].weight


def no_statistics() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (Before, "^0 cannot be folded: it does not follow"),
        (Twice, "norm cannot be folded: it does not follow, alone"),
        (Elsewhere, "norm cannot be folded: it does not follow, alone"),
        (Branching, "cannot be traced .* give `pairs`"),
        (Shared, "0 shares its weight"),
        (no_statistics, "keeps no running statistics"),
        (lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm2d(4)), "BatchNorm2d does not norm the channels of 0"),
    ],
)
@torch.no_grad()
def test_what_cannot_be_folded_is_said_and_nothing_is(make, says):
    model = make().eval()
    norms = {n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    with pytest.raises(InputError, match=says):
        fold_batch_norms(model)
    assert norms == {n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    for _, op in ops(model):
        assert isinstance(op, Conv | Linear)


@torch.no_grad()
def test_what_is_named_stays():
    model = Before().eval()
    used(model[0]), used(model[3])
    before = model(X)
    fold_batch_norms(model, keep=["0"])
    assert [type(m) for m in model] == [nn.BatchNorm2d, nn.ReLU, Conv, nn.Identity]
    torch.testing.assert_close(model(X), before, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_pairs_may_be_given():
    model = Branching().eval()
    used(model.norm)
    before = model(X)
    torch.testing.assert_close(fold_batch_norms(model, {"norm": "conv"})(X), before, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_norm_of_two_names_is_gone_under_both():
    model = Twice().eval()
    model.same = used(model.norm)
    model.forward = lambda x: model.same(model.conv(x))
    before = model(X)
    torch.testing.assert_close(fold_batch_norms(model, {"norm": "conv"})(X), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"keep": ["conv"]}, "'conv' is no batch norm of this module; those are norm"),
        ({"pairs": {"nrom": "conv"}}, "'nrom' is no batch norm"),
        ({"pairs": {"norm": "relu"}}, "does not follow"),
        ({"pairs": {}}, "does not follow"),
    ],
)
def test_names_that_are_none_are_refused(given, says):
    with pytest.raises(InputError, match=says):
        fold_batch_norms(Branching(), **given)


def test_one_layer_is_not_given_two_norms():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    with pytest.raises(InputError, match="two batch norms to one layer"):
        fold_batch_norms(model, {"1": "0", "2": "0"})


def test_codes_are_refused():
    import halfbyte

    model = halfbyte.quantize(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), "W8A16")
    with pytest.raises(InputError, match="fold before quantizing"):
        fold_batch_norms(model)
