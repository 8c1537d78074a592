"""The device a step computes on."""

import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from steps.common.cli import StepError
from steps.common.threads import cpu_threads


def pick_device(name: str | None) -> torch.device:
    """The named device; without a name the CUDA device where there is one, else the CPU.

    Raises StepError if CUDA is named where there is none, or if no device has the name.
    """
    if name and name.startswith("cuda") and not torch.cuda.is_available():
        raise StepError(f"--device {name}: there is no CUDA device here")
    try:
        return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise StepError(f"--device {name}: cpu, cuda or cuda:<number>, please") from None


def use_threads(count: int | None, configs: list[dict[str, Any]]) -> None:
    """Compute on the CPU with `count` threads; without a count with OMP_NUM_THREADS threads, if it is set.

    With neither, as many threads as the largest run gains from, at most one per core that this process may use. torch
    counts the cores of the machine; a container or a cluster job may have only a few of them.
    """
    if count or "OMP_NUM_THREADS" not in os.environ:
        cores = min(torch.get_num_threads(), usable_cores())
        torch.set_num_threads(count or max((cpu_threads(config, cores) for config in configs), default=cores))


def usable_cores() -> int:
    """The cores that this process may use, by its affinity and its control group's quota; at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _first_line("/sys/fs/cgroup/cpu.max").partition(" ")
    if not quota:  # version 1 of control groups
        quota = _first_line("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
        period = _first_line("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
    if quota.isdigit() and period.isdigit() and int(period):
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def device_name(device: torch.device) -> str:
    """What the device is, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def card(device: torch.device) -> str:
    """Which one of its kind a CUDA device is: the first eight digits of its UUID."""
    return str(torch.cuda.get_device_properties(device).uuid)[:8]


def pick_precision(precision: str | None, device: torch.device) -> tuple[str, torch.dtype | None]:
    """The precision of a sequence model's matrix products, as its name and torch type; None: the weights' own type.

    bf16 (the default) or tf32 on CUDA, float32 elsewhere. Weights, optimiser, losses and scores are always float32.
    """
    if device.type != "cuda":
        return "float32", None
    return (precision or "bf16", torch.bfloat16 if precision != "tf32" else None)


def resident_peak_bytes() -> int:
    """The most main memory that this process has taken so far, as the operating system counts it."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # elsewhere in units of 1024 bytes
