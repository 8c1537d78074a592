"""Ranking: does the user engage with the item that comes next? (arXiv 2402.17152, section 2.3: generative ranking)

Every token of a window stands for an interaction, and asks about the next one. A window becomes a sequence of actions
and items: the action of the first interaction, the item of the second, its action, the item of the third, and so on.
An item's state sees all that was before it and itself, but not its own action, which it predicts.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from steps.common.config import TrainingConfig
from steps.common.typed import Count, NotNegative, Rising, read
from steps.data.sequences import Batch, Sequences
from steps.models.base import embedding_lookup
from steps.models.mean_rating import require_ratings
from steps.tasks.base import Task
from steps.tasks.losses import masked_mean


@dataclass(frozen=True)
class RankingConfig:
    """tokens: interleaved, an item and its action a token each; merged, an item with the action before it as one, of
    half the number; or items, without actions.

    levels: ratings, rising, beside the one that counts as engagement. An action is the highest that is reached, and for
    each the head says whether it will be. others_weight: of the losses of the levels beside engagement. head: the width
    of the head's inner layer.
    """

    tokens: Literal["interleaved", "merged", "items"]
    levels: Rising
    others_weight: NotNegative
    head: Count


class Ranking(Task):
    """A causal encoder over actions and items; its states at items say how likely each level of rating is."""

    schedules = ("windows", "one-pass")
    configs = (*Task.configs, RankingConfig)

    def __init__(
        self, settings: dict[str, Any], training: TrainingConfig, num_items: int, protocol: dict[str, Any]
    ) -> None:
        config = read(RankingConfig, settings, "model.", others=True)
        levels = sorted({*config.levels, protocol["positive"]})
        self._per_item = 2 if config.tokens == "interleaved" else 1
        super().__init__(settings, replace(training, max_len=self._per_item * training.max_len), num_items)
        self.config, self.positive = config, levels.index(protocol["positive"])
        self.actions = nn.Embedding(len(levels) + 1, self.dim) if config.tokens != "items" else None
        if self.actions is not None:
            nn.init.trunc_normal_(self.actions.weight, std=0.02, a=-0.04, b=0.04)
        self.head = nn.Sequential(
            nn.LayerNorm(self.dim),
            nn.Linear(self.dim, config.head),
            nn.SiLU(),
            nn.Linear(config.head, len(levels)),
        )
        self.levels: torch.Tensor
        self.register_buffer("levels", torch.tensor(levels), persistent=False)

    def prepare(self, sequences: Sequences, num_held_out: torch.Tensor) -> None:
        """Raises StepError if an interaction has no rating."""
        require_ratings(sequences)

    def logits(self, batch: Batch) -> torch.Tensor:
        """(T, levels) float32: of each token's next item, whether its rating will reach each level."""
        before = self.before(batch.item, batch.rating, batch.position == 0)
        item = embedding_lookup(self.items, batch.next_item)
        if self._per_item == 1:
            embeddings, sequence = item + before, _merged(batch)
        else:
            embeddings = torch.stack([before, item], dim=1).flatten(0, 1)
            sequence = _interleaved(batch)
        states: torch.Tensor = self.encoder(embeddings, sequence)
        logits: torch.Tensor = self.head(states.view(len(batch.item), self._per_item, -1)[:, -1])
        return logits

    def before(self, item: torch.Tensor, rating: torch.Tensor, is_first: torch.Tensor) -> torch.Tensor:
        """What stands before the next item (T, d): the action on each item, and the first item of a window itself.

        item: (T,) int64; rating: (T,); is_first: (T,) bool.
        """
        found = torch.where(is_first[:, None], embedding_lookup(self.items, item), 0)
        if self.actions is None:
            return found
        return found + embedding_lookup(self.actions, torch.bucketize(rating, self.levels, right=True))

    def loss(self, batch: Batch) -> torch.Tensor:
        """The mean cross entropy of engagement, and by `others_weight` that of the other levels."""
        logits = self.logits(batch)
        reached = (batch.next_rating[:, None] >= self.levels).to(logits.dtype)
        terms = F.binary_cross_entropy_with_logits(logits, reached, reduction="none")
        engaged, others = terms[:, self.positive], terms.sum(1) - terms[:, self.positive]
        if len(self.levels) > 1:
            engaged = engaged + self.config.others_weight * others / (len(self.levels) - 1)
        return masked_mean(engaged, batch.token_mask)

    def predict(self, batch: Batch) -> torch.Tensor:
        """Logits (T,) of engagement with each token's next item."""
        return self.logits(batch)[:, self.positive]


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
