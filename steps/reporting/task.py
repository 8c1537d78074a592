"""What the reports of a task show, as params/tasks.yaml says."""

from dataclasses import dataclass

from steps.common import params
from steps.common.cli import StepError
from steps.evaluation.metrics import NAMES


@dataclass(frozen=True)
class Task:
    """Metrics by their names: columns of the table, the two with most room, and the one that is compared."""

    tables: tuple[str, ...]
    headline: tuple[str, ...]
    compared: str


def load_task(name: str = "retrieval") -> Task:
    """The entry of params/tasks.yaml. Raises StepError if it names a metric that evaluation does not have."""
    content = params.load("tasks")[name]
    for metric in [*content["tables"], *content["headline"], content["compared"]]:
        if metric not in NAMES:
            raise StepError(f"params/tasks.yaml, key {name}: evaluation has no {metric}; it has {', '.join(NAMES)}")
    return Task(tuple(content["tables"]), tuple(content["headline"]), content["compared"])
