"""The metrics' names, apart from how they are computed: reports need no torch."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

HR_CUTOFFS = (1, 10, 50, 100, 200)
NDCG_CUTOFFS = (10, 50, 200)
NAMES = (*(f"hr@{k}" for k in HR_CUTOFFS), *(f"ndcg@{k}" for k in NDCG_CUTOFFS), "mrr")
ENGAGEMENT_NAMES = ("ne", "auc", "gauc", "log_loss", "calibration")
#: The metrics of each task.
OF_TASK = {"retrieval": NAMES, "ranking": ENGAGEMENT_NAMES}
#: Those of which more is not better.
NOT_MORE_IS_BETTER = ("ne", "log_loss", "calibration")


class Selection(NamedTuple):
    """What an epoch is chosen by: a metric, and whether less of it is better."""

    metric: str
    less_is_better: bool

    def best(self, lines: Iterable[Mapping[str, Any]], part: str) -> Any:
        """The first of the lines, which have `<part>/<metric>`, that is best."""
        sign = -1 if self.less_is_better else 1
        return max(lines, key=lambda line: sign * line[f"{part}/{self.metric}"])


#: By task, what validation selects an epoch by, and what `test_best` is the best of.
SELECTIONS = {"retrieval": Selection("ndcg@10", False), "ranking": Selection("ne", True)}
#: By task, the two that stand in the line of an epoch.
SHOWN = {"retrieval": ("hr@10", "ndcg@10"), "ranking": ("ne", "auc")}
