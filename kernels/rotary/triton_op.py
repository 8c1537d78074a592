"""Rotary position embeddings in one kernel each way: a program holds some tokens, with all of their pairs of features.

Memory traffic, counting each element read or written once: forward 4 T H D, backward 6 T H D; and T D in each for
cosines and sines. The values are no part of the forward pass. The backward pass writes the gradients of queries, keys
and values side by side, as the product that made them needs it, where torch would put three tensors together.
"""
# A kernel's arguments have no Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl

from ..common import first_derivatives_only, reverse_mode_only

_BLOCK_PAIRS, _WARPS = 1024, 4  # 8 pairs a thread: of 16 bits a load of 16 bytes, and as many for the other features


@triton.jit
def _pairs(tokens, D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A program's first token; rows (R, 1) from there, the pairs' first features (1, C), and their angles (R, C) from
    the first token's; which pairs there are (R, C). A pair's other feature is HALF further."""
    first = tl.program_id(0).to(tl.int64) * ROWS  # T H D may pass 2^31; offsets within a tile do not
    rows, pair = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = (first + rows < tokens) & (pair < D // 2)
    return first, rows, pair // HALF * (2 * HALF) + pair % HALF, rows * HALF + pair % HALF, inside


@triton.jit(do_not_specialize=["tokens"])
def rotary_forward_kernel(
    qkv_ptr, cos_ptr, sin_ptr, out_ptr, tokens,
    D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """qkv: (T, 3, D), out: (T, 2, D), where D is all heads' features; cos, sin: (T, HALF)."""
    first, rows, feature, angle, inside = _pairs(tokens, D, HALF, ROWS, COLUMNS)
    cos = tl.load(cos_ptr + first * HALF + angle, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + first * HALF + angle, mask=inside, other=0.0)
    for part in tl.static_range(2):
        source = qkv_ptr + first * (3 * D) + part * D + rows * (3 * D) + feature
        x = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
        target = out_ptr + first * (2 * D) + part * D + rows * (2 * D) + feature
        tl.store(target, x * cos - y * sin, mask=inside)
        tl.store(target + HALF, x * sin + y * cos, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def rotary_backward_kernel(
    dq_ptr, dk_ptr, dv_ptr, cos_ptr, sin_ptr, dqkv_ptr, tokens,
    D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dq, dk, dv: (T, D), dqkv: (T, 3, D): queries and keys are turned back."""
    first, rows, feature, angle, inside = _pairs(tokens, D, HALF, ROWS, COLUMNS)
    cos = tl.load(cos_ptr + first * HALF + angle, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + first * HALF + angle, mask=inside, other=0.0)
    source = first * D + rows * D + feature
    target = dqkv_ptr + first * (3 * D) + rows * (3 * D) + feature
    x = tl.load(dq_ptr + source, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(dq_ptr + source + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(target, x * cos + y * sin, mask=inside)
    tl.store(target + HALF, y * cos - x * sin, mask=inside)
    x = tl.load(dk_ptr + source, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(dk_ptr + source + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(target + D, x * cos + y * sin, mask=inside)
    tl.store(target + D + HALF, y * cos - x * sin, mask=inside)
    tl.store(target + 2 * D, tl.load(dv_ptr + source, mask=inside, other=0.0), mask=inside)
    tl.store(target + 2 * D + HALF, tl.load(dv_ptr + source + HALF, mask=inside, other=0.0), mask=inside)


@torch.library.custom_op("hstu::rotary", mutates_args=())
def rotary_forward(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Queries and keys, turned: (T, 2, H, D) of (T, 3, H, D)."""
    qkv, cos, sin = qkv.contiguous(), cos.contiguous(), sin.contiguous()
    tokens, _, heads, width = qkv.shape
    out = qkv.new_empty(tokens, 2, heads, width)
    if out.numel():
        grid, arguments = _launch(tokens, heads, width)
        with torch.cuda.device_of(qkv):
            rotary_forward_kernel[grid](qkv, cos, sin, out, **arguments)
    return out


@torch.library.custom_op("hstu::rotary_backward", mutates_args=())
def rotary_backward(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """The gradient (T, 3, H, D) of those of turned queries and keys, and of values, each (T, H, D)."""
    dq, dk, dv, cos, sin = (tensor.contiguous() for tensor in (dq, dk, dv, cos, sin))
    tokens, heads, width = dq.shape
    dqkv = dq.new_empty(tokens, 3, heads, width)
    if dqkv.numel():
        grid, arguments = _launch(tokens, heads, width)
        with torch.cuda.device_of(dq):
            rotary_backward_kernel[grid](dq, dk, dv, cos, sin, dqkv, **arguments)
    return dqkv


@rotary_forward.register_fake
def _(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return qkv.new_empty(qkv.shape[0], 2, *qkv.shape[2:])


@rotary_backward.register_fake
def _(dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return dq.new_empty(dq.shape[0], 3, *dq.shape[1:])


first_derivatives_only("rotary", rotary_backward)


class _Rotary(torch.autograd.Function):
    # Not a derivative of the operators: of an operator no output may be a part of an input, as the values are here.
    @staticmethod
    def forward(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (*rotary_forward(qkv, cos, sin).unbind(1), qkv[:, 2])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        reverse_mode_only("rotary", *gradients)
        return rotary_backward(*gradients, *ctx.saved_tensors), None, None


def rotary(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`kernels.rotary.rotary` on tensors that Triton takes, of an even width. cos and sin get no gradient."""
    return _Rotary.apply(qkv, cos, sin)


def _launch(tokens: int, heads: int, width: int) -> tuple[tuple[int], dict[str, int]]:
    columns = triton.next_power_of_2(heads * width // 2)
    rows = max(1, _BLOCK_PAIRS // columns)
    constants = {"D": heads * width, "HALF": width // 2, "ROWS": rows, "COLUMNS": columns}
    return (triton.cdiv(tokens, rows),), {"tokens": tokens, "num_warps": _WARPS} | constants
