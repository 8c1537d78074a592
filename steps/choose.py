"""Choose for every row of a search the point of its grid that was best on validation, and write it into params/tuned/.

An experiment that says `tuned: <search>` takes the settings from there. Every row has had the same points, so none was
tuned longer than another; a search whose runs are not all finished is refused. Says, there too, where the best of a row
lies at an edge of the grid.
"""

import argparse
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from steps.common import params, yaml_files
from steps.common.cli import StepError, run_step
from steps.common.config import task_of
from steps.common.files import write_text
from steps.evaluation.names import SELECTIONS
from steps.reporting.records import Record, read_records

_HEADER = """\
# Written by `python -m steps.choose --experiment {search}`: of the same points for every row, the best on validation.
"""


def choose(records: Iterable[Record]) -> dict[str, dict[str, dict[str, Any]]]:
    """What params/tuned/ keeps of the records of a search, by data set and row.

    A point's value is the mean over its seeds; of equal ones the first is taken. Raises StepError if a run has no
    validation, or if there is more than one protocol.
    """
    protocols = {record.run.protocol: record.config["protocol"] for record in records}
    if len(protocols) > 1:
        raise StepError(f"the search has protocols {', '.join(protocols)}; settings are chosen under one")
    (protocol,) = protocols.values()
    selection = SELECTIONS[task_of(protocol)]
    values: dict[tuple[str, str], dict[str, list[float]]] = {}
    for record in records:
        if "valid" not in record.metrics:
            raise StepError(f"protocol {record.run.protocol} has no validation to choose by; search under one that has")
        row, _ = params.point_of(record.run.model)
        points = values.setdefault((record.run.dataset, row), {})
        points.setdefault(record.run.model, []).append(record.metrics["valid"][selection.metric])
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for (dataset, row), points in values.items():
        lines = [{"model": model, f"valid/{selection.metric}": statistics.fmean(of)} for model, of in points.items()]
        best = selection.best(lines, "valid")
        found.setdefault(dataset, {})[row] = {
            "trials": len(points),
            "metric": selection.metric,
            "value": round(best[f"valid/{selection.metric}"], 6),
            "settings": params.point_of(best["model"])[1],
        }
    return found


def at_edges(chosen: dict[str, dict[str, dict[str, Any]]], grid: dict[str, list[Any]]) -> list[str]:
    """A line for each setting that is the least or greatest of three numbers or more: a wider grid might be better.

    chosen: by data set and row, as `choose` returns it. A bound that cannot be passed, 0, is none.
    """
    numbers = {key: sorted(values) for key, values in grid.items() if len(values) > 2 and _are_numbers(values)}
    found = []
    for dataset, rows in chosen.items():
        for key, values in numbers.items():
            for end, word in ((values[0], "least"), (values[-1], "greatest")):
                at = [row for row, of in rows.items() if of["settings"].get(key) == end]
                if at and end != 0:
                    found.append(f"{dataset}: {key} {end} is the {word} of the grid, and the best of {', '.join(at)}")
    return found


def content(search: str, chosen: dict[str, dict[str, dict[str, Any]]], edges: list[str]) -> str:
    """The file in params/tuned/: what was chosen, below a comment that has the `edges`."""
    comments = [_HEADER.format(search=search), *(f"# {line}\n" for line in edges)]
    return "".join(comments) + yaml_files.dump(chosen)


def _are_numbers(values: list[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--experiment", required=True, help="the search: an experiment with a grid")
    parser.add_argument("--runs", type=Path, help="its runs, or records (default: reports/<experiment>/records)")
    parser.add_argument("--output", type=Path, help="the file to write (default: params/tuned/<experiment>.yaml)")


def main(args: argparse.Namespace) -> None:
    search = args.experiment
    experiment = params.load(f"experiments/{search}")
    if "grid" not in experiment:
        raise StepError(f"{params.experiment_path(search)} has no `grid`, so that there is nothing to choose among")
    folder = args.runs or Path("reports", search, "records")
    records, missing = read_records(search, folder)
    if missing:
        raise StepError(
            f"{folder} lacks {len(missing)} runs of {search}, such as {missing[0].path}; rows need the same trials: "
            "finish them first"
        )
    output = args.output or params.tuned_path(search, search)
    chosen = choose(records)
    edges = at_edges(chosen, experiment["grid"])
    write_text(output, content(search, chosen, edges))
    print("\n".join([f"wrote {output}", *edges]))


if __name__ == "__main__":
    run_step("choose", __doc__, add_arguments, main)
