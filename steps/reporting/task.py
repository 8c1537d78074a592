"""What the reports of a task show, as params/tasks.yaml says."""

from dataclasses import dataclass

from steps.common import params
from steps.common.cli import StepError
from steps.evaluation.names import NOT_MORE_IS_BETTER, OF_TASK
from steps.reporting.records import Record


@dataclass(frozen=True)
class Task:
    """Metrics by their names: columns of the table, the two with most room, those with intervals (the paper's columns),
    the compared one.

    baseline: the row that gains are relative to. floor: where axes of the compared metric begin.
    """

    name: str
    tables: tuple[str, ...]
    headline: tuple[str, ...]
    paper: tuple[str, ...]
    compared: str
    baseline: str
    floor: float


def load_task(name: str = "retrieval") -> Task:
    """The entry of params/tasks.yaml. Raises StepError if it names a metric that evaluation does not have."""
    content = params.load("tasks")[name]
    known, where = OF_TASK[name], f"params/tasks.yaml, key {name}"
    for metric in [*content["tables"], *content["headline"], *content["paper"], content["compared"]]:
        if metric not in known:
            raise StepError(f"{where}: evaluation has no {metric}; it has {', '.join(known)}")
    if content["compared"] in NOT_MORE_IS_BETTER:
        raise StepError(f"{where}.compared: more {content['compared']} is not better; name another metric")
    tables, headline, paper = (tuple(content[key]) for key in ("tables", "headline", "paper"))
    return Task(name, tables, headline, paper, content["compared"], content["baseline"], float(content["floor"]))


def task_of_records(records: list[Record]) -> Task:
    """What the reports of an experiment's records show: it is of one task."""
    return load_task(records[0].task)


def printed(metric: str) -> str:
    """A metric's name as tables and figures print it."""
    return metric.upper().replace("_", " ")
