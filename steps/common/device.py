"""The device a step computes on."""

import torch

from steps.common.cli import StepError


def pick_device(name: str | None) -> torch.device:
    """The named device; without a name the CUDA device where there is one, else the CPU.

    Raises StepError if CUDA is named where there is none.
    """
    if name and name.startswith("cuda") and not torch.cuda.is_available():
        raise StepError(f"--device {name}: there is no CUDA device here")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def device_name(device: torch.device) -> str:
    """What the device is, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def compute_type(precision: str | None, device: torch.device) -> tuple[str, torch.dtype | None]:
    """The name and type of a sequence model's matrix products: bf16 (the default) or tf32 on CUDA, float32 elsewhere.

    The type is None where it is the weights' own. Weights, optimiser, losses and scores are float32 in any case.
    """
    if device.type != "cuda":
        return "float32", None
    return (precision or "bf16", torch.bfloat16 if precision != "tf32" else None)
