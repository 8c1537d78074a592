"""The projection in one kernel forward; backward in one kernel and one matrix product.

Memory traffic, counting each element read or written once and the weight not at all (it stays in L2):
- forward: T d + T K (x; out). A program normalises its rows once and multiplies them with tile after tile of W.
- backward kernel: 3 T d + 2 T K (x, gradient; dx, xhat, dz). A program sees whole rows of dz, so it also sums
  dz W^T and takes it through the layer norm, in registers; as two products and a layer norm of their own this
  would be 3 T d + T K more. x is read a second time after the loop, from L2 at best, which costs less than
  the registers that would hold it.
- dW = xhat^T dz, by torch: T d + T K. It sums over tokens, so it cannot share the other kernel's tiles
  without atomic additions, whose order changes from run to run.
Products: 2 T d K operations forward, 6 T d K backward (z again, dz W^T, xhat^T dz).
"""
# A kernel's arguments have no Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ..common import configuration, first_derivatives_only, reverse_mode_only, tf32_allowed
from ..layer_norm.triton_op import normalise, normalise_backward
from ..norm_gate.naive import LAYER_NORM_EPS
from ..tensor_cores import operand

_EPS = tl.constexpr(LAYER_NORM_EPS)


@triton.jit
def _normalised_rows(x_ptr, rows, left, D: tl.constexpr, BLOCK_D: tl.constexpr):
    across = tl.arange(0, BLOCK_D)[None, :]
    x = tl.load(x_ptr + rows * D + across, mask=(rows < left) & (across < D), other=0.0).to(tl.float32)
    return normalise(x, across < D, D, _EPS)


@triton.jit
def _weight_tile(weight_ptr, columns, D: tl.constexpr, K: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    across = tl.arange(0, BLOCK_D)[:, None]
    tile = tl.load(weight_ptr + across.to(tl.int64) * K + columns, mask=(across < D) & (columns < K), other=0.0)
    return operand(tile, tile.dtype, PRECISION)


@triton.jit(do_not_specialize=["tokens"])
def projection_forward_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    tokens,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_T  # T, T K and, for a wide product, some rows of it may pass 2^31
    left = tl.minimum(tokens - first, BLOCK_T).to(tl.int32)
    rows = tl.arange(0, BLOCK_T)[:, None]
    xhat, _ = _normalised_rows(x_ptr + first * D, rows, left, D, BLOCK_D)
    xhat = operand(xhat, x_ptr.dtype.element_ty, PRECISION)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)[None, :]
        weight = _weight_tile(weight_ptr, columns, D, K, BLOCK_D, PRECISION)
        z = tl.dot(xhat, weight, input_precision=PRECISION)
        out = z * tl.sigmoid(z)
        tl.store(out_ptr + (first + rows) * K + columns, out, mask=(rows < left) & (columns < K))


@triton.jit(do_not_specialize=["tokens"])
def projection_backward_kernel(
    gradient_ptr,
    x_ptr,
    weight_ptr,
    dx_ptr,
    xhat_ptr,
    dz_ptr,
    tokens,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_T
    left = tl.minimum(tokens - first, BLOCK_T).to(tl.int32)
    rows = tl.arange(0, BLOCK_T)[:, None]
    across = tl.arange(0, BLOCK_D)[None, :]
    inside = (rows < left) & (across < D)
    normalised, _ = _normalised_rows(x_ptr + first * D, rows, left, D, BLOCK_D)
    xhat = normalised.to(x_ptr.dtype.element_ty)
    tl.store(xhat_ptr + first * D + rows * D + across, xhat, mask=inside)
    xhat = operand(xhat, xhat.dtype, PRECISION)
    dxhat = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    line = (first + rows) * K
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)[None, :]
        weight = _weight_tile(weight_ptr, columns, D, K, BLOCK_D, PRECISION)
        mask = (rows < left) & (columns < K)
        gradient = tl.load(gradient_ptr + line + columns, mask=mask, other=0.0).to(tl.float32)
        z = tl.dot(xhat, weight, input_precision=PRECISION)
        sigmoid = tl.sigmoid(z)
        dz = (gradient * sigmoid * (1 + z * (1 - sigmoid))).to(x_ptr.dtype.element_ty)
        tl.store(dz_ptr + line + columns, dz, mask=mask)
        dxhat = tl.dot(operand(dz, dz.dtype, PRECISION), tl.trans(weight), dxhat, input_precision=PRECISION)
    normalised, rstd = _normalised_rows(x_ptr + first * D, rows, left, D, BLOCK_D)
    dx = normalise_backward(dxhat, normalised, rstd, D)
    tl.store(dx_ptr + first * D + rows * D + across, dx, mask=inside)


@torch.library.custom_op("hstu::projection_forward", mutates_args=())
def projection(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`kernels.projection.projection` on tensors that Triton takes."""
    x, weight = x.contiguous(), weight.contiguous()
    out = x.new_empty(len(x), weight.shape[1])
    if out.numel():
        grid, arguments = _launch("projection_forward", x, weight)
        with torch.cuda.device_of(x):
            projection_forward_kernel[grid](x, weight, out, **arguments)
    return out


@torch.library.custom_op("hstu::projection_backward", mutates_args=())
def projection_backward(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradient of x; LN(x) (T, d) and the gradient of the product (T, K), which make the gradient of W."""
    gradient, x, weight = gradient.contiguous(), x.contiguous(), weight.contiguous()
    dx, xhat, dz = torch.empty_like(x), torch.empty_like(x), torch.empty_like(gradient)
    if gradient.numel():
        grid, arguments = _launch("projection_backward", x, weight)
        with torch.cuda.device_of(x):
            projection_backward_kernel[grid](gradient, x, weight, dx, xhat, dz, **arguments)
    return dx, xhat, dz


@projection.register_fake
def _(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@projection_backward.register_fake
def _(gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), gradient.new_empty(gradient.shape)


def _setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    reverse_mode_only("projection", gradient)
    dx, xhat, dz = projection_backward(gradient, *ctx.saved_tensors)
    return dx, xhat.T @ dz


projection.register_autograd(_backward, setup_context=_setup_context)
first_derivatives_only("projection", projection_backward)


def _launch(operation: str, x: torch.Tensor, weight: torch.Tensor) -> tuple[tuple[int], dict[str, Any]]:
    (tokens, d), k = x.shape, weight.shape[1]
    constants, options = _parameters(d, k, configuration(operation, _shape_class(d, x.dtype), x.device))
    constants["PRECISION"] = "tf32" if tf32_allowed() else "ieee"
    return (triton.cdiv(tokens, constants["BLOCK_T"]),), {"tokens": tokens} | constants | options


def _shape_class(d: int, dtype: torch.dtype) -> str:
    """The name of the launch parameters for rows of this width and type."""
    width = next(limit for limit in (64, 256, 512) if d <= limit)
    return f"{width} {'single' if dtype == torch.float32 else 'half'}"


def _parameters(d: int, k: int, entry: Mapping[str, int]) -> tuple[dict[str, Any], dict[str, int]]:
    """A kernel's constants and the compiler's options, from an entry of the table."""
    constants = {
        "D": d,
        "K": k,
        "BLOCK_T": entry["block_tokens"],
        "BLOCK_D": max(16, triton.next_power_of_2(d)),
        "BLOCK_K": entry["block_columns"],
    }
    return constants, {name: value for name, value in entry.items() if name.startswith("num_")}
