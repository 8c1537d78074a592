"""DCN-v2 (arXiv 2008.13535): explicit crosses of all features beside an MLP."""

from dataclasses import dataclass

import torch
from torch import nn

from steps.common.config import TrainingConfig
from steps.common.typed import Count
from steps.data.sequences import Batch
from steps.models.rankers.base import Inputs, Ranker, RankerShape
from steps.models.rankers.mlp import MLPConfig, mlp


@dataclass(frozen=True)
class DCNConfig(MLPConfig):
    """crosses: cross layers; terms reach that degree and one more."""

    crosses: Count


class DCNV2(Ranker):
    """x_(l+1) = x_0 * (W_l x_l + b_l) + x_l (equation 1, W of full rank), and an MLP of x_0 beside it (figure 1b);
    a linear map of both gives the logits."""

    def __init__(self, config: DCNConfig, shape: RankerShape, training: TrainingConfig) -> None:
        super().__init__(config, shape, training)
        width = shape.num_fields * shape.dim + shape.num_dense
        self.crosses = nn.ModuleList(nn.Linear(width, width) for _ in range(config.crosses))
        self.deep = mlp(width, config, shape.num_logits, training.dropout)
        self.output = nn.Linear(width, shape.num_logits, bias=False)  # the MLP's last map has the bias of both

    def forward(self, inputs: Inputs, batch: Batch) -> torch.Tensor:  # type: ignore[override]
        found: torch.Tensor = self.output(self.crossed(inputs.flat)) + self.deep(inputs.flat)
        return found

    def crossed(self, first: torch.Tensor) -> torch.Tensor:
        """The last cross layer's output (T, width) from x_0."""
        x = first
        for cross in self.crosses:
            x = first * cross(x) + x
        return x
