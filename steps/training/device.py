"""Where a run computes: its own CUDA stream and random numbers, so that several runs share a GPU without a trace."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Place:
    """A device as one run sees it. On the CPU, where runs follow one another, nothing is set apart."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)
            self.stream.wait_stream(torch.cuda.current_stream(device))  # which loads the data
            self._random = torch.Generator(device)

    def renew_random(self) -> None:
        """Take a new generator, as one whose capture failed may believe that it is still captured."""
        self._random = torch.Generator(self.device)
        _default_generator(self.device).graphsafe_set_state(self._random)

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
