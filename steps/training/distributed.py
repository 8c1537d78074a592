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
from typing import Any, NamedTuple

import torch

from kernels.rowwise_table import unique
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


class _Own(NamedTuple):
    """What a process does by itself in steps of one shape."""

    #: From a step's inputs to the items (n,) of a table that processes share: those that it wants vectors of, each once
    #: and in order, and numbers behind the last row; and the index of each of its `wanted_items` among them.
    wanted: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    #: From a step's inputs, the vectors (n, d) and the index, or None, to the gradient of the vectors, or None.
    gradients: Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor | None]


class SharedExecution(Execution):
    """Takes this process's part of every step; all processes update their weights by the same sums.

    In mode `graph` what a process does by itself are CUDA graphs for each static shape, and the update is another one.
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
        self._update_captured = True

    @property
    def captured(self) -> bool:
        return super().captured and self._update_captured

    def __call__(self, step: Step, seed: int) -> None:
        shape, inputs = step
        own = self._own(shape, inputs)
        self.schedule.draws.manual_seed(seed)
        self.stream.seed(seed ^ (self.processes.rank + 1) * _RANK_STRIDE)  # dropout differs between processes
        with self.processes.explaining():
            if self.task.is_sharded:
                items, index = own.wanted(inputs)
                vectors = self.task.items(items)
                vectors.backward(own.gradients(inputs, vectors.detach(), index))
            else:
                own.gradients(inputs, None, None)
        self.processes.sum_(self._sums)
        if self._update is None:
            self._update = self._capture_update() if self.capture else self.optimizer.step
        self._update()
        self.total += self._sums[-1]

    def _own(self, shape: Hashable, inputs: torch.Tensor) -> _Own:
        """What this process does in a step of this shape."""
        if not inputs.shape[1]:
            nothing = torch.zeros(0, dtype=torch.int64, device=inputs.device)
            return _Own(lambda _: (nothing, nothing), self._idle)
        key = (shape, inputs.shape)
        if self.capture and key not in self._captured:
            self._captured[key] = self._capture_own(shape, inputs)
        return self._captured[key] if self.capture else self._eager(shape)

    def _idle(
        self, inputs: torch.Tensor, vectors: torch.Tensor | None, index: torch.Tensor | None
    ) -> torch.Tensor | None:
        self._sums.zero_()
        return vectors  # (0, d): its own gradient

    def _eager(self, shape: Hashable) -> _Own:
        def gradients(
            inputs: torch.Tensor, vectors: torch.Tensor | None, index: torch.Tensor | None
        ) -> torch.Tensor | None:
            table = None if vectors is None else vectors.requires_grad_()
            self._add_gradients(shape, inputs, table, index)
            return None if table is None else table.grad

        return _Own(functools.partial(self._wanted, shape), gradients)

    def _wanted(self, shape: Hashable, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return unique(self.task.wanted_items(self.schedule.batch(shape, inputs)), behind=self.task.num_items + 1)

    def _add_gradients(
        self, shape: Hashable, inputs: torch.Tensor, table: torch.Tensor | None, index: torch.Tensor | None
    ) -> None:
        """Put the gradients of this part's share of the batch's mean loss, and the share, into the sums."""
        self._sums.zero_()
        batch = self.schedule.batch(shape, inputs)
        loss = self.task.loss(batch) if table is None else self.task.loss_of(batch, table, index)
        loss = loss * self.schedule.share(batch, inputs)
        loss.backward()
        self._sums[-1] = loss.detach()

    def _capture_own(self, shape: Any, inputs: torch.Tensor) -> _Own:
        """What this process does in a step as graphs that read from buffers; uncaptured if no graph can hold it."""
        if self.task.is_sharded:
            return self._capture_sharded(shape, inputs)
        buffer, eager = inputs.clone(), self._eager(shape)
        graph = self._graph(lambda: self._add_gradients(shape, buffer, None, None))
        if graph is None:
            return eager

        def gradients(inputs: torch.Tensor, *_: Any) -> None:
            buffer.copy_(inputs)
            graph.replay()

        return _Own(eager.wanted, gradients)

    def _capture_sharded(self, shape: Any, inputs: torch.Tensor) -> _Own:
        """The same with a table that processes share: one graph before the lookup, and one behind it."""
        buffer = inputs.clone()
        items, index = self._wanted(shape, buffer)
        table = torch.zeros(len(items), self.task.dim, device=inputs.device, requires_grad=True)
        gradient = table.grad = torch.zeros_like(table)

        def want() -> None:
            for kept, found in zip((items, index), self._wanted(shape, buffer), strict=True):
                kept.copy_(found)

        def add_gradients() -> None:
            gradient.zero_()
            self._add_gradients(shape, buffer, table, index)

        before = self._graph(want)
        behind = None if before is None else self._graph(add_gradients)
        if before is None or behind is None:
            return self._eager(shape)

        def wanted(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            buffer.copy_(inputs)
            before.replay()
            return items, index

        def gradients(_: torch.Tensor, vectors: torch.Tensor | None, __: torch.Tensor | None) -> torch.Tensor:
            """After `wanted`, which fills the other buffers."""
            if vectors is None:
                raise TypeError("a table that processes share needs its vectors")
            with torch.no_grad():
                table.copy_(vectors)
            behind.replay()
            return gradient

        return _Own(wanted, gradients)

    def _graph(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        """`work` as a graph; if none can hold it, a line says so, and nothing is captured from now on."""
        work()  # which compiles kernels and fills caches; what it leaves is made again
        try:
            return self.stream.capture(work, generators=(self.schedule.draws,))[0]
        except (RuntimeError, AttributeError) as error:
            self._report_without("a CUDA graph", error)
            self.capture = False
            self.schedule.draws = torch.Generator(self.stream.device)  # the other may be taken for one in capture
            return None

    def _say(self, line: str) -> None:
        self.processes.say(line)

    def _capture_update(self) -> Callable[[], Any]:
        try:
            graph, _ = self.stream.capture(self.optimizer.step, uses_random=False)
        except RuntimeError as error:
            self._report_without("a CUDA graph of the update", error)
            self._update_captured = False
            return self.optimizer.step
        return graph.replay
