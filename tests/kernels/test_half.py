import pytest
import torch

from halfbyte.kernels import second_moments
from halfbyte.kernels.half import half_products


def precision():
    return torch.backends.mkldnn.matmul.fp32_precision


def test_inside_layers_and_sums_are_multiplied_in_bfloat16_and_nothing_outside():
    before, layer, x = precision(), torch.nn.Linear(8, 4), torch.randn(3, 8)
    with half_products(True):
        assert layer(x).dtype == torch.bfloat16
        assert precision() == "bf16"
    with half_products(False):
        assert layer(x).dtype == torch.float32
        assert precision() == before
    assert precision() == before


def test_an_error_inside_leaves_nothing_behind():
    before = precision()
    with pytest.raises(ZeroDivisionError), half_products(True):
        1 / 0  # noqa: B018
    assert precision() == before
    assert not torch.is_autocast_enabled("cpu")


def test_sums_are_kept_in_float32():
    x = torch.randn(4096, 500, generator=torch.Generator().manual_seed(0)) + 1
    total = torch.zeros(500, 500)
    with half_products(True):
        second_moments.add(total, x)
    exact = x.double().T @ x.double()
    error = (second_moments.mirror(total) - exact).abs().max() / exact.max()
    assert error < 2**-11  # in bfloat16 alone a sum of 4096 stops growing at a few hundred
