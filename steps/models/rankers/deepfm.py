"""DeepFM (arXiv 1703.04247): a factorisation machine and an MLP that share embeddings."""

import torch
from torch import nn

from steps.common.config import TrainingConfig
from steps.data.sequences import Batch
from steps.models.rankers.base import Inputs, Ranker, RankerShape
from steps.models.rankers.mlp import MLPConfig, mlp


class DeepFM(Ranker):
    """logit = <w, x> + sum over i < j of <V_i, V_j> x_i x_j + MLP(fields, dense) (equations 1 to 4).

    A number is a field whose vector is multiplied with it. Levels differ in w and in the MLP's output, and share the
    pairs' sum.
    """

    reads_first_order = True

    def __init__(self, config: MLPConfig, shape: RankerShape, training: TrainingConfig) -> None:
        super().__init__(config, shape, training)
        self.dense = nn.Linear(shape.num_dense, shape.num_logits)
        self.vectors = nn.Parameter(torch.empty(shape.num_dense, shape.dim).normal_(std=0.02))
        inputs = shape.num_fields * shape.dim + shape.num_dense
        self.deep = mlp(inputs, config, shape.num_logits, training.dropout)

    def forward(self, inputs: Inputs, batch: Batch) -> torch.Tensor:  # type: ignore[override]
        first = inputs.first_order + self.dense(inputs.dense)
        vectors = torch.cat([inputs.fields, inputs.dense[:, :, None] * self.vectors], dim=1)
        found: torch.Tensor = first + pairwise(vectors)[:, None] + self.deep(inputs.flat)
        return found


def pairwise(vectors: torch.Tensor) -> torch.Tensor:
    """The sum (T,) of the dot products of all pairs of vectors (T, F, d), in F d steps: the square of the sum less the
    sum of the squares, halved (Rendle 2010, lemma 3.1)."""
    return (vectors.sum(1).square() - vectors.square().sum(1)).sum(1) / 2
