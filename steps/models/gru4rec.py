"""GRU4Rec (arXiv 1511.06939, 1706.03847) as its author's own PyTorch version trains it; arXiv 2307.14956 says why.

What third-party versions lack, and this one has: session-parallel mini-batches with a step of the optimiser per event;
negatives shared by the mini-batch (the other lanes' targets, and `samples` items drawn by popularity^alpha);
cross-entropy with the logQ correction; item embeddings shared by input and output; Adagrad.

A mini-batch has a number of lanes. Each lane holds one user's window; when it ends, the lane takes the next user's.
"""

import heapq
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from kernels.jagged import offsets_from_lengths
from kernels.jagged.naive import sequence_and_position
from steps.data.sequences import Batch, Sequences
from steps.models.adagrad import Adagrad
from steps.models.base import SequenceModel, embedding_lookup

_ADAGRAD_EPS = 1e-6
_IGNORE_INDEX = -100
#: Events in one CUDA graph: the kernels of one event take less time than the host needs to launch a graph.
_EVENTS_PER_GRAPH = 16


@dataclass(frozen=True)
class LanesShape:
    """The static shape of every step: the number of lanes, and the batch size that the sum of losses is divided by."""

    num_lanes: int
    batch_size: int


class _StaticState:
    """What static steps keep on the device: the lanes' hidden states, and the popularity that samples are drawn by.

    state: (lanes, d), written by every step. popularity: (V + 1,) counts. cumulative: (V + 1,) float64, the cumulative
    sum of popularity^alpha.
    """

    def __init__(self, model: "GRU4Rec", sequences: Sequences, num_held_out: torch.Tensor, num_lanes: int) -> None:
        weight, counts = model.items.weight, sequences.counts(num_held_out)
        self.state = weight.new_zeros(num_lanes, model.dim)
        self.popularity = counts.to(weight.dtype)
        # On the host, as on a GPU a cumulative sum of floats may differ from run to run.
        self.cumulative = (counts.cpu().double() ** model.sample_alpha).cumsum(0).to(weight.device)


class GRU4Rec(SequenceModel):
    """One GRU layer over item embeddings; an item's score is state . embedding + bias."""

    supports_low_precision = False  # its steps are too small to gain from it

    def __init__(self, config: dict[str, Any], training: dict[str, Any], num_items: int) -> None:
        super().__init__(config, training, num_items)
        self.samples: int = config["samples"]
        self.sample_alpha: float = config["sample_alpha"]
        self.logq: float = config["logq"]
        self.gru = nn.GRU(self.dim, self.dim, batch_first=True)
        self.bias = nn.Parameter(torch.zeros(num_items + 1))
        self.hidden_dropout = nn.Dropout(training["dropout"])
        self._static_state: _StaticState | None = None
        self._compiled_event: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None
        bound = (6 / (2 * self.dim)) ** 0.5  # Glorot, per gate
        for name, parameter in self.gru.named_parameters():
            if name.startswith("weight"):
                nn.init.uniform_(parameter, -bound, bound)
            else:
                nn.init.zeros_(parameter)
        bound = (6 / (num_items + self.dim)) ** 0.5
        nn.init.uniform_(self.items.weight, -bound, bound)

    def states(self, embeddings: torch.Tensor, batch: Batch) -> torch.Tensor:
        states, _ = self.gru(batch.to_padded(embeddings))
        return batch.to_jagged(states)

    def score(self, batch: Batch) -> torch.Tensor:
        return self.encode(batch)[batch.last] @ self.items.weight.T + self.bias

    def losses(
        self, sequences: Sequences, order: torch.Tensor, num_held_out: torch.Tensor, max_len: int, batch_size: int
    ) -> Iterator[torch.Tensor]:
        """One loss per event of `batch_size` lanes. The hidden state passes from event to event, without gradients."""
        batch = sequences.batch(order, num_held_out[order], max_len)
        popularity = sequences.counts(num_held_out).to(self.items.weight.dtype)
        for token, state in self._lanes(batch, batch_size):
            logits, new_state = self._event(batch, token, state, popularity)
            state.copy_(new_state)
            target = torch.arange(len(token), device=token.device)
            yield F.cross_entropy(logits, target, reduction="sum") / batch_size

    def num_steps(self, users: int, batch_size: int) -> int | None:
        return None

    def static_steps(
        self, lengths: torch.Tensor, order: torch.Tensor, max_len: int, batch_size: int, bucket: int
    ) -> list[tuple[Any, torch.Tensor]]:
        """The same events, `_EVENTS_PER_GRAPH` at a time, each as inputs (3, lanes): user, position, window length.

        The user of a lane is -1 where no users are left for it.
        """
        lengths, num_lanes = lengths[order], min(batch_size, len(order))
        free = [(0, lane) for lane in range(num_lanes)]  # a heap of (first event at which the lane is free, lane)
        starts = []
        for length in lengths.tolist():
            event, lane = free[0]
            starts.append((event, lane))
            heapq.heapreplace(free, (event + length, lane))
        event, lane = torch.tensor(starts).T
        window, position = sequence_and_position(offsets_from_lengths(lengths), int(lengths.sum()))
        events = torch.zeros(max(free)[0], 3, num_lanes, dtype=torch.int64)
        events[:, 0] = -1
        inputs = torch.stack([order[window], position, lengths[window]], dim=1)
        events[event[window] + position, :, lane[window]] = inputs
        shape = LanesShape(num_lanes, batch_size)
        return [(shape, group) for group in events.to(self.items.weight.device).split(_EVENTS_PER_GRAPH)]

    def micro_steps(self, shape: Any, inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        return inputs.unbind()

    def static_loss(
        self, sequences: Sequences, num_held_out: torch.Tensor, shape: Any, inputs: torch.Tensor
    ) -> torch.Tensor:
        if self._static_state is None or len(self._static_state.state) != shape.num_lanes:
            self._static_state = _StaticState(self, sequences, num_held_out, shape.num_lanes)
        static_state = self._static_state
        uniform = torch.rand(self.samples, dtype=torch.float64, device=inputs.device)
        event = self._compiled_event or self._static_event
        loss, state = event(inputs, uniform, static_state, sequences, num_held_out, self.gru.all_weights[0])
        static_state.state.copy_(state)
        return loss / shape.batch_size

    def optimizer(self) -> torch.optim.Optimizer:
        """Adagrad that divides by sqrt(sum of squares + 1e-6), as the author's; on CUDA one for CUDA graphs."""
        options = {"lr": self.optimizer_config["lr"], "initial_accumulator_value": _ADAGRAD_EPS, "eps": 0.0}
        kind = Adagrad if self.items.weight.is_cuda else torch.optim.Adagrad
        return kind(self.parameters(), **options)

    def compile_blocks(self) -> None:
        self._compiled_event = torch.compile(self._static_event)

    def uncompile_blocks(self) -> None:
        self._compiled_event = None

    @contextmanager
    def frozen(self) -> Iterator[None]:
        before = self._static_state.state.clone() if self._static_state else None
        try:
            with super().frozen():
                yield
        finally:
            if self._static_state and before is not None:
                self._static_state.state.copy_(before)

    def _static_event(
        self,
        inputs: torch.Tensor,
        uniform: torch.Tensor,
        static_state: _StaticState,
        sequences: Sequences,
        num_held_out: torch.Tensor,
        gru: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of the lanes' losses at one event, and their new states.

        inputs: (3, lanes), as `static_steps` makes them. uniform: (samples,) random numbers from 0 to 1.
        """
        user, position, length = inputs
        active = user >= 0
        index = torch.where(active, sequences.offsets[user + 1] - num_held_out[user] - length - 1 + position, 0)
        state = torch.where((position > 0)[:, None], static_state.state, 0.0)
        hidden = self.hidden_dropout(gru_cell(embedding_lookup(self.items, sequences.item[index]), state, *gru))
        sampled = torch.searchsorted(static_state.cumulative, uniform * static_state.cumulative[-1], right=True)
        sampled = sampled.clamp(max=self.num_items)
        logits = self._logits(hidden, sequences.item[index + 1], sampled, static_state.popularity)
        logits = logits.masked_fill(F.pad(~active, (0, self.samples)), -torch.inf)  # an empty lane has no target
        target = torch.where(active, torch.arange(len(user), device=user.device), _IGNORE_INDEX)
        return F.cross_entropy(logits, target, ignore_index=_IGNORE_INDEX, reduction="sum"), hidden.detach()

    def _event(
        self, batch: Batch, token: torch.Tensor, state: torch.Tensor, popularity: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (lanes, lanes + samples) of one event, with the targets on the diagonal; and the new states.

        token: (lanes,), indices into the batch. state: (lanes, d).
        """
        _, hidden = self.gru(self.items(batch.item[token])[:, None], state[None].clone())
        hidden = self.hidden_dropout(hidden[0])
        targets = batch.next_item[token]
        sampled = torch.multinomial(popularity**self.sample_alpha, self.samples, replacement=True)
        return self._logits(hidden, targets, sampled, popularity), hidden.detach()

    def _logits(
        self, hidden: torch.Tensor, targets: torch.Tensor, sampled: torch.Tensor, popularity: torch.Tensor
    ) -> torch.Tensor:
        """Logits (lanes, lanes + samples) of the lanes' targets and the shared samples, after the logQ correction."""
        candidates = torch.cat([targets, sampled])
        logits = hidden @ embedding_lookup(self.items, candidates).T + self.bias.index_select(0, candidates)
        weight = torch.cat([popularity[targets], popularity[sampled] ** self.sample_alpha])
        return logits - self.logq * weight.log()

    def _lanes(self, batch: Batch, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields for each event the index (lanes,) of each lane's token, and the lanes' states (lanes, d).

        States are zero where a window begins. The caller writes the new states into the tensor.
        """
        starts, ends = batch.offsets[:-1].tolist(), batch.offsets[1:].tolist()
        num_lanes = min(batch_size, len(starts))
        token, end, next_window = starts[:num_lanes], ends[:num_lanes], num_lanes
        state = self.items.weight.new_zeros(num_lanes, self.dim)
        while token:
            events = min(last - now for now, last in zip(token, end, strict=True))
            first = torch.tensor(token, device=batch.item.device)
            for event in range(events):
                yield first + event, state
            kept = []
            for lane in range(len(token)):
                token[lane] += events
                if token[lane] == end[lane]:
                    if next_window == len(starts):
                        continue
                    token[lane], end[lane] = starts[next_window], ends[next_window]
                    next_window += 1
                    state[lane] = 0
                kept.append(lane)
            if len(kept) < len(token):
                token, end = [token[lane] for lane in kept], [end[lane] for lane in kept]
                state = state[kept]


def gru_cell(
    x: torch.Tensor,
    state: torch.Tensor,
    weight_x: torch.Tensor,
    weight_state: torch.Tensor,
    bias_x: torch.Tensor,
    bias_state: torch.Tensor,
) -> torch.Tensor:
    """torch.gru_cell on (lanes, d), in operations that torch.compile can fuse."""
    reset_x, update_x, new_x = F.linear(x, weight_x, bias_x).chunk(3, dim=1)
    reset_state, update_state, new_state = F.linear(state, weight_state, bias_state).chunk(3, dim=1)
    update = torch.sigmoid(update_x + update_state)
    new = torch.tanh(new_x + torch.sigmoid(reset_x + reset_state) * new_state)
    return (1 - update) * new + update * state
