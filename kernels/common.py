"""What the Triton operations share: when they apply, and how a launch finds its block sizes."""

import functools
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.autograd import forward_ad

#: Launch parameters: operation -> "default" or a compute capability -> shape class -> parameters.
TABLE = Path(__file__).with_name("configurations.json")
_TYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def triton_available() -> bool:
    """Whether Triton kernels can run here: on CUDA devices, or interpreted (TRITON_INTERPRET=1) for tests."""
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return False
    if torch.version.hip is not None:  # the kernels hold PTX
        return False
    if any(device.major < 8 for device in _devices()):  # which Triton does not support
        return False
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def _devices() -> list[Any]:
    return [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]


def shared_memory() -> int:
    """Bytes of shared memory of a multiprocessor, on the GPU here that has least: 100 KiB to 228 KiB."""
    return min((device.shared_memory_per_multiprocessor for device in _devices()), default=0)


def fits_triton(*tensors: torch.Tensor | None) -> bool:
    """Whether these tensors go to the Triton kernels: float32, float16 or bfloat16, on CUDA, compute capability 8.0.

    Where tensors on CUDA do not, a warning says so, once for each reason.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if not all(tensor.is_cuda for tensor in given):
        if any(tensor.is_cuda for tensor in given):
            do_without("not all tensors are on CUDA")
        return False
    others = {str(tensor.dtype) for tensor in given if tensor.dtype not in _TYPES}
    if others:
        do_without(f"Triton kernels take no {', '.join(sorted(others))}")
        return False
    if not _triton_available():
        do_without("Triton is not installed, or not all GPUs are NVIDIA's of compute capability 8.0 or more")
        return False
    return True


def do_without(reason: str) -> None:
    """Warn, once for each reason, that torch does what a kernel would do faster; not while torch.compile traces."""
    if not torch.compiler.is_compiling():
        _warn(reason)


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(f"{reason}; torch does the work, more slowly", stacklevel=4)


def reverse_mode_only(operation: str, *tensors: torch.Tensor | None) -> None:
    """Raises NotImplementedError where a tensor carries a tangent of forward-mode differentiation, which a custom
    operator would lose, so that the derivative were 0. Costs one comparison where no such mode is on."""
    if forward_ad._current_level >= 0 and any(tensor is not None and _has_tangent(tensor) for tensor in tensors):
        raise NotImplementedError(
            f"{operation} in Triton has no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad): "
            "differentiate in reverse mode, or call the function in its `naive` module"
        )


def _has_tangent(tensor: torch.Tensor) -> bool:
    try:
        return forward_ad.unpack_dual(tensor).tangent is not None
    except RuntimeError:  # torch cannot tell of a tensor under vmap
        return True


def first_derivatives_only(operation: str, backward: Any) -> None:
    """Register for a custom operator that calculates gradients: its own raise RuntimeError, and say why."""

    def refuse(*_: Any) -> None:
        raise RuntimeError(
            f"{operation} in Triton has first derivatives only: for more, call the function in its `naive` module"
        )

    backward.register_autograd(refuse)


def _triton_available() -> bool:
    return triton_available()


def tf32_allowed() -> bool:
    """Whether float32 products on CUDA are TF32, whichever of torch's settings says so.

    Reading `allow_tf32` raises where `fp32_precision` was set; this one may be read after either.
    """
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


# As torch.compiler.assume_constant_result does, whose import takes a second. torch.compile cannot trace the setting,
# but compiles again where it has changed.
_triton_available._dynamo_marked_constant = True  # type: ignore[attr-defined]
tf32_allowed._dynamo_marked_constant = True  # type: ignore[attr-defined]
shared_memory._dynamo_marked_constant = True  # type: ignore[attr-defined]


def configuration(operation: str, shape_class: str, device: torch.device) -> Mapping[str, int]:
    """The launch parameters of `operation` for a class of shapes, from the table checked in beside this file.

    The table is chosen by the device's compute capability ("sm_90"); where that has no entry, "default" has.
    `python -m kernels.tools.tune` writes entries. Nothing is timed at run time: a choice that depends on timing
    changes the order of additions from run to run.
    """
    return table_entry(operation, shape_class, _capability(device.type, device.index))


@functools.cache
def table_entry(operation: str, shape_class: str, capability: str) -> Mapping[str, int]:
    """The table's entry for a capability such as "sm_90", or the default."""
    rows = json.loads(TABLE.read_text())[operation]
    return {**rows["default"][shape_class], **rows.get(capability, {}).get(shape_class, {})}


@functools.cache
def _capability(device: str, index: int | None) -> str:
    return "sm_{}{}".format(*torch.cuda.get_device_capability(index)) if device == "cuda" else "default"


def write_table(path: Path, capability: str, chosen: Mapping[str, Mapping[str, Mapping[str, int]]]) -> None:
    """Enter operation -> shape class -> launch parameters for a capability; a line an entry, so that changes show."""
    table = json.loads(path.read_text())
    for operation, rows in chosen.items():
        table[operation].setdefault(capability, {}).update(rows)
    operations = []
    for operation in sorted(table):
        capabilities = []
        for name, rows in table[operation].items():
            lines = ",\n".join(f'      "{row}": {json.dumps(rows[row])}' for row in rows)
            capabilities.append(f'    "{name}": {{\n{lines}\n    }}')
        operations.append(f'  "{operation}": {{\n' + ",\n".join(capabilities) + "\n  }")
    path.write_text("{\n" + ",\n".join(operations) + "\n}\n")
