"""Tables and learning curves of an experiment, beside the published numbers.

Reads runs, or the small records of runs that are committed under reports/: both have the same files.
"""

import argparse
from pathlib import Path
from typing import Any

import polars as pl
from jinja2 import Environment
from matplotlib.figure import Figure
from tabulate import tabulate as render

from steps.common import params
from steps.common.cli import run_step
from steps.common.files import atomic_path, write_text
from steps.reporting.details import beyond, beyond_table, variant_table, variants
from steps.reporting.figures import save_figure
from steps.reporting.headline import write_headline
from steps.reporting.records import Record, by_row, cell, labels, mean_and_sd, read_records
from steps.reporting.task import load_task

_REPEATS = {
    "none": "",
    "recommend": " Users of this data set have items again: nothing is left out of the ranking, under any protocol.",
    "leave-out": " Users of this data set have items again: a target that is among the items left out is a miss.",
}
_GRID = " Choose among the points of the grid by the columns of validation: the best on test is optimistic."
_GRID_WITHOUT = " Without validation nothing chooses among the points of the grid: the best on test is optimistic."
_PAGE = Environment(autoescape=True).from_string(
    """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{{ title }}</title>
<style>
body { font-family: sans-serif; margin: 2rem auto; max-width: 75rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .7rem; border-bottom: 1px solid #ddd }
td { font-variant-numeric: tabular-nums } footer { color: #666; font-size: .9rem }
</style>
<h1>{{ title }}</h1>
{% for section in sections %}<h2>{{ section.title }}</h2><p>{{ section.note }}</p>{{ section.table | safe }}{% endfor %}
<footer>{% for line in footer %}<p>{{ line }}</p>{% endfor %}</footer>
</html>
"""
)


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
    grid: bool = False,
) -> list[dict[str, Any]]:
    """A table per (dataset, protocol): title, note, headers and rows of text.

    titles, repeats: of each data set. names: of each model. grid: whether the models are points of a grid.
    """
    made, task = [], load_task()
    for (dataset, protocol), rows in summary.group_by("dataset", "protocol", maintain_order=True):
        chosen = grid and _has(rows, "valid")
        headers = ["model", "seeds", *(f"valid {name.upper()}" for name in task.headline if chosen)]
        headers += [f"{'test ' if grid else ''}{name.upper()}" for name in task.tables]
        about = params.entry("protocols", protocol)
        published = paper["public_datasets"].get(dataset, {}) if about.get("published") else {}
        published = {model: figures for model, figures in published.items() if model in set(rows["model"])}
        best = _has(rows, "test_best")
        if best:
            headers += [f"best epoch {name.upper()}" for name in task.headline]
        if published:
            headers += [f"published {name.upper()}" for name in task.headline]
        table = []
        for row in rows.iter_rows(named=True):
            line = [
                names[row["model"]],
                row["seeds"],
                *(_cell(row, f"valid/{name}") for name in task.headline if chosen),
            ]
            line += [_cell(row, f"test/{name}") for name in task.tables]
            if best:
                line += [_cell(row, f"test_best/{name}") for name in task.headline]
            if published:
                reported = published.get(row["model"], {})
                line += [f"{reported[name]:.4f}" if name in reported else "" for name in task.headline]
            table.append(line)
        made.append(
            {
                "title": f"{titles[dataset]}, protocol {protocol}",
                "note": about.get("note", f"Protocol {protocol}.")
                + _REPEATS[repeats[dataset]]
                + (_GRID if chosen else _GRID_WITHOUT if grid else "")
                + (" " + _sources(published, paper) if published else ""),
                "headers": headers,
                "rows": table,
            }
        )
    return made


def draw_curves(records: list[Record], paper: dict[str, Any], titles: dict[str, str]) -> Figure:
    """The compared metric after every epoch: a panel per (dataset, protocol), a colour per model, a line per seed.

    Dashes: the published figure. Crosses: the authors' code, rerun.
    """
    panels = list(dict.fromkeys((record.run.dataset, record.run.protocol) for record in records))
    figure = Figure(figsize=(6 * len(panels), 4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)
    models = list(dict.fromkeys(record.run.model for record in records))
    metric = load_task().compared
    for axis, (dataset, protocol) in zip(axes[0], panels, strict=True):
        labelled = set()
        beside = params.entry("protocols", protocol).get("published", False)
        for record in records:
            run = record.run
            if (run.dataset, run.protocol) != (dataset, protocol):
                continue
            split = "valid" if f"valid/{metric}" in record.history[0] else "test"
            colour = f"C{models.index(run.model)}"
            curve = [(line["epoch"], line[f"{split}/{metric}"]) for line in record.history]
            label = params.label(run.model) if run.model not in labelled else None
            labelled.add(run.model)
            if len(curve) == 1:  # a model without epochs
                axis.axhline(curve[0][1], color=colour, linewidth=1, linestyle=":", label=label)
            else:
                axis.plot(*zip(*curve, strict=True), color=colour, linewidth=1.3, label=label)
            reported = paper["public_datasets"].get(dataset, {}).get(run.model) if beside else None
            if reported:
                axis.axhline(reported[metric], color=colour, linewidth=0.8, linestyle="--")
            rerun = paper["reruns"].get(dataset, {}).get(run.model) if beside else None
            if rerun:
                points = [(epoch, figures[metric]) for epoch, figures in rerun["epochs"].items()]
                axis.plot(*zip(*points, strict=True), "x", color=colour, markersize=5)
        axis.set(title=f"{titles[dataset]}, protocol {protocol}", xlabel="epoch", ylabel=f"{split} {metric.upper()}")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    return figure


def provenance(records: list[Record], missing: list[params.Run]) -> list[str]:
    """What the numbers rest on, in a few lines: commits, data, devices, and what was not run."""

    def distinct(name: str) -> str:
        return ", ".join(dict.fromkeys(str(record.metrics[name]) for record in records))

    data = dict.fromkeys((record.run.dataset, record.metrics["data_sha256"]) for record in records)
    lines = [
        f"Commit {distinct('commit')}. Device {distinct('device')}.",
        "Data " + ", ".join(f"{dataset} sha256 {digest}" for dataset, digest in data) + ".",
        "All figures are fractions. One target per user, exact rank over all candidates; where a target ties with "
        "others, metrics are means over all orders of the ties. "
        "± is the standard deviation over seeds.",
    ]
    if missing:
        seeds: dict[str, list[str]] = {}
        for run in missing:
            seeds.setdefault(f"{run.dataset}/{run.model}/{run.protocol}", []).append(str(run.seed))
        names = ", ".join(f"{name} (seeds {' '.join(numbers)})" for name, numbers in seeds.items())
        lines.append(f"Not run: {names}.")
    return lines


def _has(rows: pl.DataFrame, part: str) -> bool:
    return f"{part}/hr@10" in rows.columns and bool(rows[f"{part}/hr@10"].is_not_null().any())


def _cell(row: dict[str, Any], name: str) -> str:
    return cell(row[name], row.get(f"{name}/sd"))


def _sources(published: dict[str, Any], paper: dict[str, Any]) -> str:
    used = dict.fromkeys(entry["source"] for entry in published.values())
    return "Published figures: " + "; ".join(paper["sources"][source] for source in used) + "."


def _markdown(title: str, made: list[dict[str, Any]], footer: list[str]) -> str:
    parts = [f"# {title}"]
    for section in made:
        table = render(section["rows"], section["headers"], tablefmt="github", disable_numparse=True)
        parts += [f"## {section['title']}", section["note"], table]
    return "\n\n".join(parts + footer) + "\n"


def _html(title: str, made: list[dict[str, Any]], footer: list[str]) -> str:
    for section in made:
        section["table"] = render(section["rows"], section["headers"], tablefmt="html", disable_numparse=True)
    return _PAGE.render(title=title, sections=made, footer=footer) + "\n"


def _runs_table(records: list[Record]) -> pl.DataFrame:
    names = ("epoch", "train_seconds", "peak_bytes", "commit", "data_sha256", "device")
    rows = []
    for record in records:
        run = record.run
        row = {"dataset": run.dataset, "protocol": run.protocol, "model": run.model, "seed": run.seed}
        row |= {f"test/{name}": value for name, value in record.metrics["test"].items()}
        rows.append(row | {name: record.metrics[name] for name in names})
    return pl.DataFrame(rows, infer_schema_length=None)


def _details(records: list[Record], title: str) -> tuple[str, list[dict[str, Any]], list[dict[str, Any]]]:
    """The details as markdown, and the rows of both tables."""
    rules, others = variants(records), beyond(records)
    parts = [f"# {title}: details"]
    for heading, rows, layout in (
        ("The same models under other rules (seen items left out / candidates)", rules, variant_table),
        ("Beyond accuracy", others, beyond_table),
    ):
        headers, lines = layout(rows, records)
        parts += [f"## {heading}", render(lines, headers, tablefmt="github", disable_numparse=True)]
    return "\n\n".join(parts) + "\n", rules, others


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
    made = sections(summary, paper, titles, labels(records), repeats, grid)
    footer = provenance(records, missing)
    details, rules, others = _details(records, title)
    save_figure(draw_curves(records, paper, titles), args.output / "curves")
    for name, table in {
        "runs": _runs_table(records),
        "table": summary,
        "variants": pl.DataFrame(rules, infer_schema_length=None),
        "beyond": pl.DataFrame(others, infer_schema_length=None),
    }.items():
        with atomic_path(args.output / f"{name}.csv") as temporary:
            table.write_csv(temporary)
    write_headline(summary, args.output / "metrics.json")
    write_text(args.output / "details.md", details)
    write_text(args.output / "table.html", _html(title, made, footer))
    write_text(args.output / "table.md", _markdown(title, made, footer))


if __name__ == "__main__":
    run_step("tabulate", __doc__, add_arguments, main)
