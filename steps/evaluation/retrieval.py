"""The metrics of retrieval after an epoch: exact, under the rules of the run's own protocol."""

from typing import Any

import torch

from steps.data.sequences import Sequences
from steps.data.split import HeldOut
from steps.evaluation.metrics import metric_values, named
from steps.evaluation.ranks import Ranker, Rules, Scorer, require_finite


class RetrievalEvaluation:
    """Evaluates models on the same held-out targets, as often as it is called, without waiting for the device."""

    def __init__(self, config: dict[str, Any], sequences: Sequences, held_out: HeldOut) -> None:
        training = config["training"]
        self._ranker = Ranker(sequences, held_out, [Rules.of(config)], training["max_len"], training["batch"])

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
