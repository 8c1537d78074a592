"""One run trained by several processes, each with a part of every batch: the steps are those of one process.

The windows of a batch go to the processes by cost, their tokens squared, as attention takes it. Each process computes
the loss and the gradients of its windows, weighted by its share of the batch's tokens. The sums over all processes are
then those of the mean over all tokens of the batch, and each updates its copy of the weights with them.

Gradients are summed here, in one piece, and not by torch's DistributedDataParallel: that takes the mean over the
processes, as though all had equally many tokens, waits for a process that a batch leaves without windows, and hides the
loss in a module's forward pass. What it would win is to send gradients while others are being computed.
"""

import heapq
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch

from steps.common.cli import StepError
from steps.common.processes import Processes
from steps.data.sequences import Batch, Part
from steps.tasks import Task
from steps.training.execution import Execution
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

    Of equal windows, and of equal parts, the first comes first.
    """
    found: list[list[int]] = [[] for _ in range(parts)]
    least = [(0, part) for part in range(parts)]  # a heap
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        cost, part = least[0]
        heapq.heapreplace(least, (cost + costs[index], part))
        found[part].append(index)
    return [sorted(part) for part in found]


class SharedExecution(Execution):
    """Takes this process's part of every step, eagerly; all processes update their weights by the same sums."""

    schedule: PartOfWindows

    def __init__(
        self,
        task: Task,
        optimizer: torch.optim.Optimizer,
        schedule: PartOfWindows,
        stream: RunStream,
        processes: Processes,
    ) -> None:
        super().__init__(task, optimizer, schedule, stream, "eager")
        self.processes = processes
        parameters = list(task.parameters())
        #: The gradients of all parameters, and at last the loss.
        self._sums = torch.zeros(sum(parameter.numel() for parameter in parameters) + 1, device=stream.device)
        pieces = self._sums[:-1].split([parameter.numel() for parameter in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)  # the backward pass adds to it

    def __call__(self, step: Step, seed: int) -> None:
        self.schedule.draws.manual_seed(seed)
        torch.manual_seed(seed ^ (self.processes.rank + 1) * _RANK_STRIDE)  # dropout differs between processes
        self._step(*step)

    def _step(self, shape: Hashable, inputs: torch.Tensor) -> None:
        self._sums.zero_()
        with self.processes.explaining():
            loss = self._loss(shape, inputs)
            if loss.requires_grad:
                loss.backward()
        self._sums[-1] = loss.detach()
        self.processes.sum_(self._sums)
        self.optimizer.step()
        self.total += self._sums[-1]

    def _loss(self, shape: Hashable, inputs: torch.Tensor) -> torch.Tensor:
        """This part's share of the batch's mean loss."""
        if not inputs.shape[1]:
            return self.task.idle_loss()
        batch = self.schedule.batch(shape, inputs)
        return self.task.loss(batch) * self.schedule.share(batch, inputs)
