"""The jagged operations through fbgemm_gpu, and whether it can be used."""

import functools
import warnings

import torch

#: Every fbgemm operation this project calls; `steps.doctor` tries each.
OPERATIONS = ("asynchronous_complete_cumsum", "jagged_to_padded_dense", "dense_to_jagged", "jagged_index_select")
_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64)  # float64 is missing in jagged_to_padded_dense


@functools.cache
def available() -> bool:
    """Whether fbgemm_gpu is installed and fits this torch; a build that does not fit warns, once."""
    try:
        import fbgemm_gpu  # noqa: F401  (registers torch.ops.fbgemm)

        return all(hasattr(torch.ops.fbgemm, name) for name in OPERATIONS)
    except ModuleNotFoundError:
        return False
    except (ImportError, OSError) as error:
        warnings.warn(f"fbgemm_gpu does not fit this torch, using torch instead: {error}", stacklevel=2)
        return False


def fits(tensor: torch.Tensor) -> bool:
    """Whether fbgemm can take `tensor`: its type, and its device (a CPU build knows no CUDA)."""
    return tensor.dtype in _TYPES and _fits_device(tensor.device.type)


def _fits_device(device: str) -> bool:
    if not available():
        return False
    return device != "cuda" or torch._C._dispatch_has_kernel_for_dispatch_key("fbgemm::dense_to_jagged", "CUDA")


# As torch.compiler.assume_constant_result does, whose import takes a second.
_fits_device._dynamo_marked_constant = True  # type: ignore[attr-defined]


def offsets_from_lengths(lengths: torch.Tensor) -> torch.Tensor:
    return torch.ops.fbgemm.asynchronous_complete_cumsum(lengths)


def to_padded(values: torch.Tensor, offsets: torch.Tensor, max_len: int) -> torch.Tensor:
    return torch.ops.fbgemm.jagged_to_padded_dense(values, [offsets], [max_len], 0)


def to_jagged(padded: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return torch.ops.fbgemm.dense_to_jagged(padded, [offsets])[0]


def select_rows(values: torch.Tensor, offsets: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    selected, lengths = torch.ops.fbgemm.jagged_index_select(values, offsets.diff(), rows)
    return selected, offsets_from_lengths(lengths)
