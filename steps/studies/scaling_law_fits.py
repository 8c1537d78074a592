"""Laws of quality by compute, fitted by least squares to many resamplings at once, and the resamplings.

x is ln C, of FLOPs C. Values have a row a budget and a column a resampling, of which the first is the data as they are.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]

#: The paper's form of a hit rate (arXiv 2402.17152); a straight line by the logarithms of both; and the form of arXiv
#: 2412.00430, there of depth and width, here of compute: it rises more and more slowly, and falls where b is above 0.
LOGARITHM, POWER, SATURATING = "a + b ln C", "a C^b", "a - c C^-e - b ln C"
#: How many numbers each law has.
LAWS = {LOGARITHM: 2, POWER: 2, SATURATING: 4}


@dataclass(frozen=True)
class Fit:
    """A law fitted to each column: a, b, c, e (4, K), with x counted from `start`; the whole law times `sign`."""

    law: str
    numbers: Array
    start: float
    sign: int = 1

    @property
    def exponent(self) -> Array:
        """(K,): b of a logarithm or power; e of the saturating law, NaN where c is 0."""
        _, b, c, e = self.numbers
        return np.where(c > 0, e, np.nan) if self.law == SATURATING else b

    def predict(self, x: Sequence[float] | Array) -> Array:
        """Values (n, K) at x (n,)."""
        a, b, c, e = self.numbers
        since = np.asarray(x, dtype=np.float64)[:, None] - self.start
        if self.law == SATURATING:
            return np.asarray(self.sign * (a - c * np.exp(-e * since) - b * since))
        return np.asarray(np.exp(a + b * since) if self.law == POWER else a + b * since)


def fit(law: str, x: Sequence[float] | Array, values: Array, exponents: Array, more_is_better: bool = True) -> Fit:
    """Fit a law to values (n, K) at x (n,).

    A power is fitted to logarithms; a column with a value of 0 has NaN. Of the saturating law b and c are 0 or more, of
    the values' negatives where less is better. For each of `exponents` the rest is linear: with both terms, with one,
    or with none; the best without a negative number is taken.
    """
    since = np.asarray(x, dtype=np.float64) - x[0]
    count, ones = values.shape[1], np.ones(len(since))
    if law != SATURATING:
        if law == POWER:
            values = np.where((values > 0).all(axis=0), np.log(np.maximum(values, np.finfo(float).tiny)), np.nan)
        line = np.linalg.pinv(np.stack([ones, since], axis=1)) @ values
        return Fit(law, np.concatenate([line, np.zeros((2, count))]), float(x[0]))
    sign = 1 if more_is_better else -1
    best, numbers = np.full(count, np.inf), np.zeros((4, count))
    for e in (np.inf, *exponents):  # without c, then with it
        for with_b in (False, True):
            columns = [ones, *([-np.exp(-e * since)] if e < np.inf else []), *([-since] if with_b else [])]
            design = np.stack(columns, axis=1)
            found = np.linalg.lstsq(design, sign * values, rcond=None)[0]
            error = ((design @ found - sign * values) ** 2).sum(axis=0)
            better = (found[1:] >= 0).all(axis=0) & (error < best)
            b = found[-1] if with_b else np.zeros(count)
            c = found[1] if e < np.inf else np.zeros(count)
            rate = np.full(count, e if e < np.inf else 0.0)
            numbers = np.where(better, np.stack([found[0], b, c, rate]), numbers)
            best = np.where(better, error, best)
    return Fit(law, numbers, float(x[0]), sign)


@dataclass(frozen=True)
class Frontier:
    """The best of all sizes for each budget, of runs that take no more. budgets (n,): logarithms of FLOPs to base 10,
    rising. values (n, K). best: by budget, the size that is best in the data as they are, and its own budget."""

    budgets: list[float]
    values: Array
    best: list[tuple[str, float]]

    def x(self, budgets: Iterable[float] | None = None) -> Array:
        """ln C of these budgets, or of all."""
        return np.asarray(list(self.budgets if budgets is None else budgets)) * np.log(10)


#: A metric by size, seed and budget.
Points = Mapping[str, Mapping[int, Mapping[float, float]]]


def widening(seeds: int, confidence: float) -> float:
    """By how much a bootstrap's deviations from the mean of so few seeds are too small, for a band of so many percent.

    sqrt(n / (n - 1)), as a resampling has the variance of the n values about their own mean; and Student's quantile
    over the normal one, as that variance is itself an estimate. Of one seed 1, since nothing is known of its spread.
    """
    if seeds < 2:
        return 1.0
    share, freedom = 0.5 + confidence / 200, seeds - 1
    return float((seeds / freedom) ** 0.5 * stats.t.ppf(share, freedom) / stats.norm.ppf(share))


def frontier(
    points: Points,
    draws: int,
    random: np.random.Generator,
    more_is_better: bool = True,
    confidence: float | None = None,
) -> Frontier:
    """The frontier of the mean over seeds, in the data and in so many resamplings of each size's seeds.

    A budget need not be used up: where every size of it is worse than one of a smaller budget, that one counts. A seed
    is drawn with all of its budgets, as these are of one run. Which size counts is chosen in the data alone: chosen
    again in each resampling, the best of noisy means would be above the truth, the more so the more are compared.
    Resamplings are left out in which a size that counts has no seed that came to its budget. With `confidence` a mean's
    deviation from that of all seeds is multiplied by `widening`, so that bands of so many percent cover: for each
    budget of the seeds that came to it, as a run that failed tells nothing of the spread there.
    """
    budgets = sorted({budget for seeds in points.values() for run in seeds.values() for budget in run})
    sign, sizes = 1 if more_is_better else -1, []
    for seeds in points.values():
        runs = np.array([[run.get(budget, np.nan) for budget in budgets] for run in seeds.values()])
        drawn = random.integers(0, len(runs), (draws + 1, len(runs)))
        drawn[0] = np.arange(len(runs))
        there = (~np.isnan(runs[drawn])).sum(axis=1)
        means = np.nansum(runs[drawn], axis=1) / np.maximum(there, 1)
        wider = np.array([1.0 if confidence is None else widening(int(seeds), confidence) for seeds in there[0]])
        sizes.append(np.where(there > 0, sign * (means[0] + wider * (means - means[0])), -np.inf).T)
    stacked = np.stack(sizes, axis=1)  # by budget, size and resampling
    of_data = stacked[:, :, 0]
    best = [np.unravel_index(of_data[:end].argmax(), of_data.shape) for end in range(1, len(budgets) + 1)]
    values = np.array([stacked[place] for place in best])
    names, kept = list(points), np.isfinite(values).all(axis=0)
    return Frontier(budgets, sign * values[:, kept], [(names[size], budgets[budget]) for budget, size in best])


def judge(
    law: str, of: Frontier, held_out: int, exponents: Array, more_is_better: bool = True
) -> tuple[Array | None, Array | None]:
    """The exponent (K,) of a law fitted to a frontier; and the mean relative error (K,) of what it predicts for the
    `held_out` largest budgets, fitted to the others. None where there are fewer budgets than the law has numbers."""
    exponent = error = None
    if len(of.budgets) >= LAWS[law]:
        exponent = fit(law, of.x(), of.values, exponents, more_is_better).exponent
    if len(of.budgets) - held_out >= LAWS[law]:
        known = fit(law, of.x()[:-held_out], of.values[:-held_out], exponents, more_is_better)
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = known.predict(of.x()[-held_out:]) / of.values[-held_out:]
        error = np.abs(relative - 1).mean(axis=0)
    return exponent, error


def growth(of: Frontier, budgets: Sequence[float]) -> Array:
    """What quality gains by a decade of compute on these budgets (K,), by the logarithm fitted to them alone, as a
    share of their mean."""
    values = of.values[[of.budgets.index(budget) for budget in budgets]]
    return fit(LOGARITHM, of.x(budgets), values, np.zeros(0)).exponent * np.log(10) / values.mean(axis=0)


def band(values: Array, confidence: float) -> tuple[float, float, float]:
    """The value of the data, and the ends of a band that so many percent of the resamplings lie in; NaN where one of
    them has none."""
    tail = (100 - confidence) / 2
    low, high = np.percentile(values[1:] if len(values) > 1 else values, [tail, 100 - tail])
    return float(values[0]), float(low), float(high)
