"""Intervals and tests of the difference between two objectives, paired by run (draw and seed) and test item."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xtransfer.evaluation.results import Summary, Unit
from xtransfer.runs.workdir import RunId

RESAMPLES = 10_000
LEVEL = 0.95
EXACT_BELOW = 25  # discordant items; with fewer, McNemar's test is exact, because χ² is a poor approximation

_CHUNK = 1000  # resamples in memory at a time


@dataclass(frozen=True)
class Outcomes:
    """The test items that one objective classifies correctly.

    Attributes:
      languages: the names of the L languages.
      runs: the draws and seeds of the R runs.
      items: the ids of the N items. An item that several languages have is the same one in translation.
      correct: float64 [R, L, N]; 1 if right, 0 if wrong, and NaN if the language does not have the item. In a
        multi-label task, the scores of `paired`, which are any numbers.
      multi_label: whether these are the scores of a multi-label task.
    """

    languages: tuple[str, ...]
    runs: tuple[RunId, ...]
    items: tuple[str, ...]
    correct: np.ndarray
    multi_label: bool = False

    def select(self, languages: Sequence[str]) -> "Outcomes":
        """Return the outcomes in some of the languages, with the items that these have."""
        correct = self.correct[:, [self.languages.index(language) for language in languages]]
        has_item = np.isfinite(correct[0]).any(axis=0)
        items = tuple(item for item, is_kept in zip(self.items, has_item, strict=True) if is_kept)
        return dataclasses.replace(self, languages=tuple(languages), items=items, correct=correct[:, :, has_item])

    @property
    def draws(self) -> tuple[str, ...]:
        """The draws of the runs, in their order."""
        return tuple(dict.fromkeys(run.draw for run in self.runs))

    @property
    def units(self) -> tuple[Unit, ...]:
        """The names of the S units: the draws if there are several, and otherwise the seeds."""
        return self.draws if len(self.draws) > 1 else tuple(run.seed for run in self.runs)

    @property
    def by_unit(self) -> np.ndarray:
        """The shares of a unit's runs that are right, float64 [S, L, N]."""
        if len(self.units) == len(self.runs):
            return self.correct
        draws = [run.draw for run in self.runs]
        return np.stack([self.correct[[draw == unit for draw in draws]].mean(axis=0) for unit in self.units])


@dataclass(frozen=True)
class Difference:
    """The accuracy of objective A minus the one of objective B, in one language or on average; shares, not percent.

    In a multi-label task, micro-F1 takes the place of accuracy. It has no Wilson interval and no McNemar test, which
    need items that are right or wrong.

    Attributes:
      language: the language, or None for the average over languages.
      count: the number of items in the language, or in all languages together.
      a: the accuracy of A, the mean over units, which are draws or seeds (see `Outcomes.units`).
      b: the accuracy of B.
      a_interval: the 95 % Wilson interval of `a` over items, for these runs; None for the average.
      b_interval: the one of `b`.
      by_unit: the difference by unit.
      interval: the 95 % interval of the difference, over units and items (see `bootstrap`).
      p: the two-sided p-value of a difference of zero, over units and items (see `p_values`).
      p_holm: the same with Holm's correction for the number of languages; None for the average.
      p_mcnemar: McNemar's p-value, over items for these runs; None for the average.
    """

    language: str | None
    count: int
    a: float
    b: float
    a_interval: tuple[float, float] | None
    b_interval: tuple[float, float] | None
    by_unit: Summary
    interval: tuple[float, float]
    p: float
    p_holm: float | None
    p_mcnemar: float | None

    @property
    def mean(self) -> float:
        """The difference, the mean over units."""
        return self.a - self.b


def compare(a: Outcomes, b: Outcomes, *, resamples: int = RESAMPLES, seed: int = 0) -> list[Difference]:
    """Return the differences between two objectives, one for each language and one for their average, which is last.

    Args:
      a: the outcomes of objective A.
      b: the outcomes of objective B, with the same languages, runs, and items.
      resamples: the number of resamples, see `bootstrap`.
      seed: the seed of the resamples.
    """
    if (a.languages, a.runs, a.items) != (b.languages, b.runs, b.items):
        raise ValueError("the outcomes have different languages, runs, or items")
    difference = a.by_unit - b.by_unit  # [S, L, N]
    samples = bootstrap(difference, resamples=resamples, seed=seed)  # [resamples, L + 1]
    intervals = percentile_interval(samples)  # [2, L + 1]
    p = p_values(samples, difference)  # [L + 1]
    corrected = holm(p[:-1])
    a_by_unit, b_by_unit = _means(a.by_unit), _means(b.by_unit)  # [S, L + 1]
    differences = []
    for column, language in enumerate((*a.languages, None)):
        is_average = language is None
        items = np.isfinite(difference[0]) if is_average else np.isfinite(difference[0, column])
        count = int(items.sum())
        means = [float(values[:, column].mean()) for values in (a_by_unit, b_by_unit)]
        by_unit = dict(zip(a.units, (a_by_unit - b_by_unit)[:, column].tolist(), strict=True))
        differences.append(
            Difference(
                language=language,
                count=count,
                a=means[0],
                b=means[1],
                a_interval=None if is_average or a.multi_label else wilson(means[0], count),
                b_interval=None if is_average or a.multi_label else wilson(means[1], count),
                by_unit=Summary(by_unit),
                interval=(float(intervals[0, column]), float(intervals[1, column])),
                p=float(p[column]),
                p_holm=None if is_average else corrected[column],
                p_mcnemar=None if is_average or a.multi_label else mcnemar(*discordant(difference[:, column, items])),
            )
        )
    return differences


def bootstrap(difference: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Return resampled differences in each language, and of their average.

    Items are resampled with replacement, and all seeds and languages of an item stay together: the seeds share the
    items, and translations of one text are not independent. Items that occur in the same languages are resampled among
    themselves, so a language keeps its number of items, and languages without common items are independent.

    Seeds are not resampled: of three, every ninth sample would repeat a single one. The means of S seeds on the same
    items differ by the effect of the seed, and because each item may fall out otherwise. Student's t with S − 1 degrees
    of freedom covers both. The item's own effect, which all seeds share, is added by shrinking the resampled items to
    the variance that the t term does not hold already (see `unit_variance`). Two seeds may agree by chance, so the
    result is at every quantile at least as wide as the resampled items alone. With one seed, it is these alone and says
    nothing about other seeds.

    In 2,000 simulations each of 2, 3, 5, and 10 seeds on 400 items, with seed effects of standard deviation 0 to 0.1,
    and with and without seeds that agree on items, 95 % intervals missed a true difference of 0 in 0.7 to 5.4 % of the
    cases. This is the rate of false positives, too; the standard error of 5 % is 0.5. Without the shrinking it would
    fall below 0.5 %, and without the t term's share of the noise it would be up to 14 % with two seeds. The price is
    width. If seeds have a large effect, the median interval of two seeds is 4.3 times as wide as with a known variance,
    the one of three seeds 1.8 times, of five 1.3 times, and of ten 1.1 times.

    If there are several draws, they take the place of the seeds, and a difference is the mean over the seeds of its
    draw. All draws use the same seeds, so the interval covers another sample with another teacher, and not other seeds.

    Args:
      difference: from −1 to 1 [S, L, N], and NaN where a language does not have an item.
      resamples: the number of resamples.
      seed: the seed of the random numbers.

    Returns:
      float64 [resamples, L + 1]; the last column is the average over languages. With several seeds, each column is
      sorted by itself.
    """
    from scipy.stats import t as student_t

    rng = np.random.default_rng(seed)
    seeds, languages, _ = difference.shape
    present = np.isfinite(difference[0])  # [L, N]
    summed = np.nan_to_num(difference.sum(axis=0)) / seeds / present.sum(axis=1, keepdims=True)  # [L, N]
    result = np.zeros((resamples, languages))
    for group in _groups(present):
        values, counts = np.unique(summed[:, group], axis=1, return_counts=True)  # [L, U], [U]
        for start in range(0, resamples, _CHUNK):
            rows = result[start : start + _CHUNK]
            drawn = rng.multinomial(counts.sum(), counts / counts.sum(), size=len(rows))  # [chunk, U]
            rows += drawn @ values.T
    result = np.column_stack([result, result.mean(axis=1)])
    if seeds == 1:
        return result
    total, noise = unit_variance(difference)
    centre, items = _shares(difference).sum(axis=2).mean(axis=0), _item_variance(difference)  # [L + 1]
    kept = np.sqrt(np.maximum(1 - np.divide(noise / seeds, items, out=np.ones_like(items), where=items > 0), 0))
    # Evenly spaced quantiles: the tails of few degrees of freedom are so long that random draws would miss their width.
    t = rng.permutation(student_t.ppf((np.arange(resamples) + 0.5) / resamples, seeds - 1))[:, None]
    return _wider(result, centre + kept * (result - centre) + np.sqrt(total / seeds) * t)


def unit_variance(difference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Estimate the variance between seeds in each language and of the average, and the part that items explain.

    The mean of a seed varies with the seed, and because each of its items may fall out otherwise. The second part is
    the variance of the residuals of a two-way analysis of variance (seeds × items), over the number of items. With
    several draws, a draw takes the place of a seed.

    Args:
      difference: [S, L, N] with S > 1, see `bootstrap`.

    Returns:
      Two arrays float64 [L + 1]: the variance between the means of the seeds, and its part from residuals.
    """
    parts = _shares(difference)
    total = parts.sum(axis=2).var(axis=0, ddof=1)  # [L + 1]
    noise = np.zeros_like(total)
    for group in _groups(np.isfinite(difference[0])):
        part = parts[:, :, group]
        size = part.shape[2]
        if size > 1:
            seed_means = part.mean(axis=2, keepdims=True)
            residuals = part - seed_means - part.mean(axis=0) + seed_means.mean(axis=0)
            noise += (residuals**2).sum(axis=(0, 2)) / (len(parts) - 1) * size / (size - 1)
    return total, noise


def _shares(difference: np.ndarray) -> np.ndarray:
    """Return what each item adds to the mean of its language, and to the average: [S, L + 1, N] from [S, L, N]."""
    parts = np.nan_to_num(difference) / np.isfinite(difference[0]).sum(axis=1, keepdims=True)
    return np.concatenate([parts, parts.mean(axis=1, keepdims=True)], axis=1)


def _item_variance(difference: np.ndarray) -> np.ndarray:
    """Estimate the variance of the mean over seeds that another set of items would show, float64 [L + 1]."""
    parts = _shares(difference).mean(axis=0)  # [L + 1, N]
    groups = [parts[:, group] for group in _groups(np.isfinite(difference[0]))]
    return sum((part.shape[1] * part.var(axis=1, ddof=1) for part in groups if part.shape[1] > 1), np.zeros(len(parts)))


def _wider(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return samples [B, C] that are at each quantile the farther from the median of two samples [B, C]."""
    first, second = np.sort(first, axis=0), np.sort(second, axis=0)
    half = len(first) // 2
    lower, upper = np.minimum(first[:half], second[:half]), np.maximum(first[half:], second[half:])
    return np.concatenate([lower, upper])


def percentile_interval(samples: np.ndarray, level: float = LEVEL) -> np.ndarray:
    """Return the central interval [2, C] that holds a share `level` of samples [B, C]."""
    return np.quantile(samples, [(1 - level) / 2, (1 + level) / 2], axis=0)


def two_sided_p(samples: np.ndarray) -> np.ndarray:
    """Return twice the share of samples [B, C] on the smaller side of zero [C], at least 2 / (B + 1) and at most 1.

    It is below 0.05 if the 95 % `percentile_interval` excludes zero. The sample itself counts as one more on each side,
    so that no p-value is 0.
    """
    # Sums of many equal steps may miss zero by a rounding error.
    below, above = (samples <= 1e-12).sum(axis=0), (samples >= -1e-12).sum(axis=0)
    return np.minimum(2 * (np.minimum(below, above) + 1) / (len(samples) + 1), 1)


def p_values(samples: np.ndarray, difference: np.ndarray) -> np.ndarray:
    """Return the two-sided p-values of a difference of zero in each language and of the average, float64 [L + 1].

    B resamples distinguish no p-values below 2 / (B + 1), and a correction for 204 languages would make 0.04 of that.
    If no resample lies on the other side of zero, the p-value is therefore `tail_p`, which has no such floor.

    Args:
      samples: the resamples of `difference` [B, L + 1], see `bootstrap`.
      difference: [S, L, N], see `bootstrap`.
    """
    p = two_sided_p(samples)
    is_least = p <= 2 / (len(samples) + 1)
    if is_least.any():
        p[is_least] = tail_p(difference)[is_least]
    return p


def tail_p(difference: np.ndarray) -> np.ndarray:
    """Approximate the two-sided p-values of a difference of zero far out in the tails, float64 [L + 1].

    The error of items is normal, with the variance that it would have if the true difference were 0. For one seed and
    one language this is McNemar's test without a correction. With S > 1 seeds, their error is Student's t as in
    `bootstrap`, and is added to it.

    Args:
      difference: [S, L, N], see `bootstrap`.
    """
    from scipy.stats import norm, t

    seeds, parts = len(difference), _shares(difference)
    mean = np.abs(parts.sum(axis=2).mean(axis=0))
    items = np.sqrt((parts.mean(axis=0) ** 2).sum(axis=1))
    of_seeds = np.sqrt(unit_variance(difference)[0] / seeds) if seeds > 1 else np.zeros_like(mean)
    z = np.linspace(-8, 8, 801)
    density = norm.pdf(z) / norm.pdf(z).sum()
    result = np.ones_like(mean)
    for column in np.flatnonzero(mean > 1e-12):
        tail = 2 * norm.sf(mean[column] / items[column])
        if of_seeds[column] > 0:
            distances = (mean[column] - items[column] * z) / of_seeds[column]
            tail = max(tail, 2 * float(density @ t.sf(distances, seeds - 1)))
        result[column] = min(tail, 1)
    return result


def holm(p_values: Sequence[float] | np.ndarray) -> list[float]:
    """Return p-values with Holm's correction (1979), in their order: it bounds the chance of any false difference."""
    order = np.argsort(p_values, kind="stable")
    corrected = np.asarray(p_values, float)[order] * np.arange(len(order), 0, -1)
    result = np.empty(len(order))
    result[order] = np.minimum(np.maximum.accumulate(corrected), 1)
    return result.tolist()


def discordant(difference: np.ndarray) -> tuple[int, int]:
    """Return the number of items on which A is right in more runs than B, and the reverse.

    With one run, these are the discordant pairs of McNemar's test. With several, they are majorities over runs, and the
    test says nothing about a single run.

    Args:
      difference: from −1 to 1 [S, n] for the items of one language.
    """
    summed = difference.sum(axis=0)
    return int((summed > 0).sum()), int((summed < 0).sum())


def mcnemar(only_a: int, only_b: int) -> float:
    """Return McNemar's two-sided p-value that A and B are right equally often.

    It is exact below `EXACT_BELOW` discordant items, and otherwise from χ² with Edwards' correction for continuity.

    Args:
      only_a: the number of items that only A classifies correctly.
      only_b: the number of items that only B classifies correctly.
    """
    from scipy.stats import binom, chi2

    total = only_a + only_b
    if total < EXACT_BELOW:
        return min(1.0, 2 * float(binom.cdf(min(only_a, only_b), total, 0.5)))
    return float(chi2.sf(max(abs(only_a - only_b) - 1, 0) ** 2 / total, 1))


def wilson(share: float, count: int, level: float = LEVEL) -> tuple[float, float]:
    """Return Wilson's score interval (1927) of a share of `count` items."""
    from scipy.stats import norm

    z = float(norm.ppf((1 + level) / 2))
    centre = share + z**2 / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    scale = 1 + z**2 / count
    return max((centre - half) / scale, 0.0), min((centre + half) / scale, 1.0)


def _groups(present: np.ndarray) -> list[np.ndarray]:
    """Return the indices of the items that occur in the same languages, group by group, from [L, N] booleans."""
    _, group_of_item = np.unique(present, axis=1, return_inverse=True)
    return [np.flatnonzero(group_of_item.ravel() == group) for group in range(group_of_item.max() + 1)]


def _means(values: np.ndarray) -> np.ndarray:
    """Return the means over items [S, L], and the one over languages as the last column, of values [S, L, N]."""
    by_language = np.nanmean(values, axis=2)
    return np.column_stack([by_language, by_language.mean(axis=1)])
