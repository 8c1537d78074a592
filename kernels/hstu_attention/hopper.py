"""Which calls go to the Hopper kernels, and their launches."""

import math
from typing import NamedTuple

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .hopper_backward import BILLION, GROUP, Sizes, hopper_backward_kernel
from .hopper_position import BEFORE, SIDE, position_gradient_kernel
from .hopper_time import (
    BUCKETS,
    LANES,
    NEAR,
    NEAR_TILE,
    TimeTables,
    near_gradient_kernel,
    time_gradient_kernel,
)
from .inputs import SHORT, Inputs, bucket_edges, describable, launch_grid, small_edges
from .prepare import BiasTables

_LARGEST = 0x7FFF0000
_DIMS = (32, 64)
_QUERIES, _STAGES, _BUFFERS = 64, 3, 2
# Of each thread: of the two score groups, the dq group, the one that is left. With less, ptxas ignores all of them.
_REGISTERS = {"none": (208, 72, 24), "positions": (192, 64, 64), "times": (192, 48, 80)}
_DQ_COLUMNS = 32  # with a time bias, which leaves the dq group so few registers
_NEAR_COPIES = 64
_COPIES = 4  # of the position table's sums, so that few programs add to one place at a time


def ragged(tensor: torch.Tensor, rows: int, columns: int | None = None) -> TensorDescriptor:
    """A descriptor of (T, h, d) for `rows` tokens, and `columns` or all of one head, which ends where a sequence does.

    Row r of a sequence of n tokens that ends at token e is at (2^30, e, 2^30 - n + r, column): rows from n on are
    beyond the third dimension, read as zero and not written. The first two strides make the address right: 2^30 times
    (2^34 - stride + stride) elements are a multiple of 2^64 bytes.
    """
    _, heads, dim = tensor.shape
    dtype = {torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}[tensor.dtype]
    stride = tensor.stride(0)
    block = [1, 1, rows, columns or dim]
    return TensorDescriptor(
        tensor,
        [_LARGEST, _LARGEST, BILLION.value, heads * dim],
        [2**34 - stride, stride, stride, 1],
        block,
        gl.NVMMASharedLayout.get_default_for(block, dtype),
    )


def fits(inputs: Inputs, grad: torch.Tensor) -> bool:
    """Whether the backward pass of a call goes to Hopper's kernel: bfloat16, silu, the causal mask and one N, heads
    of 32 or 64, in rows longer than a few tiles."""
    tensors = (inputs.q, inputs.k, inputs.v, grad)
    return (
        inputs.q.is_cuda
        and torch.cuda.get_device_capability(inputs.q.device)[0] == 9
        and all(tensor.dtype == torch.bfloat16 and tensor.shape[2] in _DIMS for tensor in tensors)
        and not inputs.general
        and not inputs.softmax
        and inputs.max_len > SHORT
        and len(inputs.q) <= BILLION.value
        and all(describable(tensor) and tensor.stride(0) > 0 for tensor in tensors)
    )


class _Timed(NamedTuple):
    """What a call with a time bias needs besides."""

    tables: TimeTables
    query_since: torch.Tensor  # (slots, 64) int32
    near: torch.Tensor  # (T, heads, NEAR): score gradients near the diagonal


def backward(
    inputs: Inputs, bias: BiasTables, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """dq in float32, dk and dv of a call that `fits`; and the tables' gradients, None for a table that is not there."""
    q, k, v = inputs.q, inputs.k, inputs.v
    dk, dv = torch.empty_like(k, memory_format=torch.contiguous_format), v.new_empty(v.shape)
    group, scale = GROUP.value, inputs.attention_scale
    blocks = triton.cdiv(inputs.max_len, SIDE.value) * (SIDE.value // 8) + BEFORE.value
    dq, position_sums, time_sums, cut = _zeros(inputs, blocks)
    timed = _timed(inputs, bias, time_sums, cut) if inputs.timed else None
    # What a call has not the kernel does not read.
    since = band = near = ragged(dk, group)
    tables = TimeTables(*[inputs.offsets] * len(TimeTables._fields))
    if timed is not None:
        tables, since = timed.tables, _rows(timed.query_since)
        band, near = ragged(bias.handed.band[:, None], _QUERIES, group), ragged(timed.near, group, _QUERIES)
    kind = "times" if inputs.timed else "positions" if inputs.biased else "none"
    tiles = triton.cdiv(inputs.max_len, 2 * group)
    of_scores, of_dq, of_other = _REGISTERS[kind]
    sizes = Sizes(
        _QUERIES, q.shape[2], v.shape[2], _STAGES, _BUFFERS, _DQ_COLUMNS if inputs.timed else q.shape[2],
        inputs.position_bias is not None, inputs.timed, scale is None,
    )  # fmt: skip
    hopper_backward_kernel[launch_grid(tiles * q.shape[1], inputs.num_sequences)](
        ragged(q, _QUERIES), ragged(k, group), ragged(v, group), ragged(grad, _QUERIES), ragged(dq, _QUERIES),
        ragged(dk, group), ragged(dv, group), since, band, near, inputs.offsets, inputs.alpha,
        1.0 if scale is None else scale, tiles, bias.handed.spread, position_sums, tables, inputs.position_zero, blocks,
        triton.cdiv(inputs.max_len, SIDE.value), COPIES=_COPIES, SIZES=sizes, SCORE_REGISTERS=of_scores,
        DQ_REGISTERS=of_dq, OTHER_REGISTERS=of_other, num_warps=4,
    )  # fmt: skip
    dp = dw = None
    if inputs.position_bias is not None:
        dp, block = torch.empty_like(inputs.position_bias), 128
        position_gradient_kernel[(triton.cdiv(len(dp), block),)](
            position_sums, dp, inputs.position_zero, blocks, COPIES=_COPIES, BLOCK=block
        )
    if timed is not None:
        dw = _time_gradient(inputs, bias, timed, time_sums)
    return dq, dk, dv, dp, dw


def _zeros(inputs: Inputs, blocks: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, the sums for the tables, and whether a sequence's times were cut, of one allocation; what a call has not is
    empty."""
    shapes = (
        tuple(inputs.q.shape),
        (_COPIES if inputs.position_bias is not None else 0, blocks, 8, 8),
        (_COPIES if inputs.timed else 0, BUCKETS.value, LANES.value),
        (len(inputs.offsets) if inputs.timed else 0,),
    )
    sizes = [math.prod(shape) for shape in shapes]
    zeros = torch.zeros(sum(sizes), dtype=torch.float32, device=inputs.q.device).split(sizes)
    dq, position_sums, time_sums, cut = (part.view(shape) for part, shape in zip(zeros, shapes, strict=True))
    return dq, position_sums, time_sums, cut.view(torch.int32)


def _timed(inputs: Inputs, bias: BiasTables, sums: torch.Tensor, cut: torch.Tensor) -> _Timed:
    q, tokens, side = inputs.q, len(inputs.q), SIDE.value
    # Both parts begin on 16 bytes, whatever the number of tokens, for one compiled kernel.
    first_key = triton.cdiv(tokens, 4) * 4
    since = bias.handed.since.new_empty(2 * first_key)
    tiles = since.new_empty(tokens // side + inputs.num_sequences + 1, triton.cdiv(inputs.max_len, side))
    query_since = since.new_empty(len(tiles), side)
    bias.fill_tiles(side, side, since, first_key, tiles, query_since, cut)
    tables = TimeTables(
        tiles, inputs.query_time, inputs.key_time, since[first_key:], bucket_edges(q.device), sums, inputs.time_bias,
        small_edges(q.device), cut,
    )  # fmt: skip
    return _Timed(tables, query_since, q.new_empty(tokens, q.shape[1], NEAR.value))


def _rows(since: torch.Tensor) -> TensorDescriptor:
    """A descriptor of one of the rows (slots, 64)."""
    block = [1, SIDE.value]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.int32)
    return TensorDescriptor(since, list(since.shape), list(since.stride()), block, layout)


def _time_gradient(inputs: Inputs, bias: BiasTables, timed: _Timed, sums: torch.Tensor) -> torch.Tensor:
    near_sums, scale = sums.new_zeros(_NEAR_COPIES, 256), inputs.attention_scale
    near_gradient_kernel[launch_grid(triton.cdiv(inputs.max_len, NEAR_TILE), inputs.num_sequences)](
        timed.near, bias.handed.near_buckets, near_sums, inputs.offsets, 1.0 if scale is None else scale,
        inputs.q.shape[1], BY_LENGTH=scale is None, COPIES=_NEAR_COPIES, BLOCK=NEAR_TILE, num_warps=8,
    )  # fmt: skip
    dw = sums.new_empty(BUCKETS.value)
    time_gradient_kernel[(BUCKETS.value,)](sums, near_sums, dw, COPIES=_COPIES, NEAR_COPIES=_NEAR_COPIES)
    return dw
