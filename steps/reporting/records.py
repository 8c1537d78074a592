"""The finished runs of an experiment, from runs/ or from the small records committed under reports/."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steps.common import params
from steps.common.cli import StepError
from steps.common.files import read_jsonl
from steps.common.provenance import check_run


@dataclass(frozen=True)
class Record:
    """One finished run: its place in the experiment, and the content of its small files."""

    run: params.Run
    config: dict[str, Any]
    history: list[dict[str, Any]]
    metrics: dict[str, Any]

    @property
    def row(self) -> tuple[str, str, str]:
        """What runs that differ in their seed alone share."""
        return self.run.dataset, self.run.protocol, self.run.model


def read_records(experiment: str, folder: Path) -> tuple[list[Record], list[params.Run]]:
    """The finished runs in table order, and the runs that are missing. Raises StepError if none is finished, or
    if a run's files do not belong together."""
    found, missing = [], []
    for run in params.runs(experiment):
        path = folder / run.path
        if (path / "metrics.json").is_file():
            config, metrics = check_run(path)
            found.append(Record(run, config, read_jsonl(path / "history.jsonl"), metrics))
        else:
            missing.append(run)
    if not found:
        raise StepError(f"{folder} holds no finished run of experiment {experiment}; train and evaluate first")
    return found, missing


def by_row(records: list[Record]) -> dict[tuple[str, str, str], list[Record]]:
    """Records by (dataset, protocol, model), in table order."""
    rows: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        rows.setdefault(record.row, []).append(record)
    return rows


def labels(records: list[Record]) -> dict[str, str]:
    """The label of every model, by its name."""
    return {model: params.label(model) for model in dict.fromkeys(record.run.model for record in records)}


def mean_and_sd(values: Iterable[float]) -> tuple[float, float | None]:
    """Mean and standard deviation over seeds; no deviation of one seed."""
    numbers = list(values)
    deviation = round(statistics.stdev(numbers), 6) if len(numbers) > 1 else None
    return round(statistics.mean(numbers), 6), deviation


def cell(mean: float, deviation: float | None) -> str:
    """`mean ± deviation` to four digits."""
    return f"{mean:.4f}" + (f" ± {deviation:.4f}" if deviation is not None else "")
