"""What the reports of a task show, as params/tasks.yaml says."""

from dataclasses import dataclass

from steps.common import params
from steps.common.cli import StepError
from steps.evaluation.names import NAMES


@dataclass(frozen=True)
class Task:
    """Metrics by their names: columns of the table, the two with most room, the paper's columns, the compared one.

    baseline: the row that gains are relative to.
    """

    tables: tuple[str, ...]
    headline: tuple[str, ...]
    paper: tuple[str, ...]
    compared: str
    baseline: str


def load_task(name: str = "retrieval") -> Task:
    """The entry of params/tasks.yaml. Raises StepError if it names a metric that evaluation does not have."""
    content = params.load("tasks")[name]
    for metric in [*content["tables"], *content["headline"], *content["paper"], content["compared"]]:
        if metric not in NAMES:
            raise StepError(f"params/tasks.yaml, key {name}: evaluation has no {metric}; it has {', '.join(NAMES)}")
    tables, headline, paper = (tuple(content[key]) for key in ("tables", "headline", "paper"))
    return Task(tables, headline, paper, content["compared"], content["baseline"])
