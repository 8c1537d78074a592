"""Do differences between models hold? Bootstrap intervals over users, and paired tests with their correction."""

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import torch
from scipy import stats

from steps.common.cli import StepError
from steps.common.config import COUNT_BASED
from steps.evaluation.metrics import Ranks, user_values
from steps.reporting.outcomes import Outcomes, TestPredictions, TestRanks
from steps.reporting.records import Record, by_row, kept_together, outcomes_of
from steps.reporting.task import Task, load_task

RESAMPLES = 2000
CONFIDENCE = 0.95
_DIGITS = 12  # of a difference: the mean of equal gains over 6 seeds is not to the bit the mean over 5
_BLOCK = 100  # resamples at once: 100 x 138,493 indices are 0.1 GB


def metrics_of_intervals(task: Task | None = None) -> list[str]:
    """The compared metric, and then the others that the paper reports. task: by default retrieval."""
    task = task or load_task()
    return [task.compared, *(name for name in task.paper if name != task.compared)]


def values_of_users(outcomes: Outcomes) -> np.ndarray:
    """Each test user's value of every metric of `metrics_of_intervals`: (U, M) float64, of which the mean over users is
    the metric.

    A ranking metric is no mean over users. A user's value is then the metric plus the user's influence on it, times the
    number of users: what it would change by, to first order, if the user weighed more (the infinitesimal jackknife).
    The spread of these values is that of the metric; for AUC this is DeLong's test for users with several interactions
    each (Obuchowski 1997).
    """
    if isinstance(outcomes, TestRanks):
        beyond = [name for name in metrics_of_intervals() if not outcomes.has(name)]
        if beyond:
            raise StepError(
                f"params/tasks.yaml wants intervals of {', '.join(beyond)}, and records keep ranks up to "
                f"{outcomes.largest} alone; compare the runs themselves"
            )
        of_users = Ranks(torch.from_numpy(outcomes.best), torch.from_numpy(outcomes.ties))
        return np.stack([user_values(of_users, name).numpy() for name in metrics_of_intervals()], axis=1)
    found = _influences(outcomes)
    return np.stack([found[name] for name in metrics_of_intervals(load_task("ranking"))], axis=1)


def _influences(sums: TestPredictions) -> dict[str, np.ndarray]:
    """Each user's value (U,) of ranking metrics: the metric, plus U times the user's influence."""
    examples, positives = sums.examples, sums.positives
    negatives, number = examples - positives, len(examples)
    share = positives.sum() / examples.sum()
    entropy = -share * np.log(share) - (1 - share) * np.log(1 - share)
    loss = sums.loss.sum() / examples.sum()
    log_loss = loss + number * (sums.loss - loss * examples) / examples.sum()
    # NE is loss over entropy, whose derivative by the share is log((1 - share) / share).
    of_share = number * (positives - share * examples) / examples.sum()
    normalized = (log_loss - loss / entropy * np.log((1 - share) / share) * of_share) / entropy
    auc = sums.above.sum() / positives.sum()
    influence = (sums.above - auc * positives) / positives.sum() + (sums.below - auc * negatives) / negatives.sum()
    both = ~np.isnan(sums.own_auc)
    own_auc, weight = np.where(both, sums.own_auc, 0), np.where(both, examples, 0)
    gauc = (own_auc * weight).sum() / weight.sum()
    return {
        "ne": normalized,
        "auc": auc + number * influence,
        "gauc": gauc + number * weight * (own_auc - gauc) / weight.sum(),
        "log_loss": log_loss,
    }


def values_of_models(records: list[Record]) -> dict[tuple[str, str], dict[str, np.ndarray]]:
    """Per (dataset, protocol) and model: each test user's values (U, M), averaged over the seeds that are there.

    Raises StepError if a run's outcomes are missing, or of other users than another's.
    """
    found: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    users: dict[tuple[str, str], np.ndarray] = {}
    for (dataset, protocol, model), seeds in by_row(records).items():
        values = []
        for together in kept_together(seeds):
            outcomes = outcomes_of(together)
            if not np.array_equal(outcomes.users, users.setdefault((dataset, protocol), outcomes.users)):
                raise StepError(
                    f"{together[0].run.path} ranks other users than the runs before it; train and evaluate it again"
                )
            values.append(values_of_users(outcomes))
        found.setdefault((dataset, protocol), {})[model] = np.mean(values, axis=0)
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


def wilcoxon(difference: np.ndarray) -> float:
    """p, of both sides, that users' differences (U,) lie around 0, by the signed-rank test; 1 where the ranks speak
    against a mean above 0: many small gains can outrank a few large losses.

    Most users gain the same from both models; Pratt's treatment of these zeros keeps the test's level, where splitting
    their ranks halves it.
    """
    return min(1.0, 2 * float(stats.wilcoxon(difference, zero_method="pratt", alternative="greater").pvalue))


def of_mean(difference: np.ndarray) -> float:
    """p, of both sides, that the mean of users' differences (U,) is 0, by its standard error (normal)."""
    error = difference.std(ddof=1) / len(difference) ** 0.5 if len(difference) > 1 else np.inf
    return float(2 * stats.norm.sf(abs(difference.mean()) / error)) if error else 0.0


#: By task, the test of users' differences: an influence has no sign of its own, as a user's gain has.
TESTS = {"retrieval": wilcoxon, "ranking": of_mean}


def compare_pairs(
    models: dict[str, np.ndarray], means: dict[str, np.ndarray], test: Callable[[np.ndarray], float] = wilcoxon
) -> list[dict[str, Any]]:
    """A row per pair of models, the better one first, with Holm-corrected p-values over all pairs.

    models: users' values (U,) of the compared metric. means: what `resample` made of the models.
    """
    rows: list[dict[str, Any]] = []
    for one, other in combinations(models, 2):
        better, worse = (one, other) if models[one].mean() >= models[other].mean() else (other, one)
        difference = (models[better] - models[worse]).round(_DIGITS)
        low, high = interval(means[better] - means[worse])
        p = test(difference) if difference.any() else 1.0
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


def over_seeds(better: list[Record], worse: list[Record], metric: str) -> dict[str, Any]:
    """The difference of two rows in a test metric over `seeds`: how many, and their standard deviation `seeds_sd`.

    The seeds of one row are paired with the same ones of the other; a row that is counted, and not trained, is the same
    for every seed. `seeds` is None where both are, and the deviation where there are no two seeds.
    """
    one, other = ({record.run.seed: record.metrics["test"][metric] for record in seeds} for seeds in (better, worse))
    counted = [rows[0].config["model"]["model"] in COUNT_BASED for rows in (better, worse)]
    if all(counted):
        return {"seeds": None, "seeds_sd": None}
    if any(counted):
        differences = [a - b for a in one.values() for b in other.values()]
    else:
        differences = [one[seed] - other[seed] for seed in one if seed in other]
    sd = float(np.std(differences, ddof=1)) if len(differences) > 1 else None
    return {"seeds": len(differences), "seeds_sd": sd}


def interval_rows(
    models: dict[str, np.ndarray], means: dict[str, np.ndarray], task: Task | None = None
) -> list[dict[str, Any]]:
    """A row per model and metric: mean, interval, and the gain over the baseline as a share, with its interval.

    models, means: of one table, and what `resample` made of them. No gain where the table has no baseline. task: by
    default retrieval.
    """
    task, rows = task or load_task(), []
    baseline = task.baseline
    for model, values in models.items():
        for place, metric in enumerate(metrics_of_intervals(task)):
            mean, (low, high) = values[:, place].mean(), interval(means[model][:, place])
            row = {"model": model, "metric": metric, "mean": mean, "low": low, "high": high}
            if baseline in models and model != baseline and models[baseline][:, place].any():
                with np.errstate(divide="ignore", invalid="ignore"):  # draws in which the baseline never hits
                    gains = np.nan_to_num(means[model][:, place] / means[baseline][:, place] - 1)
                low, high = interval(gains)
                row |= {"gain": mean / models[baseline][:, place].mean() - 1, "gain_low": low, "gain_high": high}
            rows.append(row)
    return rows
