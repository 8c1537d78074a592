"""One step of the optimiser in a shape known beforehand, captured as a CUDA graph where there is a GPU.

A step of a small model is hundreds of small kernels, which Python launches more slowly than a GPU runs them.
A graph holds them all: the host launches it, and never waits for the device within an epoch. In a long training
torch.compile makes them fewer first.
"""

from collections.abc import Callable, Hashable
from typing import Any

import torch

from steps.data.sequences import Sequences
from steps.models import SequenceModel
from steps.models.adagrad import Adagrad
from steps.training.device import Place

#: Largest batches hold so many buckets: on ML-1M all batches of 101 epochs fall into ten sizes, with 3.8 % padding.
_BUCKETS = 24
_BUCKET_MULTIPLE = 256  # a whole number of every kernel's blocks


def bucket_size(batch_size: int, max_len: int) -> int:
    """To a multiple of how many tokens batches are padded."""
    return max(1, round(batch_size * max_len / _BUCKETS / _BUCKET_MULTIPLE)) * _BUCKET_MULTIPLE


def prepare(optimizer: torch.optim.Optimizer) -> None:
    """Give AdamW the state its first step would make, since a graph would make it again at every replay."""
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
    """The steps of one run. With `capture` each layout becomes a graph when it is first met; all share their memory.

    compiled: whether torch.compile fuses the steps' kernels; where it fails training goes on without, and says so.
    total: (), the sum of the losses since it was last set to zero.
    """

    def __init__(
        self,
        model: SequenceModel,
        optimizer: torch.optim.Optimizer,
        sequences: Sequences,
        drop: torch.Tensor,
        place: Place,
        capture: bool,
        compiled: bool = False,
    ) -> None:
        self.model, self.optimizer, self.sequences, self.drop = model, optimizer, sequences, drop
        self.place = place
        self.capture = capture
        self.compiled = compiled
        self.total = torch.zeros((), device=sequences.item.device)
        self._graphs: dict[Hashable, Callable[[torch.Tensor], None]] = {}
        self._pool: Any = torch.cuda.graph_pool_handle() if capture else None
        prepare(optimizer)
        if compiled:
            model.compile_blocks()

    def __call__(self, layout: Hashable, given: torch.Tensor, seed: int) -> None:
        """Take one step; its random numbers are those of `seed`."""
        shape = (layout, given.shape)
        if self.capture and shape not in self._graphs:
            self._graphs[shape] = self._captured(layout, given)
        torch.manual_seed(seed)
        if self.capture:
            self._graphs[shape](given)
        else:
            self._step(layout, given)

    def _gradients(self, layout: Hashable, given: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model.static_loss(self.sequences, self.drop, layout, given)
        loss.backward()
        return loss.detach()

    def _step(self, layout: Hashable, given: torch.Tensor) -> None:
        for part in self.model.parts(layout, given):
            loss = self._gradients(layout, part)
            self.optimizer.step()
            self.total += loss
        # The gradients' memory is another graph's next.
        self.optimizer.zero_grad(set_to_none=True)

    def _warm_up(self, layout: Hashable, given: torch.Tensor) -> None:
        """All that a step does for the first time, and a capture does not allow: kernels are compiled and cached tables
        made. Nothing is trained, and the step's seed is set afterwards."""
        try:
            with self.model.frozen():
                self._gradients(layout, given)
            if self.compiled and isinstance(self.optimizer, Adagrad):
                self.optimizer.compile()
        except Exception as error:
            if not self.compiled:
                raise
            self._without("torch.compile", error)
            self._uncompile()
            with self.model.frozen():
                self._gradients(layout, given)
        self.optimizer.zero_grad(set_to_none=True)

    def _uncompile(self) -> None:
        self.compiled = False
        self.model.uncompile_blocks()
        if isinstance(self.optimizer, Adagrad):
            self.optimizer.uncompile()

    def _without(self, what: str, error: BaseException) -> None:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        print(f"training without {what}, which does not take {type(self.model).__name__}: {reason}", flush=True)

    def _captured(self, layout: Hashable, given: torch.Tensor) -> Callable[[torch.Tensor], None]:
        """The step as a graph that reads what it is given from a place of its own; eagerly if that cannot be."""
        buffer = given.clone()
        self._warm_up(layout, self.model.parts(layout, buffer)[0])
        try:
            graph, _ = self.place.capture(lambda: self._step(layout, buffer), self._pool)
        except RuntimeError as error:
            self._without("a CUDA graph", error)
            self.capture = False
            self.optimizer.zero_grad(set_to_none=True)
            return lambda given: self._step(layout, given)

        def replay(given: torch.Tensor) -> None:
            buffer.copy_(given)
            graph.replay()

        return replay
