"""A CUDA stream and a random generator for each run, so that runs that share a GPU do not change each other."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


class RunStream:
    """The CUDA stream and the random generator of one run. On a CPU, where runs follow one another, it does nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)
            self.stream.wait_stream(torch.cuda.current_stream(device))  # which loads the data
            self._generator = torch.Generator(device)
            self._pool = torch.cuda.graph_pool_handle()
            self._failed: list[torch.cuda.CUDAGraph] = []

    def capture(
        self,
        work: Callable[[], T],
        pooled: bool = True,
        uses_random: bool = True,
        generators: Sequence[torch.Generator] = (),
    ) -> tuple[torch.cuda.CUDAGraph, T]:
        """Capture `work` as a CUDA graph. Returns the graph, and the result of `work`: tensors that a replay rewrites.

        pooled: whether its memory is that of the run's other graphs, which never run at the same time, so that they
        overwrite its result. uses_random: whether `work` draws random numbers. generators: those that it draws from
        beside the run's. Raises RuntimeError if a CUDA graph cannot hold `work`. If `work` draws random numbers, the
        graphs captured before cannot be used then; and torch 2.11 no longer returns cached memory to the device.
        """
        graph, default = torch.cuda.CUDAGraph(), _default_generator(self.device)
        if not uses_random:  # so that a capture that fails does not break the generator of the other graphs
            default.graphsafe_set_state(torch.Generator(self.device))
        register = getattr(graph, "register_generator_state", None)  # a torch without it finds generators by itself
        for generator in generators:
            if register is not None:
                register(generator)
        try:
            # The thread that writes states may use the device meanwhile.
            pool = self._pool if pooled else None
            with torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode="thread_local"):
                return graph, work()
        except Exception:
            self._failed.append(graph)  # kept, as torch 2.11 takes a new graph at the same address for this one
            self._pool = torch.cuda.graph_pool_handle()  # torch may take the other for one in capture, or for empty
            if uses_random:  # torch may still take the generator of a failed capture for one in capture
                self._generator = torch.Generator(self.device)
            raise
        finally:
            default.graphsafe_set_state(self._generator)

    def seed(self, seed: int) -> None:
        """Start the random numbers of `seed`, those that torch.manual_seed starts, on the CPU and the run's device.

        Only while the stream is active. torch.manual_seed formats a stack trace for each kind of accelerator that is
        not there, which takes a third of the host's time in a step.
        """
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            _default_generator(self.device).manual_seed(seed)

    @property
    def is_idle(self) -> bool:
        """Whether all work of the run is done. Does not wait."""
        return self.device.type != "cuda" or bool(self.stream.query())

    def wait(self) -> None:
        """Wait until all work of the run is done, so that other streams may read its results."""
        if self.device.type == "cuda":
            self.stream.synchronize()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within it work is queued on the run's stream and uses its generator. Never `yield` within it."""
        if self.device.type != "cuda":
            yield
            return
        generator = _default_generator(self.device)
        before = generator.graphsafe_get_state()
        generator.graphsafe_set_state(self._generator)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            generator.graphsafe_set_state(before)


def _default_generator(device: torch.device) -> torch.Generator:
    return torch.cuda.default_generators[device.index or 0]
