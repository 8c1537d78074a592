"""The means of item and user: how often others engaged with this item, and this user with other ones."""

from dataclasses import dataclass

import torch

from kernels.jagged.naive import sequence_and_position
from steps.common.cli import StepError
from steps.common.typed import Positive
from steps.data.sequences import Batch, Sequences
from steps.models.base import CountBasedModel


@dataclass(frozen=True)
class MeanRatingConfig:
    """shrink: a mean counts so many interactions more, with the mean of all."""

    shrink: Positive


class MeanRating(CountBasedModel):
    """The log-odds of the user's mean plus those of the item's, less those of the mean of all.

    An item's mean is of the training rows, a user's of all the user's rows before the one that is predicted.
    """

    mean: torch.Tensor
    item_mean: torch.Tensor

    def __init__(self, config: MeanRatingConfig, num_items: int, positive: float) -> None:
        """positive: the least rating that is an engagement."""
        super().__init__()
        self.shrink, self.num_items, self.positive = config.shrink, num_items, positive
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("item_mean", torch.zeros(num_items + 1))

    def fit(self, sequences: Sequences, num_held_out: torch.Tensor) -> None:
        """Raises StepError if an interaction has no rating, or if all that are trained on are alike."""
        require_ratings(sequences)
        user, position = sequence_and_position(sequences.offsets, len(sequences.item))
        kept = position < (sequences.offsets.diff() - num_held_out)[user]
        item, engaged = sequences.item[kept], self._engaged(sequences)[kept]
        self.mean = engaged.double().mean().float()
        if not 0 < float(self.mean) < 1:
            raise StepError(f"all ratings that are trained on are below {self.positive}, or none: nothing to predict")
        counts = torch.bincount(item, minlength=self.num_items + 1)
        self.item_mean = self._shrunk(torch.bincount(item[engaged], minlength=self.num_items + 1), counts)

    def predict(self, batch: Batch) -> torch.Tensor:
        """Logits (T,) of engagement with each token's next item. Without padding."""
        sequences = batch.sequences
        # Whole numbers, which add up to the same on every device.
        before = torch.nn.functional.pad(self._engaged(sequences).long().cumsum(0), (1, 0))
        start, end = sequences.offsets[batch.user][batch.sequence_id], batch.index + 1
        user_mean = self._shrunk(before[end] - before[start], end - start)
        return torch.logit(user_mean) + torch.logit(self.item_mean[batch.next_item]) - torch.logit(self.mean)

    def _engaged(self, sequences: Sequences) -> torch.Tensor:
        if sequences.rating is None:
            raise ValueError("the data set has no ratings: a model that reads them needs one that has")
        return sequences.rating >= self.positive

    def _shrunk(self, positive: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        return (positive + self.shrink * self.mean) / (count + self.shrink)


def require_ratings(sequences: Sequences) -> None:
    """Raise StepError if an interaction has no rating."""
    if sequences.rating is None or bool(sequences.rating.isnan().any()):
        raise StepError("ranking predicts ratings, and the data set lacks some or all: take another data set")
