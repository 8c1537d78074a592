"""Ours beside the published figures and the authors' code, and protocol `strict` beside other people's runs."""

import math
from itertools import combinations
from typing import Any

import numpy as np

from steps.common.paired import half_interval
from steps.reporting.published import published_figures
from steps.reporting.records import Record, by_row, cell, labels, mean_and_sd
from steps.reporting.statistics import CONFIDENCE
from steps.reporting.task import load_task

_ALPHA = 0.05
BAND_OF_PUBLISHED = 0.03  # around the published figure, for the best epoch of a run
_BAND_OF_RERUN = 0.02  # around the rerun's last epoch


def parity_table(records: list[Record], paper: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and lines: a line per model and metric that others reported, with a verdict on the best and last epoch.

    The last epoch is compared with the rerun's last only if both have the same number.
    """
    names, lines = labels(records), []
    for (dataset, protocol, model), seeds in _compared(records, paper).items():
        published = published_figures(paper, dataset, protocol).get(model, {})
        rerun = paper["reruns"].get(dataset, {}).get(model, {"best": {}, "epochs": {}})
        last = rerun["epochs"].get(seeds[0].history[-1]["epoch"], {})
        for metric in load_task().headline:
            if not any(metric in figures for figures in (published, rerun["best"], last)):
                continue
            ours_last = mean_and_sd(seed.metrics["test"][metric] for seed in seeds)
            ours_best = mean_and_sd(seed.metrics["test_best"][metric] for seed in seeds)
            lines.append(
                [
                    dataset,
                    names[model],
                    metric.upper(),
                    *(_figure(figures.get(metric)) for figures in (published, rerun["best"], last)),
                    cell(*ours_best),
                    cell(*ours_last),
                    _verdict(ours_best[0], published.get(metric), BAND_OF_PUBLISHED),
                    _verdict(ours_last[0], last.get(metric), _BAND_OF_RERUN),
                ]
            )
    headers = ["data set", "model", "metric", "published", "rerun best", "rerun last", "ours best", "ours last"]
    best, last = f"best / published, ± {BAND_OF_PUBLISHED:.0%}", f"last / rerun, ± {_BAND_OF_RERUN:.0%}"
    return [*headers, best, last], lines


def curve_table(records: list[Record], paper: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and lines: a line per model and epoch of the rerun's curve, ours as a mean over seeds."""
    names, lines = labels(records), []
    for (dataset, _, model), seeds in _compared(records, paper).items():
        for epoch, figures in paper["reruns"].get(dataset, {}).get(model, {"epochs": {}})["epochs"].items():
            if any(all(line["epoch"] != epoch for line in seed.history) for seed in seeds):
                continue
            line = [dataset, names[model], str(epoch)]
            for metric in load_task().headline:
                ours = mean_and_sd(seed.curve(f"test/{metric}")[epoch] for seed in seeds)
                line += [_figure(figures[metric]), cell(*ours), f"{ours[0] / figures[metric] - 1:+.1%}"]
            lines.append(line)
    headers = ["data set", "model", "epoch"]
    for metric in load_task().headline:
        headers += [f"rerun {metric.upper()}", f"ours {metric.upper()}", "difference"]
    return headers, lines


def independent_table(records: list[Record], paper: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and lines: a line per run of other people, with ours of the same kind under protocol strict."""
    lines = []
    for (dataset, protocol, model), seeds in by_row(records).items():
        for other in paper["independent"].get(dataset, []):
            if (protocol, model) == ("strict", other.get("row")):
                line = [dataset, other["model"], paper["sources"][other["source"]]]
                for metric in load_task().headline:
                    ours = mean_and_sd(seed.metrics["test"][metric] for seed in seeds)
                    line += [_figure(other[metric]), cell(*ours)]
                lines.append(line)
    headers = ["data set", "model", "whose"]
    for metric in load_task().headline:
        headers += [f"their {metric.upper()}", f"ours {metric.upper()}"]
    return headers, lines


def orderings(published: dict[str, Any], models: dict[str, np.ndarray], pairs: list[dict[str, Any]]) -> list[str]:
    """A sentence per published pair that is in the table: whether it holds here, and with what certainty."""
    by_pair = {(row["better"], row["worse"]): row for row in pairs}
    sentences, metric = [], load_task().compared
    shown = sorted(
        (name for name in published if name in models and metric in published[name]),
        key=lambda name: -published[name][metric],
    )
    for higher, lower in combinations(shown, 2):
        said = f"{higher} > {lower} (published {published[higher][metric]:.4f} > {published[lower][metric]:.4f})"
        row = by_pair.get((higher, lower))
        if row is not None and decided(row):
            verdict = f"holds: +{row['difference']:.4f}, {certainty(row)}"
        elif row is not None:
            verdict = f"not decided: +{row['difference']:.4f}, {certainty(row)}"
        else:
            row = by_pair[lower, higher]
            strength = "does not hold" if decided(row) else "not decided"
            verdict = f"{strength}: {-row['difference']:.4f}, {certainty(row)}"
        sentences.append(f"- {said}: {verdict}")
    return sentences


def compared_protocols(records: list[Record], paper: dict[str, Any]) -> list[str]:
    """The names of the protocols that `parity_table` has lines of."""
    return list(dict.fromkeys(protocol for _, protocol, _ in _compared(records, paper)))


def _compared(records: list[Record], paper: dict[str, Any]) -> dict[tuple[str, str, str], list[Record]]:
    """The records of models that others reported, by (dataset, protocol, model), where published figures stand beside
    ours."""
    found = {}
    for (dataset, protocol, model), seeds in by_row(records).items():
        published = published_figures(paper, dataset, protocol)
        if model in published or (published and model in paper["reruns"].get(dataset, {})):
            found[dataset, protocol, model] = seeds
    return found


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def decided(row: dict[str, Any]) -> bool:
    """Whether a row of comparisons.csv is sure of its order: other users and other seeds would say the same.

    Of users the test and the interval of the mean must agree; of seeds the interval over them (Student's t) must be
    above 0. Of one seed nothing is known of others.
    """
    return bool(row["p_holm"] < _ALPHA and row["low"] > 0 and row["difference"] > half_over_seeds(row))


def certainty(row: dict[str, Any]) -> str:
    """How sure a row of comparisons.csv is: p over users, and the interval over seeds where that one holds 0."""
    half = half_over_seeds(row)
    over_seeds = ", of one seed" if half == math.inf else f", ± {half:.4f} over seeds"
    return f"p = {row['p_holm']:.2g}{'' if row['difference'] > half else over_seeds}"


def half_over_seeds(row: dict[str, Any]) -> float:
    """Half the interval of the difference over seeds: 0 of rows that are counted, infinite of one seed."""
    if row["seeds_sd"] is None:
        return 0.0 if row["seeds"] is None else math.inf
    return half_interval(row["seeds_sd"], row["seeds"], 100 * CONFIDENCE)


def side(ours: float, theirs: float, band: float) -> str:
    """On which side of the band around theirs ours lies: within, higher or lower."""
    share = ours / theirs
    return "within" if abs(share - 1) <= band else "higher" if share > 1 else "lower"


def _verdict(ours: float, theirs: float | None, band: float) -> str:
    """The side, and ours as a share of theirs."""
    return "" if theirs is None else f"{side(ours, theirs, band)} ({ours / theirs:.3f})"
