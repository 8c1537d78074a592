"""How the steps of a training run: eager, as CUDA graphs, or as CUDA graphs of kernels that torch.compile has fused.

A step of a small model is hundreds of small kernels, which Python launches more slowly than a GPU runs them. A CUDA
graph holds them all: the host launches the graph, and never waits for the device within an epoch. In a long training
torch.compile fuses kernels first.
"""

from collections.abc import Callable, Hashable
from typing import Any, Literal

import torch

from steps.tasks import Task
from steps.training.optimizers import Adagrad, init_state
from steps.training.schedule import Schedule, Step
from steps.training.stream import RunStream

Mode = Literal["eager", "graph", "compiled"]


class Execution:
    """Takes the steps of one run. In mode `graph` each static shape becomes a CUDA graph when it first occurs.

    All graphs share their memory. In mode `compiled` torch.compile fuses the steps' kernels first. Where graphs or
    torch.compile fail, the training continues without them, and a line says so. capture, compiled: what is in use.
    total: (), the sum of the losses since it was last set to zero.
    """

    def __init__(
        self,
        task: Task,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        stream: RunStream,
        mode: Mode,
    ) -> None:
        self.task, self.optimizer, self.schedule, self.stream = task, optimizer, schedule, stream
        self.capture, self.compiled = mode != "eager", mode == "compiled"
        self.total = torch.zeros((), device=stream.device)
        self._one = torch.ones((), device=stream.device)
        self._graphs: dict[Hashable, Callable[[torch.Tensor], None]] = {}
        self._batch: Callable[[Any, torch.Tensor], Any] = schedule.batch
        init_state(optimizer)
        if self.compiled:
            task.compile_blocks()
            if schedule.compiles:
                self._batch = torch.compile(schedule.batch, dynamic=True)

    @property
    def captured(self) -> bool:
        """Whether all that a step does is in CUDA graphs, but for what processes do together."""
        return self.capture

    def __call__(self, step: Step, seed: int) -> None:
        """Take one step with the random numbers of `seed`."""
        shape, inputs = step
        key = (shape, inputs.shape)
        if self.capture and key not in self._graphs:
            self._graphs[key] = self._capture(shape, inputs)
        self.stream.seed(seed)
        if self.capture:
            self._graphs[key](inputs)
        else:
            self._step(shape, inputs)

    def _gradients(self, shape: Hashable, inputs: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.task.loss(self._batch(shape, inputs))
        loss.backward(self._one)  # which backward() would fill anew
        return loss.detach()

    def _step(self, shape: Hashable, inputs: torch.Tensor) -> None:
        for micro_step in self.schedule.micro_steps(inputs):
            loss = self._gradients(shape, micro_step)
            self.optimizer.step()
            self.total += loss
        # The next graph may use the gradients' memory.
        self.optimizer.zero_grad(set_to_none=True)

    def _warm_up(self, shape: Hashable, inputs: torch.Tensor) -> None:
        """Do what only a first step does, and no capture allows: compile kernels, fill caches. Changes no weight.

        The step's seed is set afterwards.
        """
        try:
            with self.task.frozen():
                self._gradients(shape, inputs)
            if self.compiled and isinstance(self.optimizer, Adagrad):
                self.optimizer.compile()
        except Exception as error:
            if not self.compiled:
                raise
            self._report_without("torch.compile", error)
            self._uncompile()
            with self.task.frozen():
                self._gradients(shape, inputs)
        self.optimizer.zero_grad(set_to_none=True)

    def _uncompile(self) -> None:
        self.compiled = False
        self.task.uncompile_blocks()
        self._batch = self.schedule.batch
        if isinstance(self.optimizer, Adagrad):
            self.optimizer.uncompile()

    def _report_without(self, what: str, error: BaseException) -> None:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        self._say(f"training without {what}, which does not take {type(self.task).__name__}: {reason}")

    def _say(self, line: str) -> None:
        print(line, flush=True)

    def _capture(self, shape: Hashable, inputs: torch.Tensor) -> Callable[[torch.Tensor], None]:
        """The step as a graph that reads its inputs from a buffer of its own; uncaptured if no graph can hold it."""
        buffer = inputs.clone()
        self._warm_up(shape, self.schedule.micro_steps(buffer)[0])
        try:
            graph, _ = self.stream.capture(lambda: self._step(shape, buffer))
        except RuntimeError as error:
            self._report_without("a CUDA graph", error)
            self.capture = False
            self.optimizer.zero_grad(set_to_none=True)
            return lambda inputs: self._step(shape, inputs)

        def replay(inputs: torch.Tensor) -> None:
            buffer.copy_(inputs)
            graph.replay()

        return replay
