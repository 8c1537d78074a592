"""DLRM (arXiv 1906.00091): dot products of all pairs of embeddings, between two MLPs."""

import torch

from steps.common.config import TrainingConfig
from steps.data.sequences import Batch
from steps.models.rankers.base import Inputs, Ranker, RankerShape
from steps.models.rankers.mlp import MLPConfig, mlp


class DLRM(Ranker):
    """z = ReLU(MLP(dense)) (T, d); logits = MLP(z, dot products of all pairs of z and the fields) (section 2.1.4)."""

    def __init__(self, config: MLPConfig, shape: RankerShape, training: TrainingConfig) -> None:
        super().__init__(config, shape, training)
        self.bottom = mlp(shape.num_dense, config, shape.dim, training.dropout)
        vectors = shape.num_fields + 1
        self.top = mlp(shape.dim + vectors * (vectors - 1) // 2, config, shape.num_logits, training.dropout)

    def forward(self, inputs: Inputs, batch: Batch) -> torch.Tensor:  # type: ignore[override]
        numbers = torch.relu(self.bottom(inputs.dense))
        vectors = torch.cat([numbers[:, None], inputs.fields], dim=1)
        found: torch.Tensor = self.top(torch.cat([numbers, dots(vectors)], dim=1))
        return found


def dots(vectors: torch.Tensor) -> torch.Tensor:
    """The dot products (T, V (V - 1) / 2) of all pairs of vectors (T, V, d)."""
    first, second = torch.tril_indices(vectors.shape[1], vectors.shape[1], -1, device=vectors.device)
    return (vectors @ vectors.transpose(1, 2)).flatten(1).index_select(1, first * vectors.shape[1] + second)
