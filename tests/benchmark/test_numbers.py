"""Rates, ratios, spreads, and amounts, against values worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtransfer.benchmark.measurement import order
from xtransfer.benchmark.numbers import Burst, Spread, amount_for, ratios, spread


def test_rates_of_a_burst_by_hand() -> None:
    burst = Burst(seconds=2.0, examples=60, tokens=1500, slots=2000)
    assert (burst.examples_per_second, burst.tokens_per_second, burst.real_share) == (30.0, 750.0, 0.75)


def test_ratios_are_taken_pair_by_pair_and_then_spread() -> None:
    """60, 45, and 40 examples/s over 30, 30, and 10: the median of ratios is 2, and not the ratio of medians, 1.5."""
    ours = [Burst(1.0, 60, 1, 1), Burst(2.0, 90, 1, 1), Burst(0.5, 20, 1, 1)]
    peer = [Burst(2.0, 60, 1, 1), Burst(3.0, 90, 1, 1), Burst(2.0, 20, 1, 1)]
    assert ratios(ours, peer) == [2.0, 1.5, 4.0]
    assert spread(ratios(ours, peer)) == Spread(median=2.0, least=1.5, most=4.0, count=3)
    with pytest.raises(ValueError, match="zip"):
        ratios(ours, peer[:2])


def test_the_median_of_an_even_number_is_between_the_middle_two() -> None:
    assert spread([4.0, 1.0, 2.0, 10.0]) == Spread(3.0, 1.0, 10.0, 4)


@pytest.mark.parametrize(
    ("seconds", "unit", "most", "amount"),
    [
        (3.0, 32, 10_000, 96),  # 30 a second: 90 examples, which is 3 batches of 32
        (0.001, 32, 10_000, 32),  # at least one batch
        (1000.0, 32, 100, 96),  # at most 100: three batches
        (1.0, 32, 10, 32),  # a batch above the limit is still a batch
    ],
)
def test_amount_is_a_multiple_of_the_unit(seconds: float, unit: int, most: int, amount: int) -> None:
    assert amount_for(Burst(2.0, 60, 1, 1), seconds, unit, most) == amount


@given(st.integers(1, 100), st.floats(0.01, 100), st.integers(1, 64), st.floats(1e-3, 100), st.integers(64, 10_000))
def test_any_amount_is_a_positive_multiple_within_the_limit(
    examples: int, took: float, unit: int, seconds: float, most: int
) -> None:
    amount = amount_for(Burst(took, examples, 1, 1), seconds, unit, most)
    assert amount % unit == 0 and unit <= amount <= max(unit, most)


def test_the_sides_change_their_order_from_pair_to_pair() -> None:
    assert [order(i, ("a", "b")) for i in range(3)] == [("a", "b"), ("b", "a"), ("a", "b")]
