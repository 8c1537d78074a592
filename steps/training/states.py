"""States of a training, written beside it: the GPU does not wait for a disk."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from steps.models.checkpoint import State, state_tensors, write_state

#: Of a large model a state takes seconds to write, and an epoch of a small one fractions of a second on a GPU: at
#: most so much is trained again after a kill.
_SECONDS_APART = 20.0


class StateWriter:
    """Writes states to one path, each when the one before is written. On the CPU every state, as epochs are long."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path = path
        self.device = device
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[None] | None = None
        self._copies: dict[str, torch.Tensor] = {}
        self._written = time.monotonic()

    def offer(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        best: dict[str, torch.Tensor],
        progress: dict[str, Any],
        last: bool,
    ) -> None:
        """Write this state, unless one was written shortly before and it is not the last."""
        if self.device.type == "cuda" and not last and time.monotonic() - self._written < _SECONDS_APART:
            return
        self.finish()
        # Queued before the steps that change them. From a GPU the copies go to page-locked memory.
        tensors = state_tensors(model, optimizer, best)
        copies = {name: tensor.detach().to("cpu", non_blocking=True, copy=True) for name, tensor in tensors.items()}
        copied = torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None

        def write() -> None:
            if copied is not None:
                copied.synchronize()
            write_state(self.path, State(copies, progress))

        # Freed by `finish`, in this thread: freeing page-locked memory leaves an event on the run's stream, which must
        # not be while this thread captures a graph there.
        self._copies = copies
        self._writing = self._thread.submit(write)
        self._written = time.monotonic()

    def finish(self) -> None:
        """Wait for what is being written; raises what its writing raised."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None
            self._copies = {}
