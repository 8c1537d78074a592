"""Logistic regression on all fields and numbers."""

from dataclasses import dataclass

import torch
from torch import nn

from steps.common.config import TrainingConfig
from steps.data.sequences import Batch
from steps.models.rankers.base import Inputs, Ranker, RankerShape


@dataclass(frozen=True)
class LogisticConfig:
    """It has no settings."""


class LogisticRegression(Ranker):
    """logit = sum of the fields' weights + w . dense + b."""

    weighs_fields = True

    def __init__(self, config: LogisticConfig, shape: RankerShape, training: TrainingConfig) -> None:
        super().__init__(config, shape, training)
        self.dense = nn.Linear(shape.num_dense, shape.num_logits)

    def forward(self, inputs: Inputs, batch: Batch) -> torch.Tensor:  # type: ignore[override]
        found: torch.Tensor = inputs.fields.sum(1) + self.dense(inputs.dense)
        return found
