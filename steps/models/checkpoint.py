"""Weights, and the state that a killed training resumes from, as safetensors files."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from steps.common.cli import StepError
from steps.common.files import atomic_path


class StateError(Exception):
    """Why a training cannot resume from a state."""


@dataclass(frozen=True)
class State:
    """The state of a training: the tensors of `state_tensors`, and `progress`, JSON values."""

    tensors: dict[str, torch.Tensor]
    progress: dict[str, Any]


def save_weights(model: torch.nn.Module, path: Path) -> None:
    """Write the model's parameters and buffers to `path`, atomically."""
    _write(path, dict(model.state_dict()), {})


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Read what `save_weights` wrote. Raises StepError if the file is missing, damaged or of another model."""
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise StepError(f"{path} does not hold the weights of this model: {error}. Train again") from error


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
    _write(path, state.tensors, {"progress": progress, "sha256": _digest(state.tensors, progress)})


def read_state(path: Path, identity: str) -> State | None:
    """What `write_state` wrote, on the CPU; None if nothing is there.

    Raises StateError if it is damaged, or not of the training with this `identity`.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
        if metadata["sha256"] != _digest(tensors, metadata["progress"]):
            raise StateError("is damaged: its sha256 is another than it says")
        progress = json.loads(metadata["progress"])
        if progress["identity"] != identity:
            raise StateError("is of another config, other data or another precision")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise StateError(f"is damaged: {error}") from error
    return State(tensors, progress)


def load_state(state: State, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Put a state into model and optimiser; returns the best weights so far, on the model's device.

    Raises StateError if it does not fit them. They may then hold a part of it.
    """
    device = next(model.parameters()).device
    groups: dict[str, dict[str, torch.Tensor]] = {"model": {}, "best": {}, "optimizer": {}}
    try:
        for name, tensor in state.tensors.items():
            group, key = name.split("/", 1)
            groups[group][key] = tensor.to(device)
        model.load_state_dict(groups["model"])
        states: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in groups["optimizer"].items():
            index, name = key.split("/")
            states.setdefault(int(index), {})[name] = tensor
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    except (KeyError, ValueError, RuntimeError) as error:
        raise StateError(f"does not fit this code's model: {error}") from error
    return groups["best"]


def _digest(tensors: dict[str, torch.Tensor], progress: str) -> str:
    """The SHA-256 of tensors, their names and types, and the progress."""
    digest = hashlib.sha256(progress.encode())
    for name, tensor in sorted(tensors.items()):
        host = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {host.dtype} {tuple(host.shape)}".encode())
        digest.update(host.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(host, metadata))
