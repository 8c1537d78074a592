"""Which calls go to the Hopper kernels, and their launches."""

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .hopper_backward import BILLION, GROUP, Sizes, hopper_backward_kernel
from .hopper_position import BEFORE, SIDE, position_gradient_kernel
from .inputs import SHORT, Inputs, describable, launch_grid

_LARGEST = 0x7FFF0000
_DIMS = (32, 64)
_QUERIES, _STAGES, _BUFFERS = 64, 3, 2
# Of each thread: of the two score groups, the dq group, the producer. With less, ptxas ignores all of them.
_REGISTERS, _REGISTERS_BIASED = (208, 72, 24), (192, 64, 64)
_COPIES = 4  # of the position table's sums, so that few programs add to one place at a time


def ragged(tensor: torch.Tensor, rows: int) -> TensorDescriptor:
    """A descriptor of (T, h, d) for `rows` tokens of one head, which ends where a sequence does.

    Row r of a sequence of n tokens that ends at token e is at (2^30, e, 2^30 - n + r, column): rows from n on are
    beyond the third dimension, read as zero and not written. The first two strides make the address right: 2^30 times
    (2^34 - stride + stride) elements are a multiple of 2^64 bytes.
    """
    _, heads, dim = tensor.shape
    dtype = {torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}[tensor.dtype]
    stride = tensor.stride(0)
    block = [1, 1, rows, dim]
    return TensorDescriptor(
        tensor,
        [_LARGEST, _LARGEST, BILLION.value, heads * dim],
        [2**34 - stride, stride, stride, 1],
        block,
        gl.NVMMASharedLayout.get_default_for(block, dtype),
    )


def fits(inputs: Inputs, grad: torch.Tensor) -> bool:
    """Whether the backward pass of a call goes to Hopper's kernel: bfloat16, silu, the causal mask and one N, no time
    bias, heads of 32 or 64, in rows longer than a few tiles."""
    tensors = (inputs.q, inputs.k, inputs.v, grad)
    return (
        inputs.q.is_cuda
        and torch.cuda.get_device_capability(inputs.q.device)[0] == 9
        and all(tensor.dtype == torch.bfloat16 and tensor.shape[2] in _DIMS for tensor in tensors)
        and not inputs.general
        and not (inputs.softmax or inputs.timed)
        and inputs.max_len > SHORT
        and len(inputs.q) <= BILLION.value
        and all(describable(tensor) and tensor.stride(0) > 0 for tensor in tensors)
    )


def backward(
    inputs: Inputs, spread: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """dq in float32, dk and dv of a call that `fits`; and the position table's gradient, None where there is none.
    `spread`: that of `prepare.Handed`."""
    q, k, v = inputs.q, inputs.k, inputs.v
    dq = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    dk, dv = torch.empty_like(k, memory_format=torch.contiguous_format), v.new_empty(v.shape)
    table, group, scale = inputs.position_bias, GROUP.value, inputs.attention_scale
    blocks = triton.cdiv(inputs.max_len, SIDE.value) * (SIDE.value // 8) + BEFORE.value
    sums = dq.new_zeros(0 if table is None else _COPIES, blocks, 8, 8)
    tiles = triton.cdiv(inputs.max_len, 2 * group)
    of_scores, of_dq, of_other = _REGISTERS if table is None else _REGISTERS_BIASED
    hopper_backward_kernel[launch_grid(tiles * q.shape[1], inputs.num_sequences)](
        ragged(q, _QUERIES), ragged(k, group), ragged(v, group), ragged(grad, _QUERIES), ragged(dq, _QUERIES),
        ragged(dk, group), ragged(dv, group), inputs.offsets, inputs.alpha, 1.0 if scale is None else scale, tiles,
        spread, sums, inputs.position_zero, blocks, COPIES=_COPIES,
        SIZES=Sizes(_QUERIES, q.shape[2], v.shape[2], _STAGES, _BUFFERS, table is not None, scale is None),
        SCORE_REGISTERS=of_scores, DQ_REGISTERS=of_dq, OTHER_REGISTERS=of_other, num_warps=4,
    )  # fmt: skip
    if table is None:
        return dq, dk, dv, None
    dp, block = torch.empty_like(table), 128
    position_gradient_kernel[(triton.cdiv(len(dp), block),)](
        sums, dp, inputs.position_zero, blocks, COPIES=_COPIES, BLOCK=block
    )
    return dq, dk, dv, dp
