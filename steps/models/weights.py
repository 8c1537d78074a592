"""The weights of a trained model, as a safetensors file."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from steps.common.cli import StepError
from steps.common.files import atomic_path


def save_weights(model: torch.nn.Module, path: Path) -> None:
    """Write the model's parameters and buffers to `path`, atomically."""
    host = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(host))


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Read what `save_weights` wrote. Raises StepError if the file is missing, damaged or of another model."""
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise StepError(f"{path} does not hold the weights of this model: {error}. Train again") from error
