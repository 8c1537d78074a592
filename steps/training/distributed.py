"""One run trained by several processes, each with a part of every batch: the steps are those of one process.

The windows of a batch go to the processes by cost, their tokens squared, as attention takes it. Each process computes
the loss and the gradients of its windows, weighted by its share of the batch's tokens. The sums over all processes are
then those of the mean over all tokens of the batch, and each updates its copy of the weights with them.

Gradients are summed here, in one piece, and not by torch's DistributedDataParallel: that takes the mean over the
processes, as though all had equally many tokens, waits for a process that a batch leaves without windows, and hides the
loss in a module's forward pass. What it would win is to send gradients while others are being computed.
"""

import functools
import heapq
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch

from steps.common.cli import StepError
from steps.common.processes import Processes
from steps.data.sequences import Batch, Part
from steps.tasks import Task
from steps.training.execution import Execution, Mode
from steps.training.schedule import Schedule, Step, Windows, bucket_size, static_shape
from steps.training.stream import RunStream

_RANK_STRIDE = 2654435761  # odd, and with its largest bits set in the 32 that torch's generator on a CPU reads


def require_divisible(task: Task, schedule: Schedule) -> Windows:
    """The schedule, of windows; raises StepError if several processes cannot share the task's batches."""
    if not task.divisible or not isinstance(schedule, Windows):
        raise StepError(
            "one process trains this model: its loss is no mean over tokens of which each needs its own window alone; "
            "start it without torchrun"
        )
    return schedule


class PartOfWindows(Schedule):
    """The part of every step of `whole` that one process takes.

    A step's shape is the part's, with the tokens of the whole batch. inputs: those of the whole batch, of this
    process's windows; below them where each window's tokens begin in the whole batch, and how many tokens that has.
    """

    def __init__(self, whole: Windows, processes: Processes) -> None:
        self.whole, self.processes = whole, processes
        self.sequences, self.config = whole.sequences, whole.config
        self.windows, self.lengths = whole.windows, whole.lengths
        self.bucket = bucket_size(-(-self.config.batch // processes.size), self.config.max_len, whole.lengths)
        self.draws = torch.Generator(self.windows.device)
        #: Which windows of a batch each process takes, by their costs.
        self.share_out: Callable[[Sequence[int], int], list[list[int]]] = balanced

    @property
    def num_updates(self) -> int:
        return self.whole.num_updates

    def epoch(self) -> list[Step]:
        return self._parts(self.whole.epoch())

    def steps(self, order: torch.Tensor) -> list[Step]:
        return self._parts(self.whole.steps(order))

    def batch(self, shape: Any, inputs: torch.Tensor) -> Batch:
        static, num_tokens = shape
        batch: Batch = self.whole.batch(static, inputs[:-2])
        place = inputs[-2, batch.sequence_id.clamp(max=static.num_users - 1)] + batch.position
        return replace(batch, part=Part(num_tokens, torch.where(batch.item > 0, place, 0), self.draws))

    def share(self, batch: Batch, inputs: torch.Tensor) -> torch.Tensor:
        """Of all tokens of the whole batch, those of this part: (), float."""
        return (batch.item > 0).sum() / inputs[-1, 0]

    def _parts(self, steps: list[Step]) -> list[Step]:
        of_windows = torch.cat([step.inputs for step in steps], dim=1)
        if self.config.stochastic_length:
            lengths = of_windows[2].cpu()
        else:
            lengths = self.sequences.window_lengths(of_windows[0], of_windows[1], self.config.max_len).cpu()
        found = []
        for step, tokens in zip(steps, lengths.split([step.inputs.shape[1] for step in steps]), strict=True):
            own = torch.tensor(self.share_out((tokens**2).tolist(), self.processes.size)[self.processes.rank])
            own = own.long()  # also where there are none
            places = torch.stack([tokens.cumsum(0) - tokens, tokens.sum().expand_as(tokens)])[:, own]
            device = step.inputs.device
            inputs = torch.cat([step.inputs[:, own.to(device)], places.to(device)])
            shape = static_shape(tokens[own], self.bucket, self.config.max_len)
            whole = static_shape(tokens, self.whole.bucket, self.config.max_len)
            found.append(Step((shape, whole.num_tokens), inputs))
        return found


def balanced(costs: Sequence[int], parts: int) -> list[list[int]]:
    """The windows of each part, by index: the costliest window first, each goes to the part that costs least so far.

    Of equal windows, and of equal parts, the first comes first. No part has more windows than an equal share: so a
    process has batches of one number of windows, for which a CUDA graph serves again.
    """
    found: list[list[int]] = [[] for _ in range(parts)]
    most = -(-len(costs) // parts)
    least = [(0, part) for part in range(parts)]  # a heap, of the parts that take more
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        cost, part = heapq.heappop(least)
        found[part].append(index)
        if len(found[part]) < most:
            heapq.heappush(least, (cost + costs[index], part))
    return [sorted(part) for part in found]


#: What a process does by itself: from a step's inputs, vectors (u, d) of the items and each token's index among them,
#: or None, to the gradient of the vectors, or None.
_Own = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor | None]


class SharedExecution(Execution):
    """Takes this process's part of every step; all processes update their weights by the same sums.

    In mode `graph` what a process does by itself is a CUDA graph for each static shape, and the update is another one.
    Between them is what processes do together, and no graph holds: lookups in a table that they share, and the sums.
    """

    schedule: PartOfWindows

    def __init__(
        self,
        task: Task,
        optimizer: torch.optim.Optimizer,
        schedule: PartOfWindows,
        stream: RunStream,
        processes: Processes,
        mode: Mode,
    ) -> None:
        super().__init__(task, optimizer, schedule, stream, mode)
        self.processes = processes
        parameters = list(task.parameters())
        #: The gradients of all parameters, and at last the loss.
        self._sums = torch.zeros(sum(parameter.numel() for parameter in parameters) + 1, device=stream.device)
        pieces = self._sums[:-1].split([parameter.numel() for parameter in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)  # the backward pass adds to it
        self._captured: dict[Hashable, _Own] = {}
        self._update: Callable[[], Any] | None = None

    def __call__(self, step: Step, seed: int) -> None:
        shape, inputs = step
        own = self._own(shape, inputs)
        self.schedule.draws.manual_seed(seed)
        torch.manual_seed(seed ^ (self.processes.rank + 1) * _RANK_STRIDE)  # dropout differs between processes
        with self.processes.explaining():
            if self.task.is_sharded:
                self._with_lookup(own, shape, inputs)
            else:
                own(inputs, None, None)
        self.processes.sum_(self._sums)
        if self._update is None:
            self._update = self._capture_update() if self.capture else self.optimizer.step
        self._update()
        self.total += self._sums[-1]

    def _with_lookup(self, own: _Own, shape: Hashable, inputs: torch.Tensor) -> None:
        wanted = torch.zeros(0, dtype=torch.int64, device=inputs.device)
        if inputs.shape[1]:
            wanted = self.task.wanted_items(self.schedule.batch(shape, inputs))
        items, inverse = torch.unique(wanted, return_inverse=True)  # no zeros behind them, which one process would get
        vectors = self.task.items(items)
        vectors.backward(own(inputs, vectors.detach(), inverse))

    def _own(self, shape: Hashable, inputs: torch.Tensor) -> _Own:
        """What this process does in a step of this shape."""
        if not inputs.shape[1]:
            return self._idle
        key = (shape, inputs.shape)
        if self.capture and key not in self._captured:
            self._captured[key] = self._capture_own(shape, inputs)
        return self._captured[key] if self.capture else functools.partial(self._eager, shape)

    def _idle(
        self, inputs: torch.Tensor, vectors: torch.Tensor | None, inverse: torch.Tensor | None
    ) -> torch.Tensor | None:
        self._sums.zero_()
        return vectors  # (0, d): its own gradient

    def _eager(
        self, shape: Hashable, inputs: torch.Tensor, vectors: torch.Tensor | None, inverse: torch.Tensor | None
    ) -> torch.Tensor | None:
        table = None if vectors is None else vectors.requires_grad_()
        self._add_gradients(shape, inputs, table, inverse)
        return None if table is None else table.grad

    def _add_gradients(
        self, shape: Hashable, inputs: torch.Tensor, table: torch.Tensor | None, inverse: torch.Tensor | None
    ) -> None:
        """Put the gradients of this part's share of the batch's mean loss, and the share, into the sums."""
        self._sums.zero_()
        batch = self.schedule.batch(shape, inputs)
        loss = self.task.loss(batch) if table is None else self.task.loss_of(batch, table, inverse)
        loss = loss * self.schedule.share(batch, inputs)
        loss.backward()
        self._sums[-1] = loss.detach()

    def _capture_own(self, shape: Any, inputs: torch.Tensor) -> _Own:
        """What this process does in a step as a graph that reads from buffers; uncaptured if no graph can hold it."""
        buffer = inputs.clone()
        table = inverse = None
        if self.task.is_sharded:
            most = len(self.task.wanted_items(self.schedule.batch(shape, buffer)))
            inverse = torch.zeros(most, dtype=torch.int64, device=inputs.device)
            table = torch.zeros(most, self.task.dim, device=inputs.device, requires_grad=True)
            table.grad = torch.zeros_like(table)

        def work() -> None:
            if table is not None and table.grad is not None:
                table.grad.zero_()
            self._add_gradients(shape, buffer, table, inverse)

        work()  # which compiles kernels and fills caches; the sums are made again
        try:
            graph, _ = self.stream.capture(work, generators=(self.schedule.draws,))
        except (RuntimeError, AttributeError) as error:
            self._report_without("a CUDA graph", error)
            self.capture = False
            self.schedule.draws = torch.Generator(inputs.device)  # the other may be taken for one in capture
            return functools.partial(self._eager, shape)

        def replay(
            inputs: torch.Tensor, vectors: torch.Tensor | None, index: torch.Tensor | None
        ) -> torch.Tensor | None:
            buffer.copy_(inputs)
            if table is None or inverse is None or vectors is None or index is None:
                graph.replay()
                return None
            with torch.no_grad():
                table.zero_()
                table[: len(vectors)] = vectors
                inverse.copy_(index)
            graph.replay()
            return None if table.grad is None else table.grad[: len(vectors)]

        return replay

    def _say(self, line: str) -> None:
        self.processes.say(line)

    def _capture_update(self) -> Callable[[], Any]:
        try:
            graph, _ = self.stream.capture(self.optimizer.step, uses_random=False)
        except RuntimeError as error:
            self._report_without("a CUDA graph of the update", error)
            return self.optimizer.step
        return graph.replay
