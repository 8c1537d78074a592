"""The jagged operations through fbgemm_gpu, and whether it can be used."""

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from . import naive

#: Every fbgemm operation this project calls; `steps.doctor` tries each.
OPERATIONS = ("asynchronous_complete_cumsum", "jagged_to_padded_dense", "dense_to_jagged", "jagged_index_select")
_MOST_THREADS = 1024  # of a block on CUDA
_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64)  # float64 is missing in jagged_to_padded_dense


@functools.cache
def available() -> bool:
    """Whether fbgemm_gpu is installed and fits this torch; a build that does not fit warns, once."""
    try:
        with root_logger_kept():
            import fbgemm_gpu  # noqa: F401  (registers torch.ops.fbgemm)

        return all(hasattr(torch.ops.fbgemm, name) for name in OPERATIONS)
    except Exception as error:  # what a library built for another torch raises is not its to choose
        if not (isinstance(error, ModuleNotFoundError) and error.name == "fbgemm_gpu"):
            warnings.warn(f"fbgemm_gpu does not fit this torch, using torch instead: {error}", stacklevel=2)
        return False


@contextlib.contextmanager
def root_logger_kept() -> Iterator[None]:
    """Within: fbgemm_gpu's first line to Python's root logger, which has no handler yet, gives it none.

    Its modules log so when they are imported and when they make a table: `logging.info` calls `logging.basicConfig`,
    after which the lines of everyone else would come out on stderr, in a form that nobody chose.
    """
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)


def fits(tensor: torch.Tensor) -> bool:
    """Whether fbgemm can take `tensor`: its type, and its device (a CPU build knows no CUDA)."""
    return tensor.dtype in _TYPES and _fits_device(tensor.device.type)


def selects(values: torch.Tensor) -> bool:
    """Whether fbgemm can select rows of `values` (T, D), where it fits: on CUDA a block has a thread for each column,
    so that its launch fails without columns, and for more than 1,024."""
    return not values.is_cuda or 0 < values.shape[1] <= _MOST_THREADS


def _fits_device(device: str) -> bool:
    if not available():
        return False
    # dense_to_jagged itself is a composition that has no kernel of its own on any device.
    return torch._C._dispatch_has_kernel_for_dispatch_key("fbgemm::dense_to_jagged_forward", device.upper())


# As torch.compiler.assume_constant_result does, whose import takes a second.
_fits_device._dynamo_marked_constant = True  # type: ignore[attr-defined]


def offsets_from_lengths(lengths: torch.Tensor) -> torch.Tensor:
    return torch.ops.fbgemm.asynchronous_complete_cumsum(lengths)


def to_padded(values: torch.Tensor, offsets: torch.Tensor, max_len: int) -> torch.Tensor:
    return _ToPadded.apply(values, offsets, max_len)


def to_jagged(padded: torch.Tensor, offsets: torch.Tensor, total: int | None = None) -> torch.Tensor:
    return _ToJagged.apply(padded, offsets, total)


def select_rows(values: torch.Tensor, offsets: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if not len(rows):  # fbgemm asks for the last of them
        return values[:0], offsets.new_zeros(1)
    return _SelectRows.apply(values, offsets, rows)


# fbgemm's own second derivatives of padding and of selecting are exactly 0. All three operations are linear: here the
# backward pass of one is another, or an operation of torch, so that derivatives of any order are right. Forward-mode
# derivatives raise: torch.compile traces no Function that has a jvp.


class _ToPadded(torch.autograd.Function):
    @staticmethod
    def forward(values: torch.Tensor, offsets: torch.Tensor, max_len: int) -> torch.Tensor:
        return torch.ops.fbgemm.jagged_to_padded_dense(values, [offsets], [max_len], 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        values, offsets, _ = inputs
        ctx.total = values.shape[0]
        ctx.save_for_backward(offsets)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (offsets,) = ctx.saved_tensors
        return _ToJagged.apply(gradient, offsets, ctx.total), None, None


class _ToJagged(torch.autograd.Function):
    @staticmethod
    def forward(padded: torch.Tensor, offsets: torch.Tensor, total: int | None) -> torch.Tensor:
        return torch.ops.fbgemm.dense_to_jagged(padded, [offsets], total)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        padded, offsets, _ = inputs
        ctx.max_len = padded.shape[1]
        ctx.save_for_backward(offsets)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (offsets,) = ctx.saved_tensors
        return _ToPadded.apply(gradient, offsets, ctx.max_len), None, None


class _SelectRows(torch.autograd.Function):
    @staticmethod
    def forward(values: torch.Tensor, offsets: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        selected, lengths = torch.ops.fbgemm.jagged_index_select(values, offsets.diff(), rows)
        return selected, offsets_from_lengths(lengths)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        values, offsets, rows = inputs
        ctx.total = values.shape[0]
        ctx.save_for_backward(offsets, rows, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, _: None) -> tuple[torch.Tensor, None, None]:
        offsets, rows, selected = ctx.saved_tensors
        index = naive.selected_index(offsets, rows, selected, len(gradient))
        return gradient.new_zeros(ctx.total, gradient.shape[1]).index_add(0, index, gradient), None, None
