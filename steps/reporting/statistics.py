"""Do differences between models hold? Bootstrap intervals over users, and paired tests with their correction."""

from itertools import combinations
from typing import Any

import numpy as np
import torch
from scipy import stats

from steps.common.cli import StepError
from steps.evaluation.metrics import Ranks, user_values
from steps.reporting.records import Record, TestRanks, by_row
from steps.reporting.task import load_task

RESAMPLES = 2000
CONFIDENCE = 0.95
_DIGITS = 12  # of a difference: the mean of equal gains over 6 seeds is not to the bit the mean over 5
_BLOCK = 100  # resamples at once: 100 x 138,493 indices are 0.1 GB


def metrics_of_intervals() -> list[str]:
    """The compared metric, and then the others that the paper reports."""
    task = load_task()
    return [task.compared, *(name for name in task.paper if name != task.compared)]


def values_of_users(ranks: TestRanks) -> np.ndarray:
    """Each test user's value of every metric of `metrics_of_intervals`: (U, M) float64."""
    of_users = Ranks(torch.from_numpy(ranks.best), torch.from_numpy(ranks.ties))
    return np.stack([user_values(of_users, name).numpy() for name in metrics_of_intervals()], axis=1)


def values_of_models(records: list[Record]) -> dict[tuple[str, str], dict[str, np.ndarray]]:
    """Per (dataset, protocol) and model: each test user's values (U, M), averaged over the seeds that are there.

    Raises StepError if a run's ranks are missing, or of other users than another's.
    """
    found: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    users: dict[tuple[str, str], np.ndarray] = {}
    for (dataset, protocol, model), seeds in by_row(records).items():
        of_seeds = []
        for seed in seeds:
            ranks = seed.ranks()
            if not np.array_equal(ranks.users, users.setdefault((dataset, protocol), ranks.users)):
                raise StepError(
                    f"{seed.run.path} ranks other users than the runs before it; train and evaluate it again"
                )
            of_seeds.append(values_of_users(ranks))
        found.setdefault((dataset, protocol), {})[model] = np.mean(of_seeds, axis=0)
    return found


def resample(models: dict[str, np.ndarray], seed: int = 0) -> dict[str, np.ndarray]:
    """Each model's means (resamples, M) over users drawn with replacement, the same draws for all models.

    models: of the same users (U, M). The resampled means of a difference are then the differences of these.
    """
    random = np.random.default_rng(seed)
    values = np.concatenate(list(models.values()), axis=1)
    users, means = len(values), []
    for _ in range(RESAMPLES // _BLOCK):
        drawn = random.integers(0, users, (_BLOCK, users))
        times = np.stack([np.bincount(row, minlength=users) for row in drawn])
        means.append(times.astype(float) @ values / users)
    widths = np.cumsum([one.shape[1] for one in models.values()])[:-1]
    return dict(zip(models, np.split(np.concatenate(means), widths, axis=1), strict=True))


def interval(means: np.ndarray) -> tuple[float, float]:
    """The percentile bootstrap interval of a mean, from its values (resamples,) over resampled users."""
    tail = (1 - CONFIDENCE) / 2
    return float(np.quantile(means, tail)), float(np.quantile(means, 1 - tail))


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down correction: adjusted p-values, in the order given."""
    order = np.argsort(p_values, kind="stable")
    scaled = np.asarray(p_values)[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted.tolist()


def compare_pairs(models: dict[str, np.ndarray], means: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """A row per pair of models, the better one first, with Holm-corrected p-values over all pairs.

    means: what `resample` made of the models. p is of both sides, and 1 where the ranks speak against the mean: many
    small gains can outrank a few large losses. Most users gain the same from both models; Pratt's treatment of these
    zeros keeps the test's level, where splitting their ranks halves it.
    """
    rows: list[dict[str, Any]] = []
    for one, other in combinations(models, 2):
        better, worse = (one, other) if models[one].mean() >= models[other].mean() else (other, one)
        difference = (models[better] - models[worse]).round(_DIGITS)
        low, high = interval(means[better] - means[worse])
        p = 1.0
        if difference.any():
            p = min(1.0, 2 * float(stats.wilcoxon(difference, zero_method="pratt", alternative="greater").pvalue))
        rows.append(
            {
                "better": better,
                "worse": worse,
                "difference": float(difference.mean()),
                "low": low,
                "high": high,
                "p": p,
                "users": len(difference),
            }
        )
    for row, adjusted in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = adjusted
    return rows


def interval_rows(models: dict[str, np.ndarray], means: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """A row per model and metric: mean, interval, and the gain over the baseline as a share, with its interval.

    models, means: of one table, and what `resample` made of them. No gain where the table has no baseline.
    """
    baseline, rows = load_task().baseline, []
    for model, values in models.items():
        for place, metric in enumerate(metrics_of_intervals()):
            mean, (low, high) = values[:, place].mean(), interval(means[model][:, place])
            row = {"model": model, "metric": metric, "mean": mean, "low": low, "high": high}
            if baseline in models and model != baseline and models[baseline][:, place].any():
                with np.errstate(divide="ignore", invalid="ignore"):  # draws in which the baseline never hits
                    gains = np.nan_to_num(means[model][:, place] / means[baseline][:, place] - 1)
                low, high = interval(gains)
                row |= {"gain": mean / models[baseline][:, place].mean() - 1, "gain_low": low, "gain_high": high}
            rows.append(row)
    return rows
