"""GRU4Rec (arXiv 1511.06939, 1706.03847) as its author's own PyTorch version trains it; arXiv 2307.14956 says why.

What third-party versions miss, and this keeps: session-parallel mini-batches with a step of the optimiser
per event; negatives shared by the mini-batch (the other lanes' targets and `samples` items drawn by
popularity^alpha); cross-entropy with the logQ correction; item vectors shared by input and output; Adagrad.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from kernels import jagged
from steps.data.sequences import Batch, Sequences
from steps.models.base import SequenceModel

_ADAGRAD_EPS = 1e-6


class GRU4Rec(SequenceModel):
    """One GRU layer over item vectors; an item's score is state . vector + bias."""

    def __init__(self, config: dict[str, Any], training: dict[str, Any], num_items: int) -> None:
        super().__init__(config, training, num_items)
        self.samples: int = config["samples"]
        self.sample_alpha: float = config["sample_alpha"]
        self.logq: float = config["logq"]
        self.gru = nn.GRU(self.dim, self.dim, batch_first=True)
        self.bias = nn.Parameter(torch.zeros(num_items + 1))
        self.hidden_dropout = nn.Dropout(training["dropout"])
        bound = (6 / (2 * self.dim)) ** 0.5  # Glorot, per gate
        for name, parameter in self.gru.named_parameters():
            if name.startswith("weight"):
                nn.init.uniform_(parameter, -bound, bound)
            else:
                nn.init.zeros_(parameter)
        bound = (6 / (num_items + self.dim)) ** 0.5
        nn.init.uniform_(self.items.weight, -bound, bound)

    def encode(self, batch: Batch) -> torch.Tensor:
        states, _ = self.gru(jagged.to_padded(self.items(batch.item), batch.offsets, batch.max_len))
        return jagged.to_jagged(states, batch.offsets)

    def score(self, batch: Batch) -> torch.Tensor:
        return self.encode(batch)[batch.last] @ self.items.weight.T + self.bias

    def losses(
        self, sequences: Sequences, order: torch.Tensor, drop: torch.Tensor, max_len: int, batch_size: int
    ) -> Iterator[torch.Tensor]:
        """One loss per event of `batch_size` parallel users: when one's window ends, the next user takes the lane.

        The state is carried from event to event, without gradients through it.
        """
        batch = sequences.batch(order, drop[order], max_len)
        popularity = sequences.counts(drop).to(self.items.weight.dtype)
        for place, state in self._lanes(batch, batch_size):
            logits, carried = self._event(batch, place, state, popularity)
            state.copy_(carried)
            target = torch.arange(len(place), device=place.device)
            yield F.cross_entropy(logits, target, reduction="sum") / batch_size

    def steps(self, users: int, batch_size: int) -> int | None:
        return None

    def optimizer(self) -> torch.optim.Optimizer:
        """Adagrad that divides by sqrt(sum of squares + 1e-6), as the author's."""
        options = {"lr": self.optimizer_config["lr"], "initial_accumulator_value": _ADAGRAD_EPS, "eps": 0.0}
        return torch.optim.Adagrad(self.parameters(), **options)

    def _event(
        self, batch: Batch, place: torch.Tensor, state: torch.Tensor, popularity: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (lanes, lanes + samples) of one event, whose diagonal is the targets; and the new state."""
        _, hidden = self.gru(self.items(batch.item[place])[:, None], state[None].clone())
        hidden = self.hidden_dropout(hidden[0])
        targets = batch.next_item[place]
        drawn = torch.multinomial(popularity**self.sample_alpha, self.samples, replacement=True)
        candidates = torch.cat([targets, drawn])
        logits = hidden @ self.items(candidates).T + self.bias[candidates]
        rate = torch.cat([popularity[targets], popularity[drawn] ** self.sample_alpha])
        return logits - self.logq * rate.log(), hidden.detach()

    def _lanes(self, batch: Batch, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Places (lanes,) of the tokens of each event, and the lanes' state (lanes, d), zero where a window begins.

        The consumer writes the new state into it.
        """
        starts, ends = batch.offsets[:-1].tolist(), batch.offsets[1:].tolist()
        lanes = min(batch_size, len(starts))
        place, end, following = starts[:lanes], ends[:lanes], lanes
        state = self.items.weight.new_zeros(lanes, self.dim)
        while place:
            events = min(last - now for now, last in zip(place, end, strict=True))
            first = torch.tensor(place, device=batch.item.device)
            for event in range(events):
                yield first + event, state
            kept = []
            for lane in range(len(place)):
                place[lane] += events
                if place[lane] == end[lane]:
                    if following == len(starts):
                        continue
                    place[lane], end[lane] = starts[following], ends[following]
                    following += 1
                    state[lane] = 0
                kept.append(lane)
            if len(kept) < len(place):
                place, end = [place[lane] for lane in kept], [end[lane] for lane in kept]
                state = state[kept]
