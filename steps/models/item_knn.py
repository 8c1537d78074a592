"""Item-kNN: items similar to those in the window, by the cosine of the sets of users who interacted with them."""

from dataclasses import dataclass

import torch

from kernels.jagged.naive import sequence_and_position
from steps.common.top import top_items
from steps.common.typed import Count, NotNegative
from steps.data.sequences import Batch, Sequences
from steps.models.base import CountBasedModel, Recommender

_ITEMS_AT_ONCE = 1024  # columns of the dense block: 1,024 x 138,493 users are 0.6 GB


@dataclass(frozen=True)
class ItemKNNConfig:
    """How many neighbours an item keeps, and what is added to the denominator of their similarity."""

    neighbours: Count
    shrink: NotNegative


class ItemKNN(CountBasedModel, Recommender):
    """Each item keeps its k nearest (Sarwar et al. 2001); a candidate's score is the sum of similarities to the window.

    similarity(i, j) = users of both / (sqrt(users of i) sqrt(users of j) + shrink). Of equally similar items those with
    the smallest ids are kept.
    """

    neighbours: torch.Tensor
    similarity: torch.Tensor

    def __init__(self, config: ItemKNNConfig, num_items: int) -> None:
        super().__init__()
        self.num_items = num_items
        self.k = min(config.neighbours, num_items)
        self.shrink = config.shrink
        self.register_buffer("neighbours", torch.zeros(num_items + 1, self.k, dtype=torch.int32))
        self.register_buffer("similarity", torch.zeros(num_items + 1, self.k))

    def fit(self, sequences: Sequences, num_held_out: torch.Tensor) -> None:
        user, position = sequence_and_position(sequences.offsets, len(sequences.item))
        kept = position < (sequences.offsets.diff() - num_held_out)[user]
        pairs = torch.stack([user[kept], sequences.item[kept]]).unique(dim=1)  # a user counts once per item
        shape = (sequences.num_users, self.num_items + 1)
        ones = torch.ones(pairs.shape[1], device=pairs.device)
        by_item = torch.sparse_coo_tensor(pairs.flip(0), ones, shape[::-1], check_invariants=True).coalesce()
        users = torch.bincount(pairs[1], minlength=shape[1]).float().sqrt()
        neighbours, similarity = [], []
        for first in range(0, shape[1], _ITEMS_AT_ONCE):
            last = min(first + _ITEMS_AT_ONCE, shape[1])
            chosen = (pairs[1] >= first) & (pairs[1] < last)
            block = torch.zeros(shape[0], last - first, device=pairs.device)
            block[pairs[0, chosen], pairs[1, chosen] - first] = 1
            both = by_item @ block  # (V + 1, block)
            cosine = both / (users[:, None] * users[None, first:last] + self.shrink).clamp(min=1e-12)
            cosine[torch.arange(first, last), torch.arange(last - first)] = 0  # no item is its own neighbour
            best = top_items(cosine.T, self.k)
            neighbours.append(best)
            similarity.append(cosine.T.gather(1, best))
        self.neighbours = torch.cat(neighbours).int().contiguous()
        self.similarity = torch.cat(similarity).contiguous()

    def score(self, batch: Batch) -> torch.Tensor:
        sequence_id, _ = sequence_and_position(batch.offsets, len(batch.item))
        scores = torch.zeros(len(batch.user), self.num_items + 1, device=batch.item.device)
        index = sequence_id[:, None] * (self.num_items + 1) + self.neighbours[batch.item]
        scores.view(-1).index_add_(0, index.flatten(), self.similarity[batch.item].flatten())
        return scores
