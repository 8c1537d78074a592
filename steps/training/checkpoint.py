"""The state that a killed training resumes from, as a safetensors file, written by a thread of its own."""

import hashlib
import json
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from steps.common.files import atomic_path
from steps.common.processes import Processes
from steps.models.large_table import Block, blocks_of, load_own
from steps.models.weights import own_rows, pieces, write_together

#: On a GPU the least seconds from one state to the next. A large model's state takes seconds to write, and a small
#: model's epoch less than a second. After a kill, at most so much is trained again.
_MIN_INTERVAL_S = 20.0
_WITH_ROWS = ("model", "best")  # groups of a state's tensors that tables are in


class StateError(Exception):
    """Why a training cannot resume from a state."""


@dataclass(frozen=True)
class State:
    """The state of a training: the tensors of `state_tensors`, and `progress`, JSON values."""

    tensors: dict[str, torch.Tensor]
    progress: dict[str, Any]


def state_tensors(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, best: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """All tensors that training needs to resume: weights, optimiser state, best weights so far."""
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"best/{name}": tensor for name, tensor in best.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{name}": tensor for name, tensor in state.items()}
    return tensors


def write_state(path: Path, state: State) -> None:
    """Write a state and its hash, atomically."""
    progress = json.dumps(state.progress)
    host = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(host, {"progress": progress, "sha256": _digest(state.tensors, progress)}))


def write_state_together(
    path: Path,
    tensors: dict[str, torch.Tensor],
    blocks: dict[str, Block],
    progress: dict[str, Any],
    processes: Processes,
) -> None:
    """Write the file that `write_state` writes, of whose tables in `blocks` each process has its rows alone."""
    text = json.dumps(progress)

    def sealed(file: Path) -> dict[str, str]:
        with safe_open(file, "pt") as opened:
            return {"progress": text, "sha256": _digest(_entries(opened), text)}

    unsealed = {"progress": text, "sha256": "0" * hashlib.sha256().digest_size * 2}
    write_together(path, tensors, blocks, processes, unsealed, sealed)


def read_state(path: Path, identity: str, blocks: Mapping[str, Block] | None = None) -> State | None:
    """What `write_state` wrote, on the CPU, of tables in `blocks` this process's rows; None if nothing is there.

    Raises StateError if it is damaged, or not of the training with this `identity`.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            if metadata["sha256"] != _digest(_entries(file), metadata["progress"]):
                raise StateError("is damaged: its sha256 is another than it says")
            progress = json.loads(metadata["progress"])
            if progress["identity"] != identity:
                raise StateError("is of another config, other data or another precision")
            tensors = {name: own_rows(file, name, blocks or {}) for name in file.keys()}  # noqa: SIM118  (it is no dict)
    except OSError as error:
        raise StateError(f"cannot be read: {error.strerror or error}") from error
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise StateError(f"is damaged: {error}") from error
    return State(tensors, progress)


def blocks_of_state(model: torch.nn.Module) -> dict[str, Block]:
    """The tensors of a state of which this process has its rows alone, and reads and writes these."""
    return {f"{group}/{name}": block for group in _WITH_ROWS for name, block in blocks_of(model).items()}


def load_state(state: State, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Put a state into model and optimiser; returns the best weights so far, on the model's device, but on the CPU
    rows of a table that processes share.

    Raises StateError if it does not fit them. They may then hold a part of it.
    """
    device = next(model.parameters()).device
    groups: dict[str, dict[str, torch.Tensor]] = {"model": {}, "best": {}, "optimizer": {}}
    blocks = blocks_of_state(model)
    try:
        for name, tensor in state.tensors.items():
            group, key = name.split("/", 1)
            groups[group][key] = tensor if name in blocks else tensor.to(device)
        load_own(model, groups["model"])
        states: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in groups["optimizer"].items():
            index, name = key.split("/")
            states.setdefault(int(index), {})[name] = tensor
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    except (KeyError, ValueError, RuntimeError) as error:
        raise StateError(f"does not fit this code's model: {error}") from error
    return groups["best"]


class StateWriter:
    """Writes states to one path, one after the other, so that the GPU does not wait for the disk.

    On a CPU it writes every state, as epochs are long.
    """

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
        if not self._is_due(last):
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

    def save_together(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        best: dict[str, torch.Tensor],
        progress: dict[str, Any],
        last: bool,
        processes: Processes,
    ) -> None:
        """The same by several processes, of which each writes its rows, and all wait until the state is there."""
        if not processes.any(processes.writes and self._is_due(last)):
            return
        tensors = state_tensors(model, optimizer, best)
        blocks = {name: block for name, block in blocks_of_state(model).items() if name in tensors}
        write_state_together(self.path, tensors, blocks, progress, processes)
        self._written = time.monotonic()

    def _is_due(self, last: bool) -> bool:
        return self.device.type != "cuda" or last or time.monotonic() - self._written >= _MIN_INTERVAL_S

    def finish(self) -> None:
        """Wait for the state that is being written; raises the error of its writing, if any."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None
            self._copies = {}


def _entries(file: Any) -> dict[str, Any]:
    """The tensors of an open file, none of which is read as a whole but numbers without a dimension."""
    found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
    return {name: entry if entry.get_shape() else file.get_tensor(name) for name, entry in found.items()}


def _digest(tensors: Mapping[str, Any], progress: str) -> str:
    """The SHA-256 of tensors, their names and types, and the progress."""
    digest = hashlib.sha256(progress.encode())
    for name, tensor in sorted(tensors.items()):
        whole = isinstance(tensor, torch.Tensor)
        shape = tuple(tensor.shape) if whole else tuple(tensor.get_shape())
        digest.update(f"{name} {tensor.dtype if whole else tensor[:1].dtype} {shape}".encode())
        for piece in pieces(tensor):
            digest.update(piece.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
