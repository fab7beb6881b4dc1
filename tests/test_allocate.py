"""The least loss for so many bytes, against all choices there are."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.allocate import Option, allocate

numbers = st.integers(1, 99)
weights = st.lists(st.lists(st.tuples(numbers, numbers), min_size=3, max_size=5), min_size=3, max_size=5)


def table(sizes):
    return {f"w{i}": [Option(f"f{j}", loss / 7, b) for j, (loss, b) in enumerate(o)] for i, o in enumerate(sizes)}


def best(options, budget):
    """The least loss of all choices that fit."""
    fitting = (c for c in itertools.product(*options.values()) if sum(o.bytes for o in c) <= budget)
    return min(sum(o.loss for o in c) for c in fitting)


@given(weights, st.floats(0, 1.1))
def test_no_choice_that_fits_loses_less(sizes, share):
    options = table(sizes)
    least, most = (sum(which(o.bytes for o in w) for w in options.values()) for which in (min, max))
    budget = least + int(share * (most - least))
    found = allocate(options, budget)
    assert list(found) == list(options)
    assert all(found[w] in options[w] for w in options)
    assert sum(o.bytes for o in found.values()) <= budget
    assert sum(o.loss for o in found.values()) == pytest.approx(best(options, budget))


def test_the_order_of_savings_alone_would_miss_it():
    options = {"a": [Option("s", 10, 1), Option("l", 0, 11)], "b": [Option("s", 9, 1), Option("l", 0.5, 9)]}
    assert {w: o.name for w, o in allocate(options, 12).items()} == {"a": "l", "b": "s"}


def test_many_weights_are_allocated_near_the_bound():
    options = {
        f"w{i}": [Option(str(b), (1 + i % 7) * 4.0**-b, (3 + i % 5) * b) for b in range(2, 9)] for i in range(400)
    }
    budget = 400 * 5 * 4
    found = allocate(options, budget)
    spent = sum(o.bytes for o in found.values())
    assert budget - 3 <= spent <= budget
    assert len({o.name for o in found.values()}) > 1


def test_what_cannot_fit():
    with pytest.raises(ValueError, match="smallest"):
        allocate({"a": [Option("f", 1, 5)], "b": [Option("f", 1, 6)]}, 10)
