"""Retrieval: which item comes next, among all?"""

from typing import Any

import torch
from torch import nn

from kernels.rowwise_table import unique
from kernels.rowwise_table.sharded import ShardedRowwiseTable
from steps.common.config import TrainingConfig
from steps.common.typed import EntryError
from steps.data.sequences import Batch
from steps.models.base import Recommender
from steps.tasks.base import Task
from steps.tasks.losses import WithLoss, next_item_loss, read_loss, scores


class Retrieval(Task, Recommender):
    """Every token of a window predicts the next item, by the similarity of its state and the items' embeddings."""

    schedules = ("windows", "one-pass")
    supports_rowwise_items = True
    configs = (*Task.configs, WithLoss)

    def __init__(
        self, settings: dict[str, Any], training: TrainingConfig, num_items: int, sharded: bool = False
    ) -> None:
        super().__init__(settings, training, num_items, sharded)
        self.loss_config = read_loss(settings, training.negatives)
        self.divisible = self.loss_config.name != "in-batch-softmax"  # whose negatives are the whole batch's
        if self.items_config and self.loss_config.name != "sampled-softmax":
            raise EntryError(f"key model.items: loss {self.loss_config.name} needs all embeddings; use sampled-softmax")

    def loss(self, batch: Batch) -> torch.Tensor:
        """The mean loss over all tokens. Of a table that processes share they take `loss_of` instead."""
        if isinstance(self.items, nn.Embedding):
            states, table = self.encode(batch), self.items.weight
            return next_item_loss(self.loss_config, states, table, batch.next_item, batch.token_mask, part=batch.part)
        unique_items, index = unique(self.wanted_items(batch))
        return self.loss_of(batch, self.items(unique_items), index)

    def wanted_items(self, batch: Batch) -> torch.Tensor:
        """The items of the tokens, those that they predict, and a pool that negatives are drawn from: (n,)."""
        pool_size = self.items_config.negative_pool if self.items_config else 0
        draws = batch.part.draws if batch.part else None
        pool = torch.randint(1, self.num_items + 1, (pool_size,), device=batch.item.device, generator=draws)
        return torch.cat([batch.item, batch.next_item, pool])

    def loss_of(self, batch: Batch, table: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
        """The loss of a `RowwiseTable`, of which a step reads each row once."""
        if index is None:
            raise TypeError("the vectors need an index")
        tokens = len(batch.item)
        item, next_item, pool = index.split([tokens, tokens, len(index) - 2 * tokens])
        states = self.encoder(table.index_select(0, item), batch)
        return next_item_loss(self.loss_config, states, table, next_item, batch.token_mask, pool, batch.part)

    def score(self, batch: Batch) -> torch.Tensor:
        """Similarity of the last hidden state and every item embedding."""
        last = self.encode(batch)[batch.last]
        return scores(self.loss_config.similarity, last, self.items.weight.to(last.dtype))

    @property
    def own_rows(self) -> range:
        """The items whose vectors this process has."""
        first = self.items.first if isinstance(self.items, ShardedRowwiseTable) else 0
        return range(first, first + len(self.items.weight))

    def own_vectors(self, item: torch.Tensor) -> torch.Tensor:
        """Vectors (T, d) float32 of items (T,), zeros where another process has them."""
        rows = self.own_rows
        own = (item >= rows.start) & (item < rows.stop)
        found = torch.zeros(len(item), self.dim, device=item.device)
        found[own] = self.items.weight.index_select(0, item[own] - rows.start).float()
        return found

    def last_states(self, vectors: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The last hidden states (B, d) of windows whose items have these vectors (T, d)."""
        states: torch.Tensor = self.encoder(vectors, batch)
        return states[batch.last]

    def score_rows(self, last: torch.Tensor, first: int, end: int) -> torch.Tensor:
        """Similarity (B, end - first) of last hidden states and the items from `first` on, as `score` has it; means
        nothing where another process has their vectors."""
        rows = self.own_rows
        low, high = max(first, rows.start), min(end, rows.stop)
        table = self.items.weight.new_zeros(end - first, self.dim)
        table[low - first : high - first] = self.items.weight[low - rows.start : high - rows.start]
        return scores(self.loss_config.similarity, last, table.to(last.dtype))
