"""The metrics of retrieval after an epoch: exact, under the rules of the run's own protocol."""

from typing import Any

import torch

from steps.common.processes import ALONE, Processes
from steps.data.sequences import Sequences
from steps.data.split import HeldOut
from steps.evaluation.exact_ranks import Ranker, Rules, Scorer, require_finite
from steps.evaluation.metrics import metric_values, named


class RetrievalEvaluation:
    """Evaluates models on the same held-out targets, as often as it is called, without waiting for the device.

    Several processes rank a part of the targets each, and all have the metrics.
    """

    def __init__(
        self, config: dict[str, Any], sequences: Sequences, held_out: HeldOut, processes: Processes = ALONE
    ) -> None:
        training, rules = config["training"], [Rules.of(config)]
        self._ranker = Ranker(sequences, held_out, rules, training["max_len"], training["batch"], processes=processes)

    @torch.inference_mode()
    def __call__(self, model: Scorer) -> torch.Tensor:
        """Whether every score was finite, and the metrics: float64 on the device."""
        finite, (ranking,) = self._ranker.rank(model)
        return torch.cat([finite.double()[None], metric_values(ranking.ranks)])

    def named(self, result: torch.Tensor) -> dict[str, float]:
        """The metrics by name. Waits for the device. Raises StepError if a score is not finite."""
        finite, *values = result.tolist()
        require_finite(bool(finite))
        return named(values)
