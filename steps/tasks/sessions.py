"""Retrieval learned event by event, as GRU4Rec's author trains it (arXiv 1706.03847; arXiv 2307.14956 says why).

What third-party versions lack, and this one has: session-parallel mini-batches with a step of the optimiser per event;
negatives shared by the mini-batch (the other lanes' targets, and `samples` items drawn by popularity^alpha);
cross-entropy with the logQ correction; item embeddings shared by input and output; Adagrad.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from steps.common.config import TrainingConfig
from steps.common.typed import Count, EntryError, NotNegative, Share, read
from steps.data.sequences import Batch, Events, Sequences
from steps.models.base import Recommender, embedding_lookups
from steps.models.gru4rec import GRU4Rec, gru_cell
from steps.tasks.base import Task
from steps.tasks.losses import WithLoss, read_cross_entropy

_IGNORE_INDEX = -100


@dataclass(frozen=True)
class _SamplesConfig:
    samples: Count
    sample_alpha: Share
    logq: NotNegative


class Sessions(Task, Recommender):
    """A recurrent encoder whose states pass from event to event; an item's score is state . embedding + bias."""

    schedules = ("sessions", "one-pass")
    optimizer = "adagrad"
    configs = (*Task.configs, WithLoss, _SamplesConfig)
    encoder: GRU4Rec

    def __init__(self, settings: dict[str, Any], training: TrainingConfig, num_items: int) -> None:
        super().__init__(settings, training, num_items)
        read_cross_entropy(settings)
        if (self.optimizer_config.betas, self.optimizer_config.weight_decay) != ([0.0, 0.0], 0.0):
            raise EntryError("key model.optimizer: Adagrad has betas 0 and no weight decay")
        self.config = read(_SamplesConfig, settings, "model.", others=True)
        self.bias = nn.Parameter(torch.zeros(num_items + 1))
        bound = (6 / (num_items + self.dim)) ** 0.5
        nn.init.uniform_(self.items.weight, -bound, bound)
        self._state: torch.Tensor | None = None  # (lanes, d), written by every event
        self._event: Callable[..., torch.Tensor] = self.event

    def prepare(self, sequences: Sequences, num_held_out: torch.Tensor) -> None:
        """Count the training interactions of every item, by which negatives are drawn."""
        weight, counts = self.items.weight, sequences.counts(num_held_out)
        self.popularity = counts.to(weight.dtype)
        # On the host, as on a GPU a cumulative sum of floats may differ from run to run.
        shares = counts.cpu().double() ** self.config.sample_alpha
        shares[0] = 0  # of padding, which has 0^0 = 1 where alpha is 0
        self.cumulative = shares.cumsum(0).to(weight.device)

    def loss(self, batch: Events) -> torch.Tensor:
        """The sum of the lanes' losses at one event, divided by `batch_size`. Changes the lanes' states."""
        if self._state is None or len(self._state) != len(batch.item):
            self._state = self.items.weight.new_zeros(len(batch.item), self.dim)
        uniform = torch.rand(self.config.samples, dtype=torch.float64, device=batch.item.device)
        return self._event(batch, uniform, self._state, self.encoder.weights)

    def score(self, batch: Batch) -> torch.Tensor:
        """Of the last hidden state and every item."""
        return self.encode(batch)[batch.last] @ self.items.weight.T + self.bias

    def event(
        self, events: Events, uniform: torch.Tensor, state: torch.Tensor, weights: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """As `loss`: all that torch.compile can fuse.

        uniform: (samples,) random numbers from 0 to 1. state: (lanes, d), overwritten. weights: the encoder's.
        """
        sampled = torch.searchsorted(self.cumulative, uniform * self.cumulative[-1], right=True)
        sampled = sampled.clamp(max=self.num_items)
        index, lanes = torch.cat([events.item, events.next_item, sampled]), len(events.item)
        candidates = index[lanes:]
        x, vectors = embedding_lookups(self.items, index, [lanes, len(candidates)])
        before = torch.where(events.is_first[:, None] > 0, 0.0, state)
        hidden = self.encoder.hidden_dropout(gru_cell(x, before, *weights))
        state.copy_(hidden.detach())
        logits = self.logits(hidden, candidates, vectors)
        active = candidates[:lanes] > 0
        logits = logits.masked_fill(F.pad(~active, (0, len(uniform))), -torch.inf)  # an empty lane has no target
        target = torch.where(active, torch.arange(len(active), device=active.device), _IGNORE_INDEX)
        loss = F.cross_entropy(logits, target, ignore_index=_IGNORE_INDEX, reduction="sum")
        return loss / events.batch_size

    def logits(self, hidden: torch.Tensor, candidates: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """Logits (lanes, lanes + samples) after the logQ correction.

        hidden: (lanes, d). candidates: (lanes + samples,), the lanes' targets and the shared samples. vectors: (lanes +
        samples, d), theirs.
        """
        targets, sampled = candidates[: len(hidden)], candidates[len(hidden) :]
        logits = hidden @ vectors.T + self.bias.index_select(0, candidates)
        weight = torch.cat([self.popularity[targets], self.popularity[sampled] ** self.config.sample_alpha])
        return logits - self.config.logq * weight.log()

    def compile_blocks(self) -> None:
        self._event = torch.compile(self.event)

    def uncompile_blocks(self) -> None:
        self._event = self.event

    @contextmanager
    def frozen(self) -> Iterator[None]:
        before = None if self._state is None else self._state.clone()
        try:
            with super().frozen():
                yield
        finally:
            if self._state is not None and before is not None:
                self._state.copy_(before)
