"""First-order Markov chain: the next item is what most often followed the last one."""

import torch

from kernels.jagged.naive import sequence_and_position
from steps.data.sequences import Batch, Sequences
from steps.models.base import CountBasedModel, Recommender


class Markov(CountBasedModel, Recommender):
    """Scores are counts of transitions from the last item; popularity, below one transition, breaks ties.

    Transitions are kept as rows of a sparse matrix: the items `followers[start[i]:start[i + 1]]` followed item i, each
    as often as `times` says.
    """

    start: torch.Tensor
    followers: torch.Tensor
    times: torch.Tensor
    popularity: torch.Tensor

    def __init__(self, num_items: int) -> None:
        super().__init__()
        self.num_items = num_items
        self.register_buffer("start", torch.zeros(num_items + 2, dtype=torch.int64))
        self.register_buffer("followers", torch.zeros(0, dtype=torch.int32))
        self.register_buffer("times", torch.zeros(0))
        self.register_buffer("popularity", torch.zeros(num_items + 1))

    def fit(self, sequences: Sequences, num_held_out: torch.Tensor) -> None:
        user, position = sequence_and_position(sequences.offsets, len(sequences.item))
        kept = (
            position < (sequences.offsets.diff() - num_held_out - 1)[user]
        )  # those that the user's next trained-on one follows
        index = torch.nonzero(kept)[:, 0]
        pair = sequences.item[index] * (self.num_items + 1) + sequences.item[index + 1]
        pairs, times = pair.unique(return_counts=True)  # sorted, so that the matrix's rows are contiguous
        counts = torch.bincount(pairs // (self.num_items + 1), minlength=self.num_items + 1)
        self.start = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        self.followers = (pairs % (self.num_items + 1)).int()
        self.times = times.float()
        popularity = sequences.counts(num_held_out).float()
        self.popularity = popularity / (popularity.sum() + 1)

    def score(self, batch: Batch) -> torch.Tensor:
        last = batch.item[batch.last]
        lengths = self.start[last + 1] - self.start[last]
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        user, position = sequence_and_position(offsets, int(offsets[-1]))
        index = self.start[last][user] + position
        scores = self.popularity.expand(len(last), -1).clone()
        scores[user, self.followers[index].long()] += self.times[index]
        return scores
