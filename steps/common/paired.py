"""Differences that are paired by seed."""

import math
import statistics
from collections.abc import Sequence

from scipy import stats


def student(differences: Sequence[float], confidence: float) -> tuple[float, float]:
    """The mean of paired differences, and half its interval of so many percent (Student's t).

    Of one difference the half is infinite: nothing follows from it. Of none the mean is 0.
    """
    count = len(differences)
    if not count:
        return 0.0, math.inf
    mean = statistics.fmean(differences)
    if count == 1:
        return mean, math.inf
    return mean, half_interval(statistics.stdev(differences), count, confidence)


def half_interval(deviation: float, count: int, confidence: float) -> float:
    """Half the interval of so many percent of the mean of `count` values of this standard deviation (Student's t)."""
    return float(stats.t.ppf(0.5 + confidence / 200, count - 1)) * deviation / math.sqrt(count)
