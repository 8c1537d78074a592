"""Optimiser steps in static shapes, captured as CUDA graphs on a GPU.

A step of a small model is hundreds of small kernels, which Python launches more slowly than a GPU runs them. A CUDA
graph holds them all: the host launches the graph, and never waits for the device within an epoch. In a long training
torch.compile fuses kernels first.
"""

from collections.abc import Callable, Hashable
from typing import Any

import torch

from steps.data.sequences import Sequences
from steps.models import SequenceModel
from steps.models.adagrad import Adagrad
from steps.training.stream import RunStream

#: Buckets of tokens in the largest batch. On ML-1M all batches of 101 epochs then have one of ten sizes, with 3.8 %
#: padding.
_BUCKETS = 24
_BUCKET_MULTIPLE = 256  # a whole number of every kernel's blocks


def bucket_size(batch_size: int, max_len: int) -> int:
    """Batches are padded to a multiple of so many tokens."""
    return max(1, round(batch_size * max_len / _BUCKETS / _BUCKET_MULTIPLE)) * _BUCKET_MULTIPLE


def init_state(optimizer: torch.optim.Optimizer) -> None:
    """Give AdamW the state that its first step would make: within a graph, every replay would make it again."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


class StaticSteps:
    """The static steps of one run. With `capture` each static shape becomes a CUDA graph when it first occurs.

    All graphs share their memory. compiled: whether torch.compile fuses the steps' kernels; if it fails, the training
    continues without it, and a line says so. total: (), the sum of the losses since it was last set to zero.
    """

    def __init__(
        self,
        model: SequenceModel,
        optimizer: torch.optim.Optimizer,
        sequences: Sequences,
        num_held_out: torch.Tensor,
        stream: RunStream,
        capture: bool,
        compiled: bool = False,
    ) -> None:
        self.model, self.optimizer, self.sequences, self.num_held_out = model, optimizer, sequences, num_held_out
        self.stream = stream
        self.capture = capture
        self.compiled = compiled
        self.total = torch.zeros((), device=sequences.item.device)
        self._graphs: dict[Hashable, Callable[[torch.Tensor], None]] = {}
        self._pool: Any = torch.cuda.graph_pool_handle() if capture else None
        init_state(optimizer)
        if compiled:
            model.compile_blocks()

    def __call__(self, shape: Hashable, inputs: torch.Tensor, seed: int) -> None:
        """Take one static step with the random numbers of `seed`; shape and inputs as `static_steps` makes them."""
        key = (shape, inputs.shape)
        if self.capture and key not in self._graphs:
            self._graphs[key] = self._capture(shape, inputs)
        torch.manual_seed(seed)
        if self.capture:
            self._graphs[key](inputs)
        else:
            self._step(shape, inputs)

    def _gradients(self, shape: Hashable, inputs: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model.static_loss(self.sequences, self.num_held_out, shape, inputs)
        loss.backward()
        return loss.detach()

    def _step(self, shape: Hashable, inputs: torch.Tensor) -> None:
        for micro_step in self.model.micro_steps(shape, inputs):
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
            with self.model.frozen():
                self._gradients(shape, inputs)
            if self.compiled and isinstance(self.optimizer, Adagrad):
                self.optimizer.compile()
        except Exception as error:
            if not self.compiled:
                raise
            self._report_without("torch.compile", error)
            self._uncompile()
            with self.model.frozen():
                self._gradients(shape, inputs)
        self.optimizer.zero_grad(set_to_none=True)

    def _uncompile(self) -> None:
        self.compiled = False
        self.model.uncompile_blocks()
        if isinstance(self.optimizer, Adagrad):
            self.optimizer.uncompile()

    def _report_without(self, what: str, error: BaseException) -> None:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        print(f"training without {what}, which does not take {type(self.model).__name__}: {reason}", flush=True)

    def _capture(self, shape: Hashable, inputs: torch.Tensor) -> Callable[[torch.Tensor], None]:
        """The step as a graph that reads its inputs from a buffer of its own; uncaptured if no graph can hold it."""
        buffer = inputs.clone()
        self._warm_up(shape, self.model.micro_steps(shape, buffer)[0])
        try:
            graph, _ = self.stream.capture(lambda: self._step(shape, buffer), self._pool)
        except RuntimeError as error:
            self._report_without("a CUDA graph", error)
            self.capture = False
            self.optimizer.zero_grad(set_to_none=True)
            return lambda inputs: self._step(shape, inputs)

        def replay(inputs: torch.Tensor) -> None:
            buffer.copy_(inputs)
            graph.replay()

        return replay
