"""SASRec (arXiv 1808.09781) as a ranker: its state before an item instead of DIN's interests."""

from dataclasses import dataclass

import torch

from steps.common.config import TrainingConfig
from steps.data.sequences import Batch
from steps.models.rankers.base import Inputs, Ranker, RankerShape
from steps.models.rankers.mlp import MLPConfig, mlp
from steps.models.sasrec import SASRec, SASRecConfig


@dataclass(frozen=True)
class SASRecRankerConfig(SASRecConfig, MLPConfig):
    """The encoder's sizes, and the MLP's behind it."""


class SASRecRanker(Ranker):
    """logits = MLP(fields, dense, state, state * item), where a state sees items and ratings up to its token.

    The sum of state * item is SASRec's own score (equation 6). The state itself knows nothing of the item.
    """

    reads_history = True

    def __init__(self, config: SASRecRankerConfig, shape: RankerShape, training: TrainingConfig) -> None:
        super().__init__(config, shape, training)
        self.encoder = SASRec(config, shape.max_len, training.dropout)
        inputs = (shape.num_fields + 2) * shape.dim + shape.num_dense
        self.deep = mlp(inputs, config, shape.num_logits, training.dropout)

    def forward(self, inputs: Inputs, batch: Batch) -> torch.Tensor:  # type: ignore[override]
        states = self.encoder(inputs.history, batch)
        found: torch.Tensor = self.deep(torch.cat([inputs.flat, states, states * inputs.item], dim=1))
        return found
