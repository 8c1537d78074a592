"""Embeddings of what is known of an interaction beforehand: its user, its item, and the features of both."""

from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from torch import nn

from steps.data.fields import FieldSizes
from steps.data.sequences import Batch
from steps.models.base import ItemTable, embedding_lookup


class FeatureEmbeddings(nn.Module):
    """A table for each feature: a category has its row, several categories the mean of theirs, none a row of 0."""

    def __init__(self, sizes: Mapping[str, int], dim: int) -> None:
        """sizes: by feature, how many values it has."""
        super().__init__()
        self.sizes = dict(sizes)
        self.names = sorted(sizes)
        self.tables = nn.ModuleList(embeddings(sizes[name] + 1, dim) for name in self.names)

    def forward(self, features: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """(N, d) of N users or items for each feature, in the order of names: of (N,) int32 from 1, or (N, K) uint8."""
        found = []
        for name, table in zip(self.names, self.tables, strict=True):
            values, rows = features[name], cast(nn.Embedding, table)
            if values.dim() == 1:
                found.append(embedding_lookup(rows, values))
            else:
                weights = values.to(rows.weight.dtype)
                found.append(weights @ rows.weight[1:] / weights.sum(1, keepdim=True).clamp(min=1))
        return found


class Fields(NamedTuple):
    """Vectors (T, d) of what is known of each token's next interaction: user, item, and each feature of both."""

    user: torch.Tensor
    item: torch.Tensor
    of_user: list[torch.Tensor]
    of_item: list[torch.Tensor]

    @property
    def stacked(self) -> torch.Tensor:
        """All of them, in this order: (T, F, d)."""
        return torch.stack([self.user, self.item, *self.of_user, *self.of_item], dim=1)


class FieldEmbeddings(nn.Module):
    """The tables of the fields, without that of items."""

    def __init__(self, sizes: FieldSizes, dim: int) -> None:
        super().__init__()
        self.users = embeddings(sizes.users, dim)
        self.user_features = FeatureEmbeddings(sizes.user_features, dim)
        self.item_features = FeatureEmbeddings(sizes.item_features, dim)

    def forward(self, batch: Batch, items: ItemTable) -> Fields:
        """items: the items' table."""
        place = user_place(batch)
        of_users = [embedding_lookup(self.users, batch.user), *self.user_features(batch.user_features)]
        user, *others = [values.index_select(0, place) for values in of_users]
        return Fields(
            user, embedding_lookup(items, batch.next_item), others, self.item_features(batch.next_item_features)
        )


def user_place(batch: Batch) -> torch.Tensor:
    """The place (T,) of each token's user in `batch.user`; of padding, which has none, any."""
    return batch.sequence_id.clamp(max=len(batch.user) - 1)


def embeddings(num: int, dim: int) -> nn.Embedding:
    """A table of `num` rows, drawn as those of items are."""
    table = nn.Embedding(num, dim)
    nn.init.trunc_normal_(table.weight, std=0.02, a=-0.04, b=0.04)
    return table
