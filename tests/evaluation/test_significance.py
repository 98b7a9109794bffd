"""Intervals and tests compared with calculations by hand and closed forms, and their error rates with simulations."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtransfer.evaluation import significance
from xtransfer.evaluation.significance import Outcomes, bootstrap, compare, holm, mcnemar, tail_p, unit_variance, wilson
from xtransfer.runs.workdir import DEFAULT_DRAW, RunId

SIMULATIONS = 400
# Three standard errors of a share of 5 % in SIMULATIONS draws: 0.033.
TOLERANCE = 3 * math.sqrt(0.05 * 0.95 / SIMULATIONS)


def outcomes(correct, languages=None, seeds=None):
    correct = np.asarray(correct, float)
    names = languages or tuple(f"l{i}" for i in range(correct.shape[1]))
    runs = tuple(RunId(DEFAULT_DRAW, seed) for seed in seeds or range(len(correct)))
    return Outcomes(names, runs, tuple(map(str, range(correct.shape[2]))), correct)


def signs(rng, size, share=0.15):
    """Draw differences of which a share is 1 or −1, with mean 0."""
    return rng.choice([-1.0, 0.0, 1.0], p=[share / 2, 1 - share, share / 2], size=size)


def test_holm_by_hand():
    # Sorted: 4 · 0.005, 3 · 0.01, 2 · 0.03, and 1 · 0.04, which may not fall below the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1, 1]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_the_order_and_lies_between_none_and_bonferroni(p_values):
    corrected = holm(p_values)
    for p, q in zip(p_values, corrected, strict=True):
        assert p <= q <= min(1, p * len(p_values))
    for i in np.argsort(p_values)[:-1]:
        assert all(corrected[i] <= corrected[j] for j in range(len(p_values)) if p_values[j] > p_values[i])


def test_mcnemar_is_exact_for_few_items_and_corrected_for_many():
    assert mcnemar(1, 6) == mcnemar(6, 1) == pytest.approx(2 * (1 + 7) / 2**7)
    assert mcnemar(0, 0) == mcnemar(4, 4) == 1
    assert mcnemar(0, 24) == pytest.approx(2 / 2**24)
    # χ² = (|10 − 20| − 1)²/30 = 2.7 with one degree of freedom, whose tail is erfc(√(χ²/2)).
    assert mcnemar(10, 20) == pytest.approx(math.erfc(math.sqrt(2.7 / 2)))
    assert mcnemar(20, 20) == 1


@pytest.mark.parametrize(("share", "count"), [(0.8, 10), (0.5, 1000), (0.123, 57)])
def test_wilsons_bounds_are_the_shares_that_the_score_test_just_accepts(share, count):
    for bound in wilson(share, count):
        assert abs(share - bound) / math.sqrt(bound * (1 - bound) / count) == pytest.approx(1.959964, rel=1e-6)
    low, high = wilson(share, count)
    assert low < share < high


def test_wilsons_interval_stays_within_0_and_1():
    # At share 1 the lower bound is n/(n + z²).
    assert wilson(1.0, 10) == pytest.approx((10 / (10 + 1.959964**2), 1))
    assert wilson(0.0, 10)[0] >= 0 and wilson(1.0, 10)[1] <= 1


def test_discordant_items_are_those_that_one_objective_gets_right_with_more_seeds():
    # Sums over seeds: 2, 0, −1, 1, 0.
    assert significance.discordant(np.array([[1, 1, 0, 1, 0], [1, -1, -1, 0, 0]])) == (2, 1)


@pytest.mark.parametrize(
    ("difference", "total", "noise"),
    [
        # Seed means 1 and 0 have variance 1/2, and no item differs from its seed.
        ([[1, 1], [0, 0]], 1 / 2, 0),
        # Equal seed means. The four residuals ±1/2 have the sum of squares 1, over 1 degree of freedom; over 2: 1/2.
        ([[1, 0], [0, 1]], 0, 1 / 2),
        # Seed means 3/4 and 1/4: 1/8. The residuals ±(1/4, 1/4, 1/4, −3/4) have variance 3/2 / 3 = 1/2; over 4: 1/8.
        ([[1, 1, 1, 0], [0, 0, 0, 1]], 1 / 8, 1 / 8),
        # Seed means 1 and 1/4: 9/32. Residuals ±(3/8, −1/8, −1/8, −1/8): 3/8 / 3 = 1/8; over 4: 1/32.
        ([[1, 1, 1, 1], [1, 0, 0, 0]], 9 / 32, 1 / 32),
    ],
)
def test_the_variance_between_seeds_and_the_part_of_items(difference, total, noise):
    actual = unit_variance(np.array(difference, float)[:, None])
    np.testing.assert_allclose(actual, [[total, total], [noise, noise]], atol=1e-12)


def test_the_noise_of_items_counts_once():
    """If seeds and items are noise alone, Student's t covers all of it, and the resampled items add nothing."""
    difference = signs(np.random.default_rng(4), (5, 1, 3000))
    low, high = significance.percentile_interval(bootstrap(difference, resamples=100_000))[:, 0]
    half = 2.776445 * difference.mean(axis=2).std(ddof=1) / math.sqrt(5)  # the table of t: 4 degrees of freedom
    assert high - low == pytest.approx(2 * half, rel=0.03)


def test_two_seeds_that_agree_by_chance_have_the_interval_of_items():
    rng = np.random.default_rng(5)
    items = signs(rng, (1, 1, 400))
    difference = np.concatenate([items, rng.permuted(items, axis=2)])  # equal means on other items
    samples = bootstrap(difference)
    low, high = significance.percentile_interval(samples)[:, 0]
    assert high - low == pytest.approx(2 * 1.959964 * difference.mean(axis=0).std() / math.sqrt(400), rel=0.03)


def test_the_spread_of_resampled_items_is_the_standard_error():
    # One seed, so items only: the variance of the mean of n items is their variance over n.
    difference = signs(np.random.default_rng(0), (1, 1, 500))
    samples = bootstrap(difference)[:, 0]
    assert samples.mean() == pytest.approx(difference.mean(), abs=5e-4)
    assert samples.std() == pytest.approx(difference.std() / math.sqrt(500), rel=0.03)  # 4 standard errors of 10,000


def test_translations_are_resampled_together_and_other_texts_are_not():
    difference = signs(np.random.default_rng(1), (1, 1, 300))
    translated = np.repeat(difference, 4, axis=1)  # the same in four languages
    np.testing.assert_allclose(bootstrap(translated).std(axis=0), difference.std() / math.sqrt(300), rtol=0.03)
    separate = np.full((1, 4, 1200), np.nan)
    for language in range(4):
        separate[:, language, language * 300 : (language + 1) * 300] = difference[:, 0]
    spread = bootstrap(separate).std(axis=0)
    np.testing.assert_allclose(spread[:4], difference.std() / math.sqrt(300), rtol=0.03)
    assert spread[4] == pytest.approx(difference.std() / math.sqrt(300) / 2, rel=0.03)  # four independent languages


def test_a_language_without_some_items_keeps_its_own_number():
    difference = np.array([[[1.0, 1, 0, 0], [1, np.nan, 0, np.nan]]])  # means 1/2 and 1/2
    samples = bootstrap(difference, resamples=200)
    assert set(np.unique(samples[:, 0] * 4)) <= {0, 1, 2, 3, 4} and set(np.unique(samples[:, 1] * 2)) <= {0, 1, 2}
    np.testing.assert_allclose(samples[:, 2], samples[:, :2].mean(axis=1))


def test_the_error_of_the_seeds_mean_is_students_t():
    # Each item is right or wrong with its whole seed, so items add nothing: the interval is mean ± t(2) · sd/√3.
    by_seed = np.array([0.0, 0.1, 0.5])
    difference = np.zeros((3, 1, 10))
    for seed, share in enumerate(by_seed):
        difference[seed, 0] = share  # not 0 or 1, so that no item differs from another
    low, high = significance.percentile_interval(bootstrap(difference, resamples=400_000))[:, 0]
    half = 4.302653 * by_seed.std(ddof=1) / math.sqrt(3)  # the table of t: 2 degrees of freedom, 97.5 %
    assert (low, high) == pytest.approx((0.2 - half, 0.2 + half), rel=0.02)


def test_draws_take_the_place_of_seeds():
    # Two seeds in each of three draws, whose means are 0.0, 0.1, and 0.5: the half width is that of three seeds above.
    shares = [-0.2, 0.2, 0.0, 0.2, 0.4, 0.6]
    runs = tuple(RunId(draw, seed) for draw in ("a", "b", "c") for seed in (0, 1))
    correct = np.broadcast_to(np.array(shares)[:, None, None], (6, 1, 10)).copy()
    of_draws = Outcomes(("de",), runs, tuple(map(str, range(10))), correct)
    nothing = Outcomes(("de",), runs, of_draws.items, np.zeros_like(correct))
    assert of_draws.units == ("a", "b", "c")
    assert of_draws.by_unit[:, 0, 0] == pytest.approx([0.0, 0.1, 0.5])
    de, _ = compare(of_draws, nothing, resamples=100_000)
    half = 4.302653 * np.std([0.0, 0.1, 0.5], ddof=1) / math.sqrt(3)
    assert de.interval == pytest.approx((0.2 - half, 0.2 + half), rel=0.03)
    assert de.by_unit.by_unit == pytest.approx({"a": 0.0, "b": 0.1, "c": 0.5})
    # The seeds of a draw are no further draws: their own spread does not count as three times as many units.
    one_draw = Outcomes(("de",), tuple(RunId("a", i) for i in range(6)), of_draws.items, correct)
    assert one_draw.units == tuple(range(6)) and one_draw.by_unit is one_draw.correct


def test_two_sided_p_counts_the_smaller_side():
    samples = np.array([[-1.0], *[[1.0]] * 8])
    assert significance.two_sided_p(samples) == pytest.approx([2 * (1 + 1) / (9 + 1)])
    assert significance.two_sided_p(np.zeros((9, 1))) == [1]


def test_the_tail_of_one_run_is_mcnemars_test_and_of_agreeing_seeds_students_t():
    one_sided = np.zeros((1, 1, 400))
    one_sided[0, 0, :100] = 1  # 100 items against none: z = √100
    assert tail_p(one_sided) == pytest.approx([math.erfc(10 / math.sqrt(2))] * 2)
    # t = 1 / (0.001/√3) with 2 degrees of freedom, whose two-sided tail is 1 − t/√(t² + 2).
    by_seed = np.broadcast_to(np.array([1.0, 1.001, 0.999])[:, None, None], (3, 1, 10_000))
    t = math.sqrt(3) / 0.001
    assert tail_p(by_seed) == pytest.approx([1 - t / math.sqrt(t**2 + 2)] * 2, rel=1e-3)
    assert tail_p(np.zeros((2, 1, 5))) == pytest.approx([1, 1])


def test_the_correction_for_many_languages_can_reject_at_any_level():
    """The least p-value of 10,000 resamples is 0.0002, and 204 times as much is 0.04."""
    a = np.zeros((1, 204, 300))
    a[0, :, :] = np.random.default_rng(6).random((204, 300)) < 0.8
    b = np.where(np.arange(300) < 90, 0, a)  # wrong on 90 more items, less the ones that A gets wrong too
    differences = compare(outcomes(a), outcomes(b), resamples=2000)
    assert max(difference.p_holm for difference in differences[:-1]) < 1e-9
    # A difference within reach of the resamples has their p-value, and the tail does not touch it.
    weak = np.zeros((1, 1, 300))
    weak[0, 0, :30], weak[0, 0, 30:45] = 1, -1
    samples = bootstrap(weak)
    np.testing.assert_array_equal(significance.p_values(samples, weak), significance.two_sided_p(samples))


def test_a_comparison_holds_every_number():
    a = outcomes([[[1, 1, 1, 0], [1, 1, 0, 0]], [[1, 1, 0, 0], [1, 1, 0, 1]]], ("de", "fr"), (3, 5))
    b = outcomes([[[1, 0, 1, 0], [1, 1, 0, 0]], [[0, 0, 0, 0], [1, 1, 0, 1]]], ("de", "fr"), (3, 5))
    de, fr, average = compare(a, b)
    assert (de.language, de.count, de.a, de.b, de.mean) == ("de", 4, 0.625, 0.25, 0.375)
    assert de.by_unit.by_unit == {3: 0.25, 5: 0.5}
    assert de.a_interval == wilson(0.625, 4)
    assert de.p_mcnemar == mcnemar(2, 0)
    assert (fr.mean, fr.p, fr.p_holm, fr.interval) == (0, 1, 1, (0, 0))
    assert (average.language, average.count, average.mean) == (None, 8, 0.1875)
    assert (average.p_holm, average.p_mcnemar, average.a_interval) == (None, None, None)
    assert average.by_unit.by_unit == {3: 0.125, 5: 0.25}
    assert compare(a, b) == [de, fr, average]  # the resamples are seeded


def test_the_reverse_comparison_has_the_reverse_interval():
    rng = np.random.default_rng(2)
    a, b = outcomes(rng.random((3, 2, 200)) < 0.8), outcomes(rng.random((3, 2, 200)) < 0.7)
    for forward, backward in zip(compare(a, b), compare(b, a), strict=True):
        assert forward.mean == -backward.mean
        assert forward.interval == pytest.approx((-backward.interval[1], -backward.interval[0]), abs=0.01)


def test_outcomes_of_other_items_are_refused():
    with pytest.raises(ValueError, match="different languages, runs, or items"):
        compare(outcomes(np.ones((1, 1, 3))), outcomes(np.ones((1, 1, 4))))


def test_selecting_languages_drops_the_items_of_the_others():
    whole = outcomes([[[1, 0, np.nan, np.nan], [np.nan, 1, np.nan, 0]]], ("de", "fr"))
    part = whole.select(("fr",))
    assert (part.languages, part.items) == (("fr",), ("1", "3"))
    np.testing.assert_array_equal(part.correct, [[[1, 0]]])


def misses(draw):
    """Return the share of simulations in which the 95 % interval of a true difference of 0 excludes it.

    It is the false-positive rate too, because p is below 0.05 if, and only if, the interval excludes 0.
    """
    rng = np.random.default_rng(0)
    count = 0
    for simulation in range(SIMULATIONS):
        samples = bootstrap(draw(rng), resamples=1000, seed=simulation)[:, -1:]
        (low,), (high,) = significance.percentile_interval(samples)
        is_miss = low > 1e-12 or high < -1e-12  # zero, but for rounding
        p = float(significance.two_sided_p(samples)[0])
        assert abs(p - 0.05) < 0.003 or is_miss == (p < 0.05)
        count += is_miss
    return count / SIMULATIONS


def test_the_error_rate_of_items_alone_is_near_5_percent():
    assert misses(lambda rng: signs(rng, (1, 1, 200))) == pytest.approx(0.05, abs=TOLERANCE)


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("effect", [0, 0.03, 0.1])
def test_the_error_rate_of_few_seeds_is_at_most_5_percent(seeds, effect):
    """The noise of 400 items has the standard deviation 0.019, so seeds add nothing, or up to five times as much."""

    def draw(rng):
        shift = rng.normal(0, effect, (seeds, 1, 1))
        shape = (seeds, 1, 400)
        return np.where(rng.random(shape) < np.abs(shift), np.sign(shift), signs(rng, shape))

    assert misses(draw) <= 0.05 + TOLERANCE


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_error_rate_is_at_most_5_percent_if_seeds_agree_on_items(seeds):
    def draw(rng):
        shape = (seeds, 1, 200)
        return np.where(rng.random(shape) < 0.8, signs(rng, (1, 1, 200)), signs(rng, shape))

    assert misses(draw) <= 0.05 + TOLERANCE


def test_the_error_rate_of_an_average_over_translations_is_at_most_5_percent():
    def draw(rng):
        shift = rng.normal(0, 0.03, (3, 1, 1))
        agreed = np.where(rng.random((3, 2, 200)) < 0.7, signs(rng, (1, 1, 200)), signs(rng, (3, 2, 200)))
        return np.where(rng.random((3, 2, 200)) < np.abs(shift), np.sign(shift), agreed)

    assert misses(draw) <= 0.05 + TOLERANCE


@pytest.mark.parametrize(("seeds", "most"), [(2, 4.8), (3, 2.2), (5, 1.5)])
def test_intervals_are_no_wider_than_students_t(seeds, most):
    """With a known variance the half width is 1.96 standard errors; with S seeds it is t(S − 1), times the median of s.

    Those are 12.7 · 0.67 / 1.96 = 4.4 for two seeds, 4.30 · 0.83 / 1.96 = 1.8, and 2.78 · 0.92 / 1.96 = 1.3.
    """
    rng = np.random.default_rng(0)
    widths, means = [], []
    for simulation in range(SIMULATIONS):
        shift = rng.normal(0, 0.05, (seeds, 1, 1))
        difference = np.where(rng.random((seeds, 1, 400)) < np.abs(shift), np.sign(shift), 0.0)
        low, high = significance.percentile_interval(bootstrap(difference, resamples=1000, seed=simulation))[:, 0]
        widths.append(high - low)
        means.append(difference.mean())
    assert np.median(widths) / (2 * 1.959964 * np.std(means)) < most
