"""States of a training, written by a thread of their own, so that the GPU does not wait for the disk."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from steps.models.checkpoint import State, state_tensors, write_state

#: On a GPU the least seconds from one state to the next. A large model's state takes seconds to write, and a small
#: model's epoch less than a second. After a kill, at most so much is trained again.
_MIN_INTERVAL_S = 20.0


class StateWriter:
    """Writes states to one path, one after the other. On a CPU it writes every state, as epochs are long."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path = path
        self.device = device
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[None] | None = None
        self._copies: dict[str, torch.Tensor] = {}
        self._written = time.monotonic()

    def save(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        best: dict[str, torch.Tensor],
        progress: dict[str, Any],
        last: bool,
    ) -> None:
        """Write this state, unless it is not the last and another was written shortly before."""
        if self.device.type == "cuda" and not last and time.monotonic() - self._written < _MIN_INTERVAL_S:
            return
        self.finish()
        # Queued before the next steps change the tensors. From a GPU the copies go to page-locked memory.
        tensors = state_tensors(model, optimizer, best)
        copies = {name: tensor.detach().to("cpu", non_blocking=True, copy=True) for name, tensor in tensors.items()}
        copied = torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None

        def write() -> None:
            if copied is not None:
                copied.synchronize()
            write_state(self.path, State(copies, progress))

        # `finish` frees them, in this thread: freeing page-locked memory records an event on the run's stream, which is
        # not allowed while this thread captures a graph there.
        self._copies = copies
        self._writing = self._thread.submit(write)
        self._written = time.monotonic()

    def finish(self) -> None:
        """Wait for the state that is being written; raises the error of its writing, if any."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None
            self._copies = {}
