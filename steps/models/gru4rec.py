"""GRU4Rec (arXiv 1511.06939, 1706.03847) as its author's own PyTorch version trains it; arXiv 2307.14956 says why.

What third-party versions miss, and this keeps: session-parallel mini-batches with a step of the optimiser
per event; negatives shared by the mini-batch (the other lanes' targets and `samples` items drawn by
popularity^alpha); cross-entropy with the logQ correction; item vectors shared by input and output; Adagrad.
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
from steps.models.base import SequenceModel, look_up

_ADAGRAD_EPS = 1e-6
_IGNORED = -100
#: Events that one CUDA graph holds: an event's kernels are shorter than what the host needs to launch a graph.
_EVENTS = 16


@dataclass(frozen=True)
class Lanes:
    """The shape of every static step: so many parallel users, and the batch their losses are divided by."""

    count: int
    batch: int


class _Carried:
    """What static steps find on the device besides their own tensor: the lanes' state, and what samples come from.

    state: (lanes, d), written by every step. popularity: (V + 1,) counts. cumulative: (V + 1,) float64, the running
    sum of popularity^alpha.
    """

    def __init__(self, model: "GRU4Rec", sequences: Sequences, drop: torch.Tensor, lanes: int) -> None:
        weight, counts = model.items.weight, sequences.counts(drop)
        self.state = weight.new_zeros(lanes, model.dim)
        self.popularity = counts.to(weight.dtype)
        # On the host, where a running sum of floats is the same from run to run.
        self.cumulative = (counts.cpu().double() ** model.sample_alpha).cumsum(0).to(weight.device)


class GRU4Rec(SequenceModel):
    """One GRU layer over item vectors; an item's score is state . vector + bias."""

    takes_low_precision = False  # its steps are too small for it to pay

    def __init__(self, config: dict[str, Any], training: dict[str, Any], num_items: int) -> None:
        super().__init__(config, training, num_items)
        self.samples: int = config["samples"]
        self.sample_alpha: float = config["sample_alpha"]
        self.logq: float = config["logq"]
        self.gru = nn.GRU(self.dim, self.dim, batch_first=True)
        self.bias = nn.Parameter(torch.zeros(num_items + 1))
        self.hidden_dropout = nn.Dropout(training["dropout"])
        self._carried: _Carried | None = None
        self._compiled_event: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None
        bound = (6 / (2 * self.dim)) ** 0.5  # Glorot, per gate
        for name, parameter in self.gru.named_parameters():
            if name.startswith("weight"):
                nn.init.uniform_(parameter, -bound, bound)
            else:
                nn.init.zeros_(parameter)
        bound = (6 / (num_items + self.dim)) ** 0.5
        nn.init.uniform_(self.items.weight, -bound, bound)

    def states(self, vectors: torch.Tensor, batch: Batch) -> torch.Tensor:
        states, _ = self.gru(batch.to_padded(vectors))
        return batch.to_jagged(states)

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

    def static_steps(
        self, lengths: torch.Tensor, order: torch.Tensor, max_len: int, batch_size: int, bucket: int
    ) -> list[tuple[Any, torch.Tensor]]:
        """The same events, some at a time, each a (3, lanes) tensor: user or -1, place in the window, its tokens.

        As the lanes run out of users they stay empty.
        """
        lengths, lanes = lengths[order], min(batch_size, len(order))
        free = [(0, lane) for lane in range(lanes)]  # a heap of (first event, lane)
        taken = []
        for length in lengths.tolist():
            event, lane = free[0]
            taken.append((event, lane))
            heapq.heapreplace(free, (event + length, lane))
        event, lane = torch.tensor(taken).T
        row, place = sequence_and_position(offsets_from_lengths(lengths), int(lengths.sum()))
        table = torch.zeros(max(free)[0], 3, lanes, dtype=torch.int64)
        table[:, 0] = -1
        table[event[row] + place, :, lane[row]] = torch.stack([order[row], place, lengths[row]], dim=1)
        layout = Lanes(lanes, batch_size)
        return [(layout, given) for given in table.to(self.items.weight.device).split(_EVENTS)]

    def parts(self, layout: Any, given: torch.Tensor) -> Sequence[torch.Tensor]:
        return given.unbind()

    def static_loss(self, sequences: Sequences, drop: torch.Tensor, layout: Any, given: torch.Tensor) -> torch.Tensor:
        if self._carried is None or len(self._carried.state) != layout.count:
            self._carried = _Carried(self, sequences, drop, layout.count)
        carried = self._carried
        share = torch.rand(self.samples, dtype=torch.float64, device=given.device)
        event = self._compiled_event or self._static_event
        loss, state = event(given, share, carried, sequences, drop, self.gru.all_weights[0])
        carried.state.copy_(state)
        return loss / layout.batch

    def optimizer(self) -> torch.optim.Optimizer:
        """Adagrad that divides by sqrt(sum of squares + 1e-6), as the author's; on CUDA one that a graph can hold."""
        options = {"lr": self.optimizer_config["lr"], "initial_accumulator_value": _ADAGRAD_EPS, "eps": 0.0}
        kind = Adagrad if self.items.weight.is_cuda else torch.optim.Adagrad
        return kind(self.parameters(), **options)

    def compile_blocks(self) -> None:
        self._compiled_event = torch.compile(self._static_event)

    def uncompile_blocks(self) -> None:
        self._compiled_event = None

    @contextmanager
    def frozen(self) -> Iterator[None]:
        before = self._carried.state.clone() if self._carried else None
        try:
            with super().frozen():
                yield
        finally:
            if self._carried and before is not None:
                self._carried.state.copy_(before)

    def _static_event(
        self,
        given: torch.Tensor,
        share: torch.Tensor,
        carried: _Carried,
        sequences: Sequences,
        drop: torch.Tensor,
        gru: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of the lanes' losses at one event, and their new state; share (samples,) from 0 to 1."""
        user, place, length = given
        busy = user >= 0
        index = torch.where(busy, sequences.offsets[user + 1] - drop[user] - length - 1 + place, 0)
        state = torch.where((place > 0)[:, None], carried.state, 0.0)
        hidden = self.hidden_dropout(gru_cell(look_up(self.items, sequences.item[index]), state, *gru))
        drawn = torch.searchsorted(carried.cumulative, share * carried.cumulative[-1], right=True)
        drawn = drawn.clamp(max=self.num_items)
        logits = self._logits(hidden, sequences.item[index + 1], drawn, carried.popularity)
        logits = logits.masked_fill(F.pad(~busy, (0, self.samples)), -torch.inf)  # an empty lane has no target
        own = torch.where(busy, torch.arange(len(user), device=user.device), _IGNORED)
        return F.cross_entropy(logits, own, ignore_index=_IGNORED, reduction="sum"), hidden.detach()

    def _event(
        self, batch: Batch, place: torch.Tensor, state: torch.Tensor, popularity: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (lanes, lanes + samples) of one event, whose diagonal is the targets; and the new state."""
        _, hidden = self.gru(self.items(batch.item[place])[:, None], state[None].clone())
        hidden = self.hidden_dropout(hidden[0])
        targets = batch.next_item[place]
        drawn = torch.multinomial(popularity**self.sample_alpha, self.samples, replacement=True)
        return self._logits(hidden, targets, drawn, popularity), hidden.detach()

    def _logits(
        self, hidden: torch.Tensor, targets: torch.Tensor, drawn: torch.Tensor, popularity: torch.Tensor
    ) -> torch.Tensor:
        """Logits (lanes, lanes + samples) of the lanes' targets and the shared samples, after the logQ correction."""
        candidates = torch.cat([targets, drawn])
        logits = hidden @ look_up(self.items, candidates).T + self.bias.index_select(0, candidates)
        rate = torch.cat([popularity[targets], popularity[drawn] ** self.sample_alpha])
        return logits - self.logq * rate.log()

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
