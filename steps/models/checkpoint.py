"""Weights, and the state a killed training goes on from, as safetensors files."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from steps.common.cli import StepError
from steps.common.files import atomic_path


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
    """All that training needs to go on: weights, optimiser, best weights so far."""
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"best/{name}": tensor for name, tensor in best.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{name}": tensor for name, tensor in state.items()}
    return tensors


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], progress: dict[str, Any]) -> None:
    """Write `state_tensors`, and JSON `progress`, atomically."""
    _write(path, tensors, {"progress": json.dumps(progress)})


def load_progress(path: Path) -> dict[str, Any] | None:
    """The `progress` that `write_tensors` wrote; None if there is no usable file."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["progress"])
    except (OSError, SafetensorError):
        return None


def load_state(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Put the state in `path` into model and optimiser; returns the best weights so far, on the model's device."""
    tensors = load_file(path, device=str(next(model.parameters()).device))
    groups: dict[str, dict[str, torch.Tensor]] = {"model": {}, "best": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        group, key = name.split("/", 1)
        groups[group][key] = tensor
    model.load_state_dict(groups["model"])
    states: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in groups["optimizer"].items():
        index, name = key.split("/")
        states.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    return groups["best"]


def _write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(host, metadata))
