"""Most popular: every user gets the items with the most interactions in the training data."""

import torch

from steps.data.sequences import Batch, Sequences
from steps.models.base import CountBasedModel, Recommender


class MostPopular(CountBasedModel, Recommender):
    """Scores are training counts."""

    count: torch.Tensor

    def __init__(self, num_items: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(num_items + 1))

    def fit(self, sequences: Sequences, num_held_out: torch.Tensor) -> None:
        self.count = sequences.counts(num_held_out).float()

    def score(self, batch: Batch) -> torch.Tensor:
        return self.count.expand(len(batch.user), -1)
