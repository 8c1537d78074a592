"""Do the differences between models hold? Confidence intervals, paired tests over users, and published orderings.

For every (data set, protocol): each user's NDCG@10, averaged over seeds, gives every model a bootstrap
interval and every pair of models a paired difference with its interval, a Wilcoxon signed-rank test, and
Holm's correction over the pairs of the table. Writes `comparisons.csv`, `comparisons.md`, `intervals.svg`
and `.png`, and `claims.md`, which says where a published ordering holds, and how near protocol `paper` comes to the
published figures and to the authors' code. Reads runs or their records.
"""

import argparse
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from matplotlib.figure import Figure
from safetensors.numpy import load_file
from scipy import stats
from tabulate import tabulate as render

from steps.common import params
from steps.common.cli import StepError, run_step
from steps.common.files import atomic_path, write_text
from steps.evaluation.metrics import Ranks, ndcg
from steps.reporting.figures import save_figure
from steps.reporting.parity import curve_table, independent_table, parity_table
from steps.reporting.records import Record, by_row, labels, read_records

METRIC = "ndcg@10"
_CUT = 10
_RESAMPLES = 2000
_CONFIDENCE = 0.95
_ALPHA = 0.05
_DIGITS = 12  # of a difference: the mean of equal gains over 6 seeds is not to the bit the mean over 5
_BLOCK = 100  # resamples at once: 100 x 138,493 indices are 0.1 GB


def user_gains(ranks: dict[str, np.ndarray]) -> np.ndarray:
    """Each test user's NDCG@10 (float64) from the content of a `ranks.safetensors`."""
    best, ties = (torch.from_numpy(ranks[name]).long() for name in ("test", "test_ties"))
    return ndcg(Ranks(best, ties), _CUT).numpy()


def read_gains(records: list[Record], folder: Path) -> dict[tuple[str, str], dict[str, np.ndarray]]:
    """Per (dataset, protocol) and model: each test user's gain, averaged over the seeds that are there.

    Raises StepError if a run's ranks are missing, or of other users than another's.
    """
    found: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    users: dict[tuple[str, str], np.ndarray] = {}
    for (dataset, protocol, model), seeds in by_row(records).items():
        of_seeds = []
        for seed in seeds:
            path = folder / seed.run.path / "ranks.safetensors"
            if not path.is_file():
                raise StepError(
                    f"{path} does not exist; records leave out large ones: compare runs/{seed.run.experiment}"
                )
            ranks = load_file(path)
            if not np.array_equal(ranks["test_users"], users.setdefault((dataset, protocol), ranks["test_users"])):
                raise StepError(f"{path} ranks other users than the runs before it; train and evaluate it again")
            of_seeds.append(user_gains(ranks))
        found.setdefault((dataset, protocol), {})[model] = np.mean(of_seeds, axis=0)
    return found


def resample(models: dict[str, np.ndarray], seed: int = 0) -> dict[str, np.ndarray]:
    """Each model's mean (resamples,) over users drawn with replacement, the same draws for all models.

    models: of the same users (U,). The resampled means of a difference are then the differences of these.
    """
    random = np.random.default_rng(seed)
    users = len(next(iter(models.values())))
    means: dict[str, list[np.ndarray]] = {name: [] for name in models}
    for _ in range(_RESAMPLES // _BLOCK):
        drawn = random.integers(0, users, (_BLOCK, users))
        for name, values in models.items():
            means[name].append(values[drawn].mean(axis=1))
    return {name: np.concatenate(blocks) for name, blocks in means.items()}


def interval(means: np.ndarray) -> tuple[float, float]:
    """The percentile bootstrap interval of a mean, from its values (resamples,) over resampled users."""
    tail = (1 - _CONFIDENCE) / 2
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


def orderings(published: dict[str, Any], models: dict[str, np.ndarray], pairs: list[dict[str, Any]]) -> list[str]:
    """A sentence per published pair that is in the table: whether it holds here, and with what certainty.

    It is decided where the test of the ranks and the interval of the mean agree.
    """
    by_pair = {(row["better"], row["worse"]): row for row in pairs}
    sentences = []
    shown = sorted((name for name in published if name in models), key=lambda name: -published[name][METRIC])
    for higher, lower in combinations(shown, 2):
        said = f"{higher} > {lower} (published {published[higher][METRIC]:.4f} > {published[lower][METRIC]:.4f})"
        row = by_pair.get((higher, lower))
        if row is not None and _decided(row):
            verdict = f"holds: +{row['difference']:.4f}, p = {row['p_holm']:.2g}"
        elif row is not None:
            verdict = f"not decided: +{row['difference']:.4f}, p = {row['p_holm']:.2g}"
        else:
            row = by_pair[lower, higher]
            strength = "does not hold" if _decided(row) else "not decided"
            verdict = f"{strength}: {-row['difference']:.4f}, p = {row['p_holm']:.2g}"
        sentences.append(f"- {said}: {verdict}")
    return sentences


def _decided(row: dict[str, Any]) -> bool:
    return bool(row["p_holm"] < _ALPHA and row["low"] > 0)


def parity(records: list[Record], paper: dict[str, Any]) -> list[str]:
    """Paragraphs: ours beside what others published and ran; none where nobody did."""
    parts = []
    for heading, note, (headers, lines) in (
        ("# Parity", _PARITY, parity_table(records, paper)),
        (
            "## Learning curves",
            "Test figures after an epoch, ours as the mean over seeds.",
            curve_table(records, paper),
        ),
        ("# Independent runs", _INDEPENDENT, independent_table(records, paper)),
    ):
        if lines:
            parts += [heading, note, render(lines, headers, tablefmt="github", disable_numparse=True)]
    return parts


def draw_intervals(
    found: dict[tuple[str, str], dict[str, np.ndarray]],
    resampled: dict[tuple[str, str], dict[str, np.ndarray]],
    names: dict[str, str],
) -> Figure:
    """NDCG@10 of every model with its interval: a panel per (dataset, protocol)."""
    tallest = max(len(models) for models in found.values())
    figure = Figure(figsize=(5 * len(found), 1 + 0.35 * tallest), layout="constrained")
    axes = figure.subplots(1, len(found), squeeze=False)
    for axis, ((dataset, protocol), models) in zip(axes[0], found.items(), strict=True):
        rows = list(reversed(models))
        for height, name in enumerate(rows):
            low, high = interval(resampled[dataset, protocol][name])
            axis.plot([low, high], [height, height], color="C0", linewidth=2)
            axis.plot(models[name].mean(), height, "o", color="C0", markersize=4)
        axis.set_yticks(range(len(rows)), [names[name] for name in rows])
        axis.set(title=f"{dataset}, protocol {protocol}", xlabel="test NDCG@10, 95 % interval over users")
        axis.set_xlim(left=0)
        axis.grid(axis="x", alpha=0.3)
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--experiment", required=True)
    parser.add_argument("--runs", required=True, type=Path, help="runs/<experiment> or reports/<experiment>/records")
    parser.add_argument("--output", required=True, type=Path, help="folder for the tables: reports/<experiment>")


def main(args: argparse.Namespace) -> None:
    records, _ = read_records(args.experiment, args.runs)
    found, names = read_gains(records, args.runs), labels(records)
    resampled = {table: resample(models) for table, models in found.items()}
    paper = params.load("paper")
    text, claims, table = ["# Comparisons"], ["# Published orderings"], []
    text.append(
        f"Test {METRIC.upper()} per user, averaged over seeds. Intervals: {_CONFIDENCE:.0%} bootstrap over users "
        f"({_RESAMPLES} resamples). p: Wilcoxon signed-rank, paired over users, Holm-corrected over the table's pairs."
    )
    for (dataset, protocol), models in found.items():
        means = resampled[dataset, protocol]
        pairs = compare_pairs(models, means)
        table += [{"dataset": dataset, "protocol": protocol, **row} for row in pairs]
        text.append(f"## {dataset}, protocol {protocol}")
        rows = [[names[name], f"{values.mean():.4f}", _span(*interval(means[name]))] for name, values in models.items()]
        text.append(render(rows, ["model", METRIC.upper(), "interval"], tablefmt="github", disable_numparse=True))
        lines = [
            [
                f"{names[row['better']]} > {names[row['worse']]}",
                f"{row['difference']:+.4f}",
                _span(row["low"], row["high"]),
                f"{row['p_holm']:.2g}",
            ]
            for row in pairs
        ]
        if lines:
            text.append(
                render(lines, ["pair", "difference", "interval", "p"], tablefmt="github", disable_numparse=True)
            )
        sentences = orderings(paper["public_datasets"].get(dataset, {}), models, pairs)
        if sentences:
            claims += [f"## {dataset}, protocol {protocol}", "\n".join(sentences)]
    if len(claims) == 1:
        claims.append("No pair of models of this experiment has a published ordering.")
    claims += parity(records, paper)
    save_figure(draw_intervals(found, resampled, names), args.output / "intervals")
    with atomic_path(args.output / "comparisons.csv") as temporary:
        pl.DataFrame(table, schema=_SCHEMA).write_csv(temporary)
    write_text(args.output / "comparisons.md", "\n\n".join(text) + "\n")
    write_text(args.output / "claims.md", "\n\n".join(claims) + "\n")


_PARITY = (
    "Protocol paper. Rerun: the authors' code as it is, one run. Published figures lie nearer to the best epoch on "
    "test than to the last, so each is compared with its like."
)
_INDEPENDENT = (
    "Other people's runs, each under its own protocol, beside ours under protocol strict. Not a comparison of models: "
    "splits, candidates and schedules differ."
)
_SCHEMA: dict[str, Any] = {"dataset": pl.String, "protocol": pl.String, "better": pl.String, "worse": pl.String}
_SCHEMA |= dict.fromkeys(("difference", "low", "high", "p"), pl.Float64) | {"users": pl.Int64, "p_holm": pl.Float64}


def _span(low: float, high: float) -> str:
    return f"[{low:.4f}, {high:.4f}]"


if __name__ == "__main__":
    run_step("compare", __doc__, add_arguments, main)
