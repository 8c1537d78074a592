"""Ranking by features: what generative ranking is compared with, on the same windows and by the same evaluation.

A prediction reads what is known of the next interaction before it is rated: user, item, their features, how both were
rated before (`steps.data.before`), and, where the ranker reads it, the history up to the token before.
"""

from typing import Any

import torch

from steps.common.config import TrainingConfig
from steps.data.before import before_of
from steps.data.fields import FieldSizes
from steps.data.sequences import Batch, Sequences
from steps.models.base import embedding_lookup
from steps.models.features import FieldEmbeddings, embeddings, user_place
from steps.models.rankers import RANKERS, Inputs, Ranker, RankerShape, build_ranker
from steps.tasks.base import Task
from steps.tasks.ranking import LevelsConfig, RankingTask

_NUM_DENSE = 6


class FeatureRanking(RankingTask):
    """A ranker of `steps.models.rankers` over embeddings of fields, and counts of the past."""

    configs = (*Task.configs, LevelsConfig)
    encoder: Ranker

    def __init__(
        self,
        settings: dict[str, Any],
        training: TrainingConfig,
        num_items: int,
        protocol: dict[str, Any],
        sizes: FieldSizes | None,
    ) -> None:
        if sizes is None:
            raise ValueError("a model that reads features needs to know how many values they have")
        self._kind, self._sizes = RANKERS[settings["model"]][0], sizes
        self._protocol = protocol
        super().__init__(settings, training, num_items, protocol)
        self.fields = FieldEmbeddings(sizes, self.dim)
        if self._kind.reads_history:
            self.actions = embeddings(self.num_levels + 1, self.dim)
        if self._kind.reads_first_order:
            self.weights = FieldEmbeddings(sizes, self.num_levels)
            self.item_weights = embeddings(num_items + 1, self.num_levels)
        self.dense_mean: torch.Tensor
        self.dense_std: torch.Tensor
        self.register_buffer("dense_mean", torch.zeros(_NUM_DENSE))
        self.register_buffer("dense_std", torch.ones(_NUM_DENSE))

    def _sized(self, settings: dict[str, Any]) -> dict[str, Any]:
        return settings | {"dim": self.num_levels} if self._kind.weighs_fields else settings

    def _build_encoder(self, settings: dict[str, Any], training: TrainingConfig) -> Ranker:
        num_fields = 2 + len(self._sizes.user_features) + len(self._sizes.item_features)
        shape = RankerShape(num_fields, self.dim, _NUM_DENSE, self.num_levels, training.max_len)
        return build_ranker(settings, training, shape)

    def prepare(self, sequences: Sequences, num_held_out: torch.Tensor) -> None:
        """Take mean and standard deviation of the counts over what is trained on. Raises as `RankingTask.prepare`."""
        super().prepare(sequences, num_held_out)
        lengths = sequences.offsets.diff()
        user = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        position = torch.arange(len(user), device=user.device) - sequences.offsets[user]
        trained = position < (lengths - num_held_out)[user]
        values = self._counts(sequences, user[trained], sequences.item[trained], sequences.timestamp[trained]).double()
        self.dense_mean.copy_(values.mean(0))
        self.dense_std.copy_(values.std(0, correction=0).clamp(min=1e-6))

    def logits(self, batch: Batch) -> torch.Tensor:
        """(T, levels): of each token's next item, whether its rating will reach each level."""
        user = batch.user.index_select(0, user_place(batch))
        dense = self._counts(batch.sequences, user, batch.next_item, batch.next_timestamp)
        first_order = item = history = None
        fields = self.fields(batch, self.items)
        if self.encoder.reads_history:
            action = embedding_lookup(self.actions, torch.bucketize(batch.rating, self.levels, right=True))
            features = self.fields.item_features(batch.item_features)
            history = sum(features, embedding_lookup(self.items, batch.item) + action)
            item = sum(fields.of_item, fields.item)
        if self.encoder.reads_first_order:
            first_order = self.weights(batch, self.item_weights).stacked.sum(1)
        inputs = Inputs(
            fields=fields.stacked,
            dense=(dense.to(self.dense_mean.dtype) - self.dense_mean) / self.dense_std,
            first_order=first_order,
            item=item,
            history=history,
        )
        logits: torch.Tensor = self.encoder(inputs, batch)
        return logits

    def _counts(self, sequences: Sequences, user: torch.Tensor, item: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """What was known before each time (K,) of item and user: (K, 6) float32."""
        before = before_of(sequences, self._protocol)
        columns = []
        for known in (before.items(item, time), before.users(user, time)):
            columns += [known.ratings.log1p(), known.engagements.log1p(), known.deviation]
        return torch.stack(columns, dim=1)
