"""The few numbers of an experiment that DVC shows and compares."""

from pathlib import Path
from typing import Any

import polars as pl

from steps.common.files import write_json
from steps.reporting.task import Task


def write_headline(summary: pl.DataFrame, task: Task, path: Path) -> None:
    """Write json of the task's headline metrics on test, means over seeds: data set, protocol, model, metric.

    summary: a row per (dataset, protocol, model), with a column `test/<metric>` each.
    """
    made: dict[str, Any] = {}
    for row in summary.iter_rows(named=True):
        of_protocol = made.setdefault(row["dataset"], {}).setdefault(row["protocol"], {})
        of_protocol[row["model"]] = {name: row[f"test/{name}"] for name in task.headline}
    write_json(path, made)
