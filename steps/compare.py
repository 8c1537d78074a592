"""Do the differences between models hold? Confidence intervals, paired tests over users, and published orderings.

For every (data set, protocol): each user's NDCG@10, averaged over seeds, gives every model a bootstrap
interval and every pair of models a paired difference with its interval, a Wilcoxon signed-rank test, and
Holm's correction over the pairs of the table; the difference's standard deviation over seeds stands beside it. Of
ranking it is each user's influence on AUC. Writes `comparisons.csv`, `comparisons.md` and `.html`, the figure
`intervals`, `intervals.csv` (every metric of the paper, and each model's gain over the baseline, with intervals), and
`parity.md`, which says where a published ordering holds, and how near ours comes to the published figures and to the
authors' code. Reads runs or their records. Trials of a search, an experiment with `points`, are not compared: its files
have no rows.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from steps.common import params
from steps.common.cli import run_step
from steps.common.files import atomic_path, write_text
from steps.reporting.figures import save_figure
from steps.reporting.parity import compared_protocols, curve_table, independent_table, orderings, parity_table
from steps.reporting.plots import Shown, draw_intervals, groups_of_rows
from steps.reporting.records import Record, by_row, labels, read_records
from steps.reporting.statistics import (
    CONFIDENCE,
    RESAMPLES,
    TESTS,
    compare_pairs,
    interval_rows,
    over_seeds,
    resample,
    values_of_models,
)
from steps.reporting.tables import Section, markdown, page_html, page_markdown
from steps.reporting.task import printed, task_of_records


def parity(records: list[Record], paper: dict[str, Any]) -> list[str]:
    """Paragraphs: ours beside what others published and ran; none where nobody did."""
    parts = []
    for heading, note, (headers, lines) in (
        (
            "# Parity",
            _PARITY.format(protocols=" and ".join(compared_protocols(records, paper))),
            parity_table(records, paper),
        ),
        (
            "## Learning curves",
            "Test figures after an epoch, ours as the mean over seeds.",
            curve_table(records, paper),
        ),
        ("# Independent runs", _INDEPENDENT, independent_table(records, paper)),
    ):
        if lines:
            parts += [heading, note, markdown(headers, lines)]
    return parts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--experiment", required=True)
    parser.add_argument("--runs", required=True, type=Path, help="runs/<experiment> or reports/<experiment>/records")
    parser.add_argument("--output", required=True, type=Path, help="folder for the tables: reports/<experiment>")


def main(args: argparse.Namespace) -> None:
    records, _ = read_records(args.experiment, args.runs)
    experiment, paper, names = params.load(f"experiments/{args.experiment}"), params.load("paper"), labels(records)
    titles = {name: dataset["title"] for name, dataset in params.load("datasets").items()}
    task = task_of_records(records)
    metric = task.compared
    seeds = by_row(records)
    per = " per user" if task.name == "retrieval" else ""
    note = _NOTE.format(metric=printed(metric), per=per, test=_TESTS[task.name])
    made: list[Section] = []
    orders, intervals, table = ["# Published orderings", _ORDERS], [], []
    search = "points" in experiment
    for (dataset, protocol), models in ({} if search else values_of_models(records)).items():
        means = resample(models)
        compared = {name: values[:, 0] for name, values in models.items()}
        pairs = compare_pairs(compared, {name: values[:, 0] for name, values in means.items()}, TESTS[task.name])
        for row in pairs:
            better, worse = (seeds[dataset, protocol, row[side]] for side in ("better", "worse"))
            row |= over_seeds(better, worse, metric)
        key = {"dataset": dataset, "protocol": protocol}
        table += [key | row for row in pairs]
        rows = [key | row for row in interval_rows(models, means, task)]
        intervals += rows
        title = f"{titles[dataset]}, protocol {protocol}"
        lines = [
            [names[row["model"]], f"{row['mean']:.4f}", _span(row["low"], row["high"])]
            for row in rows
            if row["metric"] == metric
        ]
        made.append(Section(title, "" if made else note, ["model", printed(metric), "interval"], lines))
        lines = [
            [
                f"{names[row['better']]} > {names[row['worse']]}",
                f"{row['difference']:+.4f}",
                _deviation(row["seeds_sd"]),
                _span(row["low"], row["high"]),
                f"{row['p_holm']:.2g}",
            ]
            for row in pairs
        ]
        if lines:
            headers = ["pair", "difference", "over seeds", "interval", "p"]
            made.append(Section(f"{title}, pairs", "", headers, lines))
        sentences = orderings(paper["public_datasets"].get(dataset, {}), compared, pairs)
        if sentences:
            orders += [f"## {dataset}, protocol {protocol}", "\n".join(sentences)]
    if len(orders) == 2:
        orders.append(f"No pair of models of this experiment has a published ordering by {printed(metric)}.")
    shown = Shown(records, titles, groups_of_rows(experiment, records), paper)
    drawn = {
        (row["dataset"], row["protocol"], row["model"]): (row["mean"], row["low"], row["high"])
        for row in intervals
        if row["metric"] == metric
    }
    save_figure(partial(draw_intervals, shown, drawn), args.output / "intervals")
    for name, rows, schema in (("comparisons", table, _PAIRS), ("intervals", intervals, _INTERVALS)):
        with atomic_path(args.output / f"{name}.csv") as temporary:
            _rounded(pl.DataFrame(rows, schema=schema)).write_csv(temporary)
    title = f"{experiment['title']}: comparisons"
    footer = [_SEARCH] if search else []
    write_text(args.output / "comparisons.md", page_markdown(title, made, footer))
    write_text(args.output / "comparisons.html", page_html(title, made, footer))
    write_text(args.output / "parity.md", "\n\n".join(orders + parity(records, paper)) + "\n")


_NOTE = (
    f"Test {{metric}}{{per}}, averaged over seeds. Intervals: {CONFIDENCE:.0%} bootstrap over users "
    f"({RESAMPLES} resamples). p: {{test}}, paired over users, Holm-corrected over the table's pairs. Over seeds: the "
    "difference's standard deviation, of the same seeds of both. An order is decided where p is below .05 and both "
    f"{CONFIDENCE:.0%} intervals of the difference, over users and over seeds (Student's t), are above 0: never of one "
    "seed of a model that is trained."
)
_SEARCH = "Trials of a search are chosen among by validation, and not compared."
_TESTS = {
    "retrieval": "Wilcoxon signed-rank",
    "ranking": "the difference over its standard error, by users' influence on it (DeLong's test for clusters)",
}
_ORDERS = (
    "p is over users. ± is half of the difference's interval over seeds, where that holds 0. What decides an order is "
    "said in [the comparisons](comparisons.md)."
)
_PARITY = (
    "Ours under protocol {protocols}. Rerun: the authors' code, one run. A published figure is compared with our best "
    "epoch on test: figures of public data lie nearer to that than to the last. The last epoch of a rerun is compared "
    "with our last. What is higher or lower is explained beside [the claims](../claims.md)."
)
_INDEPENDENT = (
    "Other people's runs, each under its own protocol, beside ours under protocol strict. Not a comparison of models: "
    "splits, candidates and schedules differ."
)
_PAIRS: dict[str, Any] = dict.fromkeys(("dataset", "protocol", "better", "worse"), pl.String)
_PAIRS |= dict.fromkeys(("difference", "low", "high", "p"), pl.Float64) | {"users": pl.Int64, "p_holm": pl.Float64}
_PAIRS |= {"seeds": pl.Int64, "seeds_sd": pl.Float64}
_INTERVALS: dict[str, Any] = dict.fromkeys(("dataset", "protocol", "model", "metric"), pl.String)
_INTERVALS |= dict.fromkeys(("mean", "low", "high", "gain", "gain_low", "gain_high"), pl.Float64)


def _rounded(table: pl.DataFrame) -> pl.DataFrame:
    """To nine digits: further ones depend on the order in which a processor adds."""
    return table.with_columns(pl.selectors.float().round_sig_figs(9))


def _deviation(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _span(low: float, high: float) -> str:
    return f"[{low:.4f}, {high:.4f}]"


if __name__ == "__main__":
    run_step("compare", __doc__, add_arguments, main)
