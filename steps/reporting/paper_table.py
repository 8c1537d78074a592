"""The paper's tables of retrieval, with its rows and columns: ours and theirs, each relative to its own SASRec."""

from typing import Any

from steps.common import params
from steps.reporting.published import published_figures
from steps.reporting.records import Record, by_row, labels, mean_and_sd
from steps.reporting.tables import Section
from steps.reporting.task import load_task

_NOTE = (
    "Rows as in the paper, columns as in its tables 4 and 12. Ours: the last epoch of protocol {protocol}, mean ± "
    "standard deviation over seeds. In brackets: relative to SASRec of the same column's source. "
)


def paper_tables(
    records: list[Record], paper: dict[str, Any], titles: dict[str, str]
) -> list[tuple[Section, list[dict[str, Any]]]]:
    """A table for each (dataset, protocol) that published figures stand beside, with its rows as numbers."""
    made = []
    for dataset, protocol in dict.fromkeys(record.row[:2] for record in records):
        theirs = published_figures(paper, dataset, protocol)
        if theirs:
            rows = paper_rows([record for record in records if record.row[:2] == (dataset, protocol)], theirs)
            sources = dict.fromkeys(paper["sources"][figures["source"]] for figures in theirs.values())
            note = _NOTE.format(protocol=protocol) + "Theirs: " + "; ".join(sources) + "."
            headers = ["method", "whose", "seeds", *(name.upper() for name in load_task().paper)]
            lines = [[row["method"], row["whose"], row["seeds"] or "", *_cells(row)] for row in rows]
            key = {"dataset": dataset, "protocol": protocol}
            made.append((Section(titles[dataset], note, headers, lines), [key | row for row in rows]))
    return made


def paper_rows(records: list[Record], theirs: dict[str, Any]) -> list[dict[str, Any]]:
    """Two rows a published method, ours and theirs: each metric, its `/sd`, and its `/gain` over SASRec as a share.

    records: of one data set and protocol. A method that was not run has theirs alone.
    """
    task, rows = load_task(), []
    ours = {model: seeds for (_, _, model), seeds in by_row(records).items()}
    names = labels(records)
    for model, figures in theirs.items():
        for whose in ("ours", "theirs"):
            if whose == "ours" and model not in ours:
                continue
            row: dict[str, Any] = {"model": model, "method": names.get(model, params.label(model)), "whose": whose}
            row["seeds"] = len(ours[model]) if whose == "ours" else None
            for metric in task.paper:
                value, deviation = _value(ours.get(model, []), figures, metric, whose)
                base, _ = _value(ours.get(task.baseline, []), theirs.get(task.baseline, {}), metric, whose)
                gain = round(value / base - 1, 6) if value and base and model != task.baseline else None
                row |= {metric: value, f"{metric}/sd": deviation, f"{metric}/gain": gain}
            rows.append(row)
    return rows


def _value(seeds: list[Record], figures: dict[str, Any], metric: str, whose: str) -> tuple[Any, float | None]:
    if whose == "theirs":
        return figures.get(metric), None
    return mean_and_sd(seed.metrics["test"][metric] for seed in seeds) if seeds else (None, None)


def _cells(row: dict[str, Any]) -> list[str]:
    cells = []
    for metric in load_task().paper:
        value, deviation, gain = (row[name] for name in (metric, f"{metric}/sd", f"{metric}/gain"))
        cell = "" if value is None else f"{value:.4f}"
        cell += "" if deviation is None else f" ± {deviation:.4f}"
        cells.append(cell + ("" if gain is None else f" ({gain:+.1%})"))
    return cells
