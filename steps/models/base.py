"""What every model offers, and what the sequence models share."""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from kernels.jagged.naive import row_and_place
from kernels.sampled_softmax import sampled_softmax
from kernels.sampled_softmax.naive import NORM_EPS
from steps.data.sequences import Batch, Sequences


class Model(nn.Module, ABC):
    """A recommender: scores every item for the last position of each window."""

    @abstractmethod
    def score(self, batch: Batch) -> torch.Tensor:
        """Scores (B, num_items + 1) of every item as the next one; column 0 is padding and means nothing."""


class CountingModel(Model):
    """A model that is fitted by counting, without gradients."""

    @abstractmethod
    def fit(self, sequences: Sequences, drop: int) -> None:
        """Learn from all interactions but each user's last `drop`."""


class SequenceModel(Model):
    """A model with a vector per item, trained to predict the next item at every position.

    `config` is the `model` entry of a run's config.json, `training` its `training` entry.
    """

    def __init__(self, config: dict[str, Any], training: dict[str, Any], num_items: int) -> None:
        super().__init__()
        self.num_items = num_items
        self.dim: int = config["dim"]
        self.positions: int = training["max_len"] + config["extra_positions"]
        self.negatives: int = training["negatives"]
        self.temperature: float = config["loss"]["temperature"]
        self.input_dropout = nn.Dropout(training["dropout"])
        self.items = nn.Embedding(num_items + 1, self.dim)
        self.position = nn.Embedding(self.positions, self.dim)
        nn.init.trunc_normal_(self.items.weight, std=0.02, a=-0.04, b=0.04)

    @abstractmethod
    def encode(self, batch: Batch) -> torch.Tensor:
        """States (T, d), one per token, not normalised."""

    def loss(self, batch: Batch) -> torch.Tensor:
        """Mean sampled-softmax loss over all tokens, with negatives drawn uniformly from the catalogue."""
        shape = (len(batch.item), self.negatives)
        negatives = torch.randint(1, self.num_items + 1, shape, device=batch.item.device)
        states = self.encode(batch)
        return sampled_softmax(states, self.items.weight, batch.next_item, negatives, self.temperature).mean()

    def score(self, batch: Batch) -> torch.Tensor:
        """Cosines of the last state and every item vector."""
        states = F.normalize(self.encode(batch)[batch.last], dim=-1, eps=NORM_EPS)
        return states @ F.normalize(self.items.weight, dim=-1, eps=NORM_EPS).T

    def embed(self, batch: Batch) -> torch.Tensor:
        """Item vector x sqrt(d) + position vector, with dropout: (T, d). Position 0 is the window's first item."""
        _, place = row_and_place(batch.offsets, len(batch.item))
        return self.input_dropout(self.items(batch.item) * self.dim**0.5 + self.position(place))
