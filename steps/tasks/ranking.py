"""Ranking: does the user engage with the item that comes next? (arXiv 2402.17152, section 2.3: generative ranking)

Every token of a window stands for an interaction, and asks about the next one. A window becomes a sequence of actions
and items: the action of the first interaction, the item of the second, its action, the item of the third, and so on.
An item's state sees all that was before it and itself, but not its own action, which it predicts.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from steps.common.config import TrainingConfig
from steps.common.typed import Count, NotNegative, Rising, read
from steps.data.fields import FieldSizes
from steps.data.sequences import Batch, Sequences
from steps.models.base import embedding_lookup
from steps.models.features import FeatureEmbeddings, user_place
from steps.models.mean_rating import require_ratings
from steps.tasks.base import Task
from steps.tasks.losses import masked_mean


@dataclass(frozen=True)
class LevelsConfig:
    """levels: ratings, rising, beside the one that counts as engagement; for each a model says whether it will be
    reached. A protocol for ratings of another scale has its own, which take their place. others_weight: of the losses
    of the levels beside engagement.
    """

    levels: Rising
    others_weight: NotNegative

    def all_levels(self, protocol: dict[str, Any]) -> list[float]:
        """The levels, rising, with the one that counts as engagement."""
        return sorted({*protocol.get("levels", self.levels), protocol["positive"]})


@dataclass(frozen=True)
class RankingConfig(LevelsConfig):
    """tokens: interleaved, an item and its action a token each; merged, an item with the action before it as one, of
    half the number; or items, without actions. An action is the highest of the levels that is reached.

    head: the width of the head's inner layer. features: whether the user's features are added to the first token, and
    an item's to its own.
    """

    tokens: Literal["interleaved", "merged", "items"]
    head: Count
    features: bool = False


class RankingTask(Task):
    """Says of each token how likely the next interaction's rating is to reach each level."""

    schedules = ("windows", "one-pass")
    divisible = True

    def __init__(
        self, settings: dict[str, Any], training: TrainingConfig, num_items: int, protocol: dict[str, Any]
    ) -> None:
        self.config = read(LevelsConfig, settings, "model.", others=True)
        levels = self.config.all_levels(protocol)
        self.num_levels = len(levels)
        super().__init__(self._sized(settings), training, num_items)
        self.positive = levels.index(protocol["positive"])
        self.levels: torch.Tensor
        self.register_buffer("levels", torch.tensor(levels), persistent=False)

    def _sized(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The settings, with a `dim` that may depend on the number of levels."""
        return settings

    @abstractmethod
    def logits(self, batch: Batch) -> torch.Tensor:
        """(T, levels) float32: of each token's next item, whether its rating will reach each level."""

    def prepare(self, sequences: Sequences, num_held_out: torch.Tensor) -> None:
        """Raises StepError if an interaction has no rating."""
        require_ratings(sequences)

    def loss(self, batch: Batch) -> torch.Tensor:
        """The mean cross entropy of engagement, and by `others_weight` that of the other levels."""
        logits = self.logits(batch)
        reached = (batch.next_rating[:, None] >= self.levels).to(logits.dtype)
        terms = F.binary_cross_entropy_with_logits(logits, reached, reduction="none")
        engaged, others = terms[:, self.positive], terms.sum(1) - terms[:, self.positive]
        if self.num_levels > 1:
            engaged = engaged + self.config.others_weight * others / (self.num_levels - 1)
        return masked_mean(engaged, batch.token_mask)

    def predict(self, batch: Batch) -> torch.Tensor:
        """Logits (T,) of engagement with each token's next item."""
        return self.logits(batch)[:, self.positive]


class Ranking(RankingTask):
    """A causal encoder over actions and items; its states at items say how likely each level of rating is.

    With features, the user's are part of the first token, which all others see. The authors' contextual mask is not
    used: there the prefix sees the whole history, actions too that are to be predicted, and all tokens see it.
    """

    configs = (*Task.configs, RankingConfig)
    config: RankingConfig

    def __init__(
        self,
        settings: dict[str, Any],
        training: TrainingConfig,
        num_items: int,
        protocol: dict[str, Any],
        sizes: FieldSizes | None = None,
    ) -> None:
        """sizes: of the data's features, for a model that reads them."""
        config = read(RankingConfig, settings, "model.", others=True)
        self._per_item = 2 if config.tokens == "interleaved" else 1
        super().__init__(settings, replace(training, max_len=self._per_item * training.max_len), num_items, protocol)
        self.config = config
        self.actions = nn.Embedding(self.num_levels + 1, self.dim) if config.tokens != "items" else None
        if self.actions is not None:
            nn.init.trunc_normal_(self.actions.weight, std=0.02, a=-0.04, b=0.04)
        self.head = nn.Sequential(
            nn.LayerNorm(self.dim),
            nn.Linear(self.dim, config.head),
            nn.SiLU(),
            nn.Linear(config.head, self.num_levels),
        )
        self.user_features = self.item_features = None
        if config.features:
            if sizes is None:
                raise ValueError("a model that reads features needs to know how many values they have")
            self.user_features = FeatureEmbeddings(sizes.user_features, self.dim)
            self.item_features = FeatureEmbeddings(sizes.item_features, self.dim)

    def logits(self, batch: Batch) -> torch.Tensor:
        features, next_features, users = None, None, None
        if self.config.features:
            features, next_features = batch.item_features, batch.next_item_features
            users = self.embed_users(batch.user_features, len(batch.user)).index_select(0, user_place(batch))
        before = self.before(batch.item, batch.rating, batch.position == 0, features, users)
        item = self.embed_items(batch.next_item, next_features)
        if self._per_item == 1:
            embeddings, sequence = item + before, _merged(batch)
        else:
            embeddings = torch.stack([before, item], dim=1).flatten(0, 1)
            sequence = _interleaved(batch)
        states: torch.Tensor = self.encoder(embeddings, sequence)
        logits: torch.Tensor = self.head(states.view(len(batch.item), self._per_item, -1)[:, -1])
        return logits

    def embed_items(self, item: torch.Tensor, features: Mapping[str, torch.Tensor] | None) -> torch.Tensor:
        """What items (T,) int64 are in a sequence (T, d). features: theirs by name, as in `Sequences`; None of a model
        that reads none."""
        found = embedding_lookup(self.items, item)
        if self.item_features is None or features is None:
            return found
        return sum(self.item_features(features), found)

    def embed_users(self, features: Mapping[str, torch.Tensor], count: int) -> torch.Tensor:
        """What the features of `count` users, by name as in `Sequences`, add to their first tokens: (count, d).

        Raises ValueError if the model reads no features.
        """
        if self.user_features is None:
            raise ValueError("this model reads no features of users")
        return sum(self.user_features(features), self.items.weight.new_zeros(count, self.dim))

    def before(
        self,
        item: torch.Tensor,
        rating: torch.Tensor,
        is_first: torch.Tensor,
        features: Mapping[str, torch.Tensor] | None,
        users: torch.Tensor | None,
    ) -> torch.Tensor:
        """What stands before the next item (T, d): the action on each item, and the first item of a window itself.

        item: (T,) int64; rating: (T,); is_first: (T,) bool; features: of the items, as `embed_items` takes them; users:
        (T, d), what `embed_users` says of each token's user, added to the first item.
        """
        first = self.embed_items(item, features)
        found = torch.where(is_first[:, None], first if users is None else first + users, 0)
        if self.actions is None:
            return found
        return found + embedding_lookup(self.actions, torch.bucketize(rating, self.levels, right=True))


def _interleaved(batch: Batch) -> Batch:
    """The window as a sequence of two tokens a pair, the action and the next item, each with its own time."""
    position = torch.stack([2 * batch.position, 2 * batch.position + 1], dim=1).flatten()
    time = torch.stack([batch.timestamp, batch.next_timestamp], dim=1).flatten()
    return replace(
        batch,
        item=batch.item.repeat_interleave(2),
        next_item=batch.next_item.repeat_interleave(2),
        timestamp=time,
        next_timestamp=time,
        offsets=2 * batch.offsets,
        sequence_id=batch.sequence_id.repeat_interleave(2),
        position=position,
        max_len=2 * batch.max_len,
        index=batch.index.repeat_interleave(2),
        token_mask=None if batch.token_mask is None else batch.token_mask.repeat_interleave(2),
    )


def _merged(batch: Batch) -> Batch:
    """The window as a sequence of the next items, at their times."""
    return replace(batch, timestamp=batch.next_timestamp)
