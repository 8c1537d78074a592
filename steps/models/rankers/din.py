"""DIN (arXiv 1706.06978): the history is summed by how much each part of it says about the item in question."""

from dataclasses import dataclass

import torch
from torch import nn

from steps.common.config import TrainingConfig
from steps.common.typed import Count
from steps.data.sequences import Batch
from steps.models.rankers.base import Inputs, Ranker, RankerShape
from steps.models.rankers.mlp import MLPConfig, mlp


@dataclass(frozen=True)
class DINConfig(MLPConfig):
    """unit: the width of the activation unit's inner layer."""

    unit: Count


class ActivationUnit(nn.Module):
    """sum over the history of a(e_j, v) e_j (equation 3), with a an MLP of one inner layer, and no softmax.

    a reads v, e, v - e and v * e, as the authors' code does. Its activation is PReLU: Dice would take the mean of a
    batch, which holds other users.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(4 * dim, width)
        self.activation = nn.PReLU(width)
        self.outer = nn.Linear(width, 1)

    def forward(self, history: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        """History and next items, (S, N, d), to sums (S, N, d), of which each sees the history to its own place alone.

        The inner layer is split by what it reads, so that S N N width numbers are made, not four times d of them.
        """
        of_item, of_history, of_difference, of_product = self.inner.weight.chunk(4, dim=1)
        queries = item @ (of_item + of_difference).T + self.inner.bias  # (S, N, width)
        keys = history @ (of_history - of_difference).T
        products = (item[:, :, None] * of_product).flatten(1, 2) @ history.transpose(1, 2)  # (S, N width, N)
        inner = products.unflatten(1, (-1, len(of_product))) + queries[..., None] + keys.transpose(1, 2)[:, None]
        inner = torch.where(inner > 0, inner, self.activation.weight[:, None] * inner)
        weights = torch.einsum("sqwk,w->sqk", inner, self.outer.weight[0]) + self.outer.bias
        return weights.tril() @ history


class DIN(Ranker):
    """logits = MLP(fields, dense, interests, interests * item)."""

    reads_history = True

    def __init__(self, config: DINConfig, shape: RankerShape, training: TrainingConfig) -> None:
        super().__init__(config, shape, training)
        self.unit = ActivationUnit(shape.dim, config.unit)
        inputs = (shape.num_fields + 2) * shape.dim + shape.num_dense
        self.deep = mlp(inputs, config, shape.num_logits, training.dropout)

    def forward(self, inputs: Inputs, batch: Batch) -> torch.Tensor:  # type: ignore[override]
        interests = batch.to_jagged(self.unit(batch.to_padded(inputs.history), batch.to_padded(inputs.item)))
        found: torch.Tensor = self.deep(torch.cat([inputs.flat, interests, interests * inputs.item], dim=1))
        return found
