"""Where a run computes: its own CUDA stream and random numbers, so that several runs share a GPU without a trace."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Place:
    """A device as one run sees it. On the CPU, where runs follow one another, nothing is set apart."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)
            self.stream.wait_stream(torch.cuda.current_stream(device))  # which loads the data
            self._random = torch.Generator(device)
            self._failed: list[torch.cuda.CUDAGraph] = []

    def capture(self, work: Callable[[], T], pool: Any = None, draws: bool = True) -> tuple[torch.cuda.CUDAGraph, T]:
        """`work` as a graph, and the tensors it returned, which every replay fills anew.

        pool: of memory that graphs share which never run at once. draws: whether `work` takes random numbers.
        Raises RuntimeError for work that no graph can hold. Lost then are the pool, where `work` draws also graphs
        captured before, and, in torch 2.11, the returning of cached memory to the device.
        """
        graph, default = torch.cuda.CUDAGraph(), _default_generator(self.device)
        if not draws:  # so that the generator of graphs that do is not lost where this capture fails
            default.graphsafe_set_state(torch.Generator(self.device))
        try:
            # The thread that writes states may use the device meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode="thread_local"):
                return graph, work()
        except RuntimeError:
            self._failed.append(graph)  # kept, as torch 2.11 takes a new graph at the same address for this one
            if draws:  # a generator whose capture failed may believe that it is still captured
                self._random = torch.Generator(self.device)
            raise
        finally:
            default.graphsafe_set_state(self._random)

    def wait(self) -> None:
        """Wait for all that the run has queued, so that other streams may read it."""
        if self.device.type == "cuda":
            self.stream.synchronize()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Work is queued on the run's stream and draws from the run's generator. Not to be held across a `yield`."""
        if self.device.type != "cuda":
            yield
            return
        generator = _default_generator(self.device)
        before = generator.graphsafe_get_state()
        generator.graphsafe_set_state(self._random)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            generator.graphsafe_set_state(before)


def _default_generator(device: torch.device) -> torch.Generator:
    return torch.cuda.default_generators[device.index or 0]
