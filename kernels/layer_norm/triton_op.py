"""Layer norm in one kernel each way: a program holds some whole rows, statistics are float32.

Memory traffic, counting each element read or written once: forward 2 T D, backward 3 T D. Nothing is saved but the
input: statistics are computed again. Gradients of weight and bias are summed within a program, in its fixed order, and
by torch over the programs.
"""
# A kernel's arguments have no Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl

from ..common import configuration, first_derivatives_only, reverse_mode_only


@triton.jit
def normalise(x, inside, D: tl.constexpr, EPS: tl.constexpr):
    """Rows of float32 (R, C), zero outside, to their layer norm, zero outside, and 1 / standard deviation (R, 1)."""
    centred = tl.where(inside, x - tl.sum(x, 1, keep_dims=True) / D, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1, keep_dims=True) / D + EPS)
    return centred * rstd, rstd


@triton.jit
def normalise_backward(gradient, xhat, rstd, D: tl.constexpr):
    """The gradient of a row from that of its layer norm; both are zero outside the row."""
    mean = tl.sum(gradient, 1, keep_dims=True) / D
    along = tl.sum(gradient * xhat, 1, keep_dims=True) / D
    return rstd * (gradient - mean - xhat * along)


@triton.jit(do_not_specialize=["tokens"])
def layer_norm_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, tokens,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EPS: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS  # T and T D may pass 2^31; offsets within a tile do not
    columns = tl.arange(0, COLUMNS)[None, :]
    inside = (first + tl.arange(0, ROWS)[:, None] < tokens) & (columns < D)
    start = first * D
    at = tl.arange(0, ROWS)[:, None] * D + columns
    out, _ = normalise(tl.load(x_ptr + start + at, mask=inside, other=0.0).to(tl.float32), columns < D, D, EPS)
    if AFFINE:
        out *= tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
        out += tl.load(bias_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + start + at, out, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def layer_norm_backward_kernel(
    gradient_ptr, x_ptr, weight_ptr, dx_ptr, sums_ptr, tokens,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EPS: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """dx; AFFINE: also the program's sums for the weight and for the bias, (programs, 2, D) float32."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    columns = tl.arange(0, COLUMNS)[None, :]
    inside = (first + tl.arange(0, ROWS)[:, None] < tokens) & (columns < D)
    start = first * D
    at = tl.arange(0, ROWS)[:, None] * D + columns
    gradient = tl.load(gradient_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
    xhat, rstd = normalise(x, columns < D, D, EPS)
    if AFFINE:
        across = tl.arange(0, COLUMNS)
        sums = sums_ptr + tl.program_id(0).to(tl.int64) * 2 * D + across
        tl.store(sums, tl.sum(gradient * xhat, 0), mask=across < D)
        tl.store(sums + D, tl.sum(gradient, 0), mask=across < D)
        gradient *= tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    tl.store(dx_ptr + start + at, normalise_backward(gradient, xhat, rstd, D), mask=inside)


@torch.library.custom_op("hstu::layer_norm", mutates_args=())
def layer_norm(x: torch.Tensor, eps: float, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    """`kernels.layer_norm.layer_norm` on tensors that Triton takes."""
    x = x.contiguous()
    weight, bias = (None if tensor is None else tensor.contiguous() for tensor in (weight, bias))
    out = torch.empty_like(x)
    if out.numel():
        grid, arguments = _launch("layer_norm_forward", x, eps, weight)
        with torch.cuda.device_of(x):
            layer_norm_forward_kernel[grid](x, weight, bias, out, **arguments)
    return out


@torch.library.custom_op("hstu::layer_norm_backward", mutates_args=())
def layer_norm_backward(
    gradient: torch.Tensor, x: torch.Tensor, eps: float, weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx, and the float32 gradients of weight and bias, (2, D); empty without a weight."""
    gradient, x = gradient.contiguous(), x.contiguous()
    weight = None if weight is None else weight.contiguous()
    dx = torch.empty_like(x)
    if not dx.numel():
        return dx, x.new_zeros(0 if weight is None else 2, x.shape[1], dtype=torch.float32)
    grid, arguments = _launch("layer_norm_backward", x, eps, weight)
    sums = x.new_empty(0 if weight is None else grid[0], 2, x.shape[1], dtype=torch.float32)
    with torch.cuda.device_of(x):
        layer_norm_backward_kernel[grid](gradient, x, weight, dx, sums, **arguments)
    return dx, sums[0] if len(sums) == 1 else sums.sum(0) if len(sums) else sums.new_empty(0, x.shape[1])


@layer_norm.register_fake
def _(x: torch.Tensor, eps: float, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(x.shape)


@layer_norm_backward.register_fake
def _(
    gradient: torch.Tensor, x: torch.Tensor, eps: float, weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    sums = x.new_empty(0 if weight is None else 2, x.shape[1], dtype=torch.float32)
    return x.new_empty(x.shape), sums


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, ctx.eps, weight, bias = inputs
    ctx.bias_type = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    reverse_mode_only("layer_norm", gradient)
    x, weight = ctx.saved_tensors
    dx, sums = layer_norm_backward(gradient, x, ctx.eps, weight)
    if weight is None:
        return dx, None, None, None
    return dx, None, sums[0].to(weight.dtype), sums[1].to(ctx.bias_type)


layer_norm.register_autograd(_backward, setup_context=_setup_context)
first_derivatives_only("layer_norm", layer_norm_backward)


def shape_class(width: int) -> str:
    """The name of the launch parameters for rows of this width."""
    return next(name for name in ("64", "512", "8192") if width <= int(name))


def _launch(operation: str, x: torch.Tensor, eps: float, weight: torch.Tensor | None) -> tuple[tuple[int], Any]:
    tokens, width = x.shape
    entry = configuration(operation, shape_class(width), x.device)
    columns = max(16, triton.next_power_of_2(width))
    rows = max(1, entry["block_elements"] // columns)
    constants = {"D": width, "ROWS": rows, "COLUMNS": columns, "EPS": eps, "AFFINE": weight is not None}
    return (triton.cdiv(tokens, rows),), {"tokens": tokens, "num_warps": entry["num_warps"]} | constants
