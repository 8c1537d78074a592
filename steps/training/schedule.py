"""What an epoch goes over, in which order and in which steps.

A schedule cuts an epoch into static steps: of each the host knows the shape beforehand, so that a CUDA graph can hold
it. It depends on the data alone, on no model.
"""

import heapq
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch

from kernels.jagged import offsets_from_lengths
from kernels.jagged.naive import sequence_and_position
from steps.common.cli import StepError
from steps.common.config import TrainingConfig
from steps.common.typed import EntryError
from steps.data.sequences import Events, Sequences, StaticShape
from steps.data.stochastic_length import draw_lengths

#: Buckets of tokens in the largest batch. On ML-1M all batches of 101 epochs then have one of ten sizes, with 3.8 %
#: padding.
_BUCKETS = 24
#: A bucket is no larger than so many standard deviations of a batch's tokens. Where max_len is many times the mean
#: window, a 24th of the largest batch is half of a usual one: padding that takes longer than what it is to save.
_SPREAD = 1.5
_BUCKET_MULTIPLE = 256  # a whole number of every kernel's blocks
#: Events in one CUDA graph: the kernels of one event take less time than the host needs to launch a graph.
_EVENTS_PER_GRAPH = 16


class Step(NamedTuple):
    """A static step: its shape, and its inputs, an int64 tensor on the device."""

    shape: Hashable
    inputs: torch.Tensor


class Schedule(ABC):
    """The steps of an epoch over windows of the sequences."""

    def __init__(self, sequences: Sequences, num_held_out: torch.Tensor, config: TrainingConfig) -> None:
        """num_held_out (U,): how many of each user's last interactions are not trained on.

        Raises StepError if there is nothing to train on.
        """
        self.sequences, self.config = sequences, config
        users = sequences.trainable_users(num_held_out)
        if not len(users):
            raise StepError("no user has two interactions besides those held out: nothing to train on")
        #: (2, W): the user of every window, and how many of the user's last interactions come after it.
        self.windows = self._windows(users, num_held_out)
        #: (W,), on the host: the tokens of every window.
        self.lengths = sequences.window_lengths(self.windows[0], self.windows[1], config.max_len).cpu()

    def epoch(self) -> list[Step]:
        """The steps of an epoch, over the windows in an order that torch's default generator draws."""
        return self.steps(torch.randperm(len(self.lengths)))

    def _windows(self, users: torch.Tensor, num_held_out: torch.Tensor) -> torch.Tensor:
        """Each user's latest window, which is all that the authors train on."""
        return torch.stack([users, num_held_out[users]])

    @property
    @abstractmethod
    def num_updates(self) -> int:
        """About how many updates of the weights an epoch has."""

    @property
    def compiles(self) -> bool:
        """Whether torch.compile is to fuse what makes a batch: many small operations, none of which draws."""
        return False

    @abstractmethod
    def steps(self, order: torch.Tensor) -> list[Step]:
        """The steps over the windows `order`, indices on the host."""

    def micro_steps(self, inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        """The inputs of the updates that a step consists of, in order; mostly it is one."""
        return [inputs]

    @abstractmethod
    def batch(self, shape: Any, inputs: torch.Tensor) -> Any:
        """The batch of an update, which a task's `loss` takes, without waiting for the device."""


class Windows(Schedule):
    """Each user's latest window once, in random order, `batch` windows a step.

    A batch is padded to a multiple of `bucket` tokens, by padding sequences behind the windows. inputs: (2, B), columns
    of `windows`; with Stochastic Length (3, B), below them how many tokens are read.
    """

    def __init__(self, sequences: Sequences, num_held_out: torch.Tensor, config: TrainingConfig) -> None:
        super().__init__(sequences, num_held_out, config)
        self.bucket = bucket_size(config.batch, config.max_len, self.lengths)

    @property
    def num_updates(self) -> int:
        return -(-len(self.lengths) // self.config.batch)

    @property
    def compiles(self) -> bool:
        return self.config.stochastic_length is None

    def steps(self, order: torch.Tensor) -> list[Step]:
        found = []
        windows, read = self.windows[:, order.to(self.windows.device)], self.lengths[order]
        sampled = self.config.stochastic_length
        if sampled:
            read = draw_lengths(read, self.config.max_len, sampled.alpha)
            windows = torch.cat([windows, read.to(windows.device)[None]])
        batches = windows.split(self.config.batch, dim=1), read.split(self.config.batch)
        for inputs, lengths in zip(*batches, strict=True):
            found.append(Step(static_shape(lengths, self.bucket, self.config.max_len), inputs))
        return found

    def batch(self, shape: StaticShape, inputs: torch.Tensor) -> Any:
        sampled = self.config.stochastic_length
        if not sampled:
            return self.sequences.padded_batch(inputs[0], inputs[1], shape)
        return self.sequences.padded_batch(inputs[0], inputs[1], shape, inputs[2], sampled.rule)


class _InOrder(Schedule):
    """Every interaction but each user's first is predicted once, in the order of time, as a stream is trained on.

    A user's interactions are cut into windows of at most `max_len` targets, from the last one backwards. No window sees
    those before it. They come in the order of the times at which they end.
    """

    def _windows(self, users: torch.Tensor, num_held_out: torch.Tensor) -> torch.Tensor:
        targets = (self.sequences.offsets.diff() - num_held_out)[users] - 1
        counts = -(-targets // self.config.max_len)
        index, number = sequence_and_position(offsets_from_lengths(counts), int(counts.sum()))
        user = users[index]
        num_after = num_held_out[user] + number * self.config.max_len
        ends = self.sequences.timestamp[self.sequences.offsets[user + 1] - 1 - num_after]
        return torch.stack([user, num_after])[:, ends.argsort(stable=True)]

    def epoch(self) -> list[Step]:
        return self.steps(torch.arange(len(self.lengths)))


class OnePass(_InOrder, Windows):
    """The windows of one pass, `batch` a step."""


class Sessions(Schedule):
    """Each user's latest window, event by event, in `batch` parallel lanes (arXiv 1511.06939).

    Each lane holds one window; when it ends, the lane takes the next one. A step is `_EVENTS_PER_GRAPH` events, each an
    update. inputs: (events, 3, lanes), item, next item, and whether the window begins there; in a lane for which no
    window is left both items are 0.
    """

    @property
    def num_updates(self) -> int:
        return int(self.lengths.sum()) // self.config.batch

    def steps(self, order: torch.Tensor) -> list[Step]:
        lengths, num_lanes = self.lengths[order], min(self.config.batch, len(order))
        free = [(0, lane) for lane in range(num_lanes)]  # a heap of (first event at which the lane is free, lane)
        starts = []
        for length in lengths.tolist():
            event, lane = free[0]
            starts.append((event, lane))
            heapq.heapreplace(free, (event + length, lane))
        event, lane = torch.tensor(starts).T
        window, position = sequence_and_position(offsets_from_lengths(lengths), int(lengths.sum()))
        device = self.windows.device
        user, num_after = self.windows[:, order.to(device)][:, window.to(device)]
        first = self.sequences.offsets[user + 1] - num_after - lengths[window].to(device) - 1
        index = first + position.to(device)
        events = torch.zeros(max(free)[0], 3, num_lanes, dtype=torch.int64, device=device)
        events[:, 2] = 1
        inputs = [self.sequences.item[index], self.sequences.item[index + 1], (position == 0).long().to(device)]
        events[(event[window] + position).to(device), :, lane[window].to(device)] = torch.stack(inputs, dim=1)
        return [Step(num_lanes, group) for group in events.split(_EVENTS_PER_GRAPH)]

    def micro_steps(self, inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        return inputs.unbind()

    def batch(self, shape: Any, inputs: torch.Tensor) -> Events:
        item, next_item, is_first = inputs
        return Events(item, next_item, is_first, self.config.batch)


class OnePassSessions(_InOrder, Sessions):
    """The windows of one pass, event by event."""


_SCHEDULES: dict[str, type[Schedule]] = {"windows": Windows, "sessions": Sessions}
_ONE_PASS: dict[str, type[Schedule]] = {"windows": OnePass, "sessions": OnePassSessions}


def make_schedule(
    schedules: Sequence[str], config: TrainingConfig, sequences: Sequences, num_held_out: torch.Tensor
) -> Schedule:
    """The schedule that `config` names, of those that the task can be trained on; without a name the first of these.

    Raises EntryError if the task cannot be trained on it, and StepError if there is nothing to train on.
    """
    name = config.schedule or schedules[0]
    if name not in schedules:
        raise EntryError(
            f"key training.schedule: {name!r} does not fit: the model is trained on {', '.join(schedules)}"
        )
    kind = _ONE_PASS[schedules[0]] if name == "one-pass" else _SCHEDULES[name]
    if config.stochastic_length and issubclass(kind, Sessions):
        raise EntryError("key training.stochastic_length: does not fit: event by event, windows are read whole")
    return kind(sequences, num_held_out, config)


def static_shape(lengths: torch.Tensor, bucket: int, max_len: int) -> StaticShape:
    """The shape of a batch of windows of `lengths` (B,), padded to a multiple of `bucket` tokens."""
    tokens = -(-int(lengths.sum()) // bucket) * bucket
    return StaticShape(len(lengths), tokens, len(lengths) + -(-bucket // max_len), max_len)


def bucket_size(batch_size: int, max_len: int, lengths: torch.Tensor) -> int:
    """Batches of windows of `lengths` (W,) are padded to a multiple of so many tokens."""
    largest = batch_size * max_len / _BUCKETS
    spread = _SPREAD * float(lengths.double().std(correction=0)) * batch_size**0.5
    return max(1, round(min(largest, spread) / _BUCKET_MULTIPLE)) * _BUCKET_MULTIPLE
