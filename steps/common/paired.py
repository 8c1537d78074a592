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
    quantile = float(stats.t.ppf(0.5 + confidence / 200, count - 1))
    return mean, quantile * statistics.stdev(differences) / math.sqrt(count)
