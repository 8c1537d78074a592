"""Tables and figures of an experiment, beside the published numbers.

Reads runs, or the small records of runs that are committed under reports/: both have the same files. `paper.*` have the
paper's rows and columns, for data sets that it reports.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from steps.common import params
from steps.common.cli import run_step
from steps.common.files import atomic_path, write_text
from steps.reporting.details import (
    beyond,
    beyond_table,
    reliability_rows,
    reliability_table,
    variant_table,
    variants,
)
from steps.reporting.figures import save_figure
from steps.reporting.headline import write_headline
from steps.reporting.paper_table import paper_tables
from steps.reporting.plots import Shown, draw_curves, draw_groups, draw_speed, groups_of_rows
from steps.reporting.published import published_figures
from steps.reporting.records import Record, by_row, cell, labels, mean_and_sd, read_records
from steps.reporting.tables import Section, escaped, markdown, page_html, page_latex, page_markdown
from steps.reporting.task import Task, printed, task_of_records

_REPEATS = {
    "none": "",
    "recommend": " Users of this data set have items again: nothing is left out of the ranking, under any protocol.",
    "leave-out": " Users of this data set have items again: a target that is among the items left out is a miss.",
}
_GRID = " Choose among the points of the grid by the columns of validation: the best on test is optimistic."
_GRID_WITHOUT = " Without validation nothing chooses among the points of the grid: the best on test is optimistic."
_ABOUT = {
    "retrieval": "All figures are fractions. One target per user, exact rank over all candidates; where a target ties "
    "with others, metrics are means over all orders of the ties.",
    "ranking": "NE is the cross entropy over that of the share of engagements, predicted for all: less is better. AUC "
    "is over all predictions, GAUC the mean of users' own by their numbers of interactions, LOG LOSS in nats, "
    "CALIBRATION what is predicted over what came true.",
}
_NO_VARIANTS: dict[str, list[str]] = {name: [] for name in ("dataset", "protocol", "model", "rule")}
_NO_PAPER = "No data set of this experiment has published figures under one of its protocols."


def summarise(records: list[Record], grid: bool = False) -> pl.DataFrame:
    """A row per (dataset, protocol, model): seeds, mean and standard deviation of every test metric.

    grid: whether rows are chosen among, for which validation metrics stand before.
    """
    rows = []
    for (dataset, protocol, model), seeds in by_row(records).items():
        row: dict[str, Any] = {"dataset": dataset, "protocol": protocol, "model": model, "seeds": len(seeds)}
        for part in (*(["valid"] if grid else []), "test", "test_best"):
            if part in seeds[0].metrics:
                for name in seeds[0].metrics["test"]:
                    mean, deviation = mean_and_sd(seed.metrics[part][name] for seed in seeds)
                    row |= {f"{part}/{name}": mean, f"{part}/{name}/sd": deviation}
        rows.append(row)
    return pl.DataFrame(rows, infer_schema_length=None)


def sections(
    summary: pl.DataFrame,
    paper: dict[str, Any],
    titles: dict[str, str],
    names: dict[str, str],
    repeats: dict[str, str],
    task: Task,
    grid: bool = False,
) -> list[Section]:
    """A table per (dataset, protocol), with the columns of the task.

    titles, repeats: of each data set. names: of each model. grid: whether the models are points of a grid.
    """
    made, headline = [], task.headline
    for (dataset, protocol), rows in summary.group_by("dataset", "protocol", maintain_order=True):
        chosen = grid and _has(rows, task, "valid")
        headers = ["model", "seeds", *(f"valid {printed(name)}" for name in headline if chosen)]
        headers += [f"{'test ' if grid else ''}{printed(name)}" for name in task.tables]
        about = params.entry("protocols", protocol)
        theirs = published_figures(paper, dataset, protocol)
        theirs = {model: figures for model, figures in theirs.items() if model in set(rows["model"])}
        told = [name for name in headline if any(name in figures for figures in theirs.values())]
        best = _has(rows, task, "test_best")
        if best:
            headers += [f"best epoch {printed(name)}" for name in headline]
        headers += [f"published {printed(name)}" for name in told]
        table = []
        for row in rows.iter_rows(named=True):
            line = [
                names[row["model"]],
                row["seeds"],
                *(_cell(row, f"valid/{name}") for name in headline if chosen),
            ]
            line += [_cell(row, f"test/{name}") for name in task.tables]
            if best:
                line += [_cell(row, f"test_best/{name}") for name in headline]
            reported = theirs.get(row["model"], {})
            line += [f"{reported[name]:.4f}" if name in reported else "" for name in told]
            table.append(line)
        note = about.get("note", f"Protocol {protocol}.")
        note += _REPEATS[repeats[dataset]] if task.name == "retrieval" else ""
        note += _GRID if chosen else _GRID_WITHOUT if grid else ""
        note += " " + _sources(theirs, paper) if theirs else ""
        made.append(Section(f"{titles[dataset]}, protocol {protocol}", note, headers, table))
    return made


def provenance(records: list[Record], missing: list[params.Run]) -> list[str]:
    """What the numbers rest on, in a few lines: commits, data, devices, and what was not run."""

    def distinct(name: str) -> str:
        return ", ".join(dict.fromkeys(str(record.metrics[name]) for record in records))

    data = dict.fromkeys((record.run.dataset, record.metrics["data_sha256"]) for record in records)
    lines = [
        f"Commit {distinct('commit')}. Device {distinct('device')}.",
        "Data " + ", ".join(f"{dataset} sha256 {digest}" for dataset, digest in data) + ".",
        _ABOUT[records[0].task] + " ± is the standard deviation over seeds.",
    ]
    if missing:
        seeds: dict[str, list[str]] = {}
        for run in missing:
            seeds.setdefault(f"{run.dataset}/{run.model}/{run.protocol}", []).append(str(run.seed))
        names = ", ".join(f"{name} (seeds {' '.join(numbers)})" for name, numbers in seeds.items())
        lines.append(f"Not run: {names}.")
    return lines


def _has(rows: pl.DataFrame, task: Task, part: str) -> bool:
    name = f"{part}/{task.compared}"
    return name in rows.columns and bool(rows[name].is_not_null().any())


def _cell(row: dict[str, Any], name: str) -> str:
    return cell(row[name], row.get(f"{name}/sd"))


def _sources(figures: dict[str, Any], paper: dict[str, Any]) -> str:
    used = dict.fromkeys(entry["source"] for entry in figures.values())
    return "Published figures: " + "; ".join(paper["sources"][source] for source in used) + "."


def _runs_table(records: list[Record]) -> pl.DataFrame:
    names = ("epoch", "train_seconds", "peak_bytes", "commit", "data_sha256", "device")
    rows = []
    for record in records:
        run = record.run
        row = {"dataset": run.dataset, "protocol": run.protocol, "model": run.model, "seed": run.seed}
        row |= {f"test/{name}": value for name, value in record.metrics["test"].items()}
        rows.append(row | {name: record.metrics[name] for name in names})
    return pl.DataFrame(rows, infer_schema_length=None)


_GROUPS = (
    "Predictions are sorted and parted into 20 groups of equal size, as groups.svg shows them. Gap: how far the mean "
    "prediction of a group is from the share of engagements in it."
)


def _details(records: list[Record], title: str) -> tuple[str, list[dict[str, Any]], list[dict[str, Any]]]:
    """The details as markdown, and the rows of variants.csv and beyond.csv."""
    rules, others = variants(records), beyond(records)
    parts = [f"# {escaped(title)}: details"]
    tables: tuple[tuple[str, list[dict[str, Any]], Any], ...] = (
        ("The same models under other rules (seen items left out / candidates)", rules, variant_table),
        ("Beyond accuracy", others, beyond_table),
    )
    if records[0].task == "ranking":
        others = reliability_rows(records)
        tables = (("Mean probability predicted, and share that came true", others, reliability_table),)
        parts.append(_GROUPS)
    for heading, rows, layout in tables:
        headers, lines = layout(rows, records)
        parts += [f"## {heading}", markdown(headers, lines)]
    return "\n\n".join(parts) + "\n", rules, others


def _write_paper(records: list[Record], shown: Shown, title: str, footer: list[str], output: Path) -> None:
    """The paper's tables in four forms; where the paper has none, pages that say so."""
    made = paper_tables(records, shown.paper, shown.titles)
    tables, rows = [section for section, _ in made], [row for _, of_table in made for row in of_table]
    title, footer = f"{title}: the paper's table", footer if made else [_NO_PAPER]
    names = ["dataset", "protocol", "model", "method", "whose", "seeds"]
    table = pl.DataFrame(rows or {name: [] for name in names}, infer_schema_length=None)
    with atomic_path(output / "paper.csv") as temporary:
        table.write_csv(temporary)
    write_text(output / "paper.md", page_markdown(title, tables, footer))
    write_text(output / "paper.html", page_html(title, tables, footer))
    write_text(output / "paper.tex", page_latex(tables, footer))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--experiment", required=True)
    parser.add_argument("--runs", required=True, type=Path, help="runs/<experiment> or reports/<experiment>/records")
    parser.add_argument("--output", required=True, type=Path, help="folder for the tables: reports/<experiment>")


def main(args: argparse.Namespace) -> None:
    records, missing = read_records(args.experiment, args.runs)
    paper = params.load("paper")
    titles = {name: dataset["title"] for name, dataset in params.load("datasets").items()}
    experiment = params.load(f"experiments/{args.experiment}")
    title, grid = experiment["title"], "grid" in experiment
    repeats = {record.run.dataset: record.config["repeats"] for record in records}
    summary = summarise(records, grid)
    task = task_of_records(records)
    made = sections(summary, paper, titles, labels(records), repeats, task, grid)
    footer = provenance(records, missing)
    details, rules, others = _details(records, title)
    shown = Shown(records, titles, groups_of_rows(experiment, records), paper)
    for name, draw in {"curves": draw_curves, "groups": draw_groups, "speed": draw_speed}.items():
        save_figure(partial(draw, shown), args.output / name)
    for name, table in {
        "runs": _runs_table(records),
        "table": summary,
        "variants": pl.DataFrame(rules or _NO_VARIANTS, infer_schema_length=None),
        "beyond": pl.DataFrame(others, infer_schema_length=None),
    }.items():
        with atomic_path(args.output / f"{name}.csv") as temporary:
            table.write_csv(temporary)
    _write_paper(records, shown, title, footer, args.output)
    write_headline(summary, task, args.output / "metrics.json")
    write_text(args.output / "details.md", details)
    write_text(args.output / "table.html", page_html(title, made, footer))
    write_text(args.output / "table.md", page_markdown(title, made, footer))


if __name__ == "__main__":
    run_step("tabulate", __doc__, add_arguments, main)
