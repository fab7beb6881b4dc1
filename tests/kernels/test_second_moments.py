import torch
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.kernels import second_moments


@given(tokens=st.integers(1, 5), inputs=st.integers(1, 1000), seed=st.integers(0, 9))
def test_by_panels_it_is_the_same_sum_and_symmetric(tokens, inputs, seed):
    x = torch.randn(2, tokens, inputs, generator=torch.Generator().manual_seed(seed))
    total = torch.zeros(inputs, inputs)
    for part in x:
        second_moments.add(total, part)
    found = second_moments.mirror(total)
    assert found is total
    torch.testing.assert_close(found, sum(part.T @ part for part in x), rtol=1e-4, atol=1e-5)
