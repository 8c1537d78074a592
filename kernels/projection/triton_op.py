"""The projection in one kernel forward; backward in one kernel and one matrix product.

Memory traffic, counting each element read or written once and the weight not at all (it stays in L2):
- forward: T d + T K (x; out). A program normalises its rows once and multiplies them with tile after tile of W.
- backward kernel: 3 T d + 2 T K (x, gradient; dx, xhat, dz). A program sees whole rows of dz, so it also sums
  dz W^T and takes it through the layer norm, in registers; as two products and a layer norm of their own this
  would be 3 T d + T K more. x is read a second time after the loop, from L2 at best, which costs less than
  the registers that would hold it.
- dW = xhat^T dz, by torch: T d + T K. It sums over tokens, so it cannot share the other kernel's tiles
  without atomic additions, whose order changes from run to run.
- the gradients of the bias and of the norm's weight and bias: each program sums its rows, torch the programs.
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
def _affine(xhat, norm_weight_ptr, norm_bias_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Normalised rows times the norm's weight plus its bias; zero outside."""
    across = tl.arange(0, BLOCK_D)[None, :]
    xhat *= tl.load(norm_weight_ptr + across, mask=across < D, other=0.0).to(tl.float32)
    return xhat + tl.load(norm_bias_ptr + across, mask=across < D, other=0.0).to(tl.float32)


@triton.jit
def _weight_tile(weight_ptr, columns, D: tl.constexpr, K: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    across = tl.arange(0, BLOCK_D)[:, None]
    tile = tl.load(weight_ptr + across.to(tl.int64) * K + columns, mask=(across < D) & (columns < K), other=0.0)
    return operand(tile, tile.dtype, PRECISION)


@triton.jit(do_not_specialize=["tokens"])
def projection_forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    out_ptr,
    tokens,
    D: tl.constexpr,
    K: tl.constexpr,
    SILU_COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
    AFFINE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """SILU_COLUMNS: of the result, how many go through silu. BIAS, AFFINE: whether there is a bias of the product, and
    weight and bias of the norm."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_T  # T, T K and, for a wide product, some rows of it may pass 2^31
    left = tl.minimum(tokens - first, BLOCK_T).to(tl.int32)
    rows = tl.arange(0, BLOCK_T)[:, None]
    xhat, _ = _normalised_rows(x_ptr + first * D, rows, left, D, BLOCK_D)
    if AFFINE:
        xhat = _affine(xhat, norm_weight_ptr, norm_bias_ptr, D, BLOCK_D)
    xhat = operand(xhat, x_ptr.dtype.element_ty, PRECISION)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)[None, :]
        weight = _weight_tile(weight_ptr, columns, D, K, BLOCK_D, PRECISION)
        z = tl.dot(xhat, weight, input_precision=PRECISION)
        if BIAS:
            z += tl.load(bias_ptr + columns, mask=columns < K, other=0.0).to(tl.float32)
        out = z * tl.sigmoid(z)
        if SILU_COLUMNS < K:
            out = tl.where(columns < SILU_COLUMNS, out, z)
        tl.store(out_ptr + (first + rows) * K + columns, out, mask=(rows < left) & (columns < K))


@triton.jit(do_not_specialize=["tokens"])
def projection_backward_kernel(
    gradient_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    dx_ptr,
    xhat_ptr,
    dz_ptr,
    dbias_ptr,
    dnorm_ptr,
    tokens,
    D: tl.constexpr,
    K: tl.constexpr,
    SILU_COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
    AFFINE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dx; LN(x) and the product's gradient, which dW is made of; the program's sums for the bias, (programs, K), and
    for the norm's weight and bias, (programs, 2, D), float32."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_T
    left = tl.minimum(tokens - first, BLOCK_T).to(tl.int32)
    rows = tl.arange(0, BLOCK_T)[:, None]
    across = tl.arange(0, BLOCK_D)[None, :]
    inside = (rows < left) & (across < D)
    normalised, _ = _normalised_rows(x_ptr + first * D, rows, left, D, BLOCK_D)
    if AFFINE:
        normalised = _affine(normalised, norm_weight_ptr, norm_bias_ptr, D, BLOCK_D)
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
        if BIAS:
            z += tl.load(bias_ptr + columns, mask=columns < K, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(z)
        dz = gradient * sigmoid * (1 + z * (1 - sigmoid))
        if SILU_COLUMNS < K:
            dz = tl.where(columns < SILU_COLUMNS, dz, gradient)
        if BIAS:
            sums = dbias_ptr + tl.program_id(0).to(tl.int64) * K + columns
            tl.store(sums, tl.sum(dz, 0)[None, :], mask=columns < K)
        dz = dz.to(x_ptr.dtype.element_ty)
        tl.store(dz_ptr + line + columns, dz, mask=mask)
        dxhat = tl.dot(operand(dz, dz.dtype, PRECISION), tl.trans(weight), dxhat, input_precision=PRECISION)
    normalised, rstd = _normalised_rows(x_ptr + first * D, rows, left, D, BLOCK_D)
    if AFFINE:
        channels = tl.arange(0, BLOCK_D)
        sums = dnorm_ptr + tl.program_id(0).to(tl.int64) * 2 * D + channels
        tl.store(sums, tl.sum(dxhat * normalised, 0), mask=channels < D)
        tl.store(sums + D, tl.sum(dxhat, 0), mask=channels < D)
        dxhat *= tl.load(norm_weight_ptr + across, mask=across < D, other=0.0).to(tl.float32)
    dx = normalise_backward(dxhat, normalised, rstd, D)
    tl.store(dx_ptr + first * D + rows * D + across, dx, mask=inside)


@torch.library.custom_op("hstu::projection_forward", mutates_args=())
def projection(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    silu_columns: int | None = None,
) -> torch.Tensor:
    """`kernels.projection.projection` on tensors that Triton takes."""
    x, weight = x.contiguous(), weight.contiguous()
    vectors = [None if tensor is None else tensor.contiguous() for tensor in (bias, norm_weight, norm_bias)]
    out = x.new_empty(len(x), weight.shape[1])
    if out.numel():
        programs, arguments = _launch("projection_forward", x, weight, bias, norm_weight, silu_columns)
        with torch.cuda.device_of(x):
            projection_forward_kernel[(programs,)](x, weight, *vectors, out, **arguments)
    return out


@torch.library.custom_op("hstu::projection_backward", mutates_args=())
def projection_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    silu_columns: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradient of x; LN(x) (T, d) and the gradient of the product (T, K), which make the gradient of W; the float32
    gradients of the bias, (K,), and of the norm's weight and bias, (2, d); (0,) of what there is not."""
    gradient, x, weight = gradient.contiguous(), x.contiguous(), weight.contiguous()
    vectors = [None if tensor is None else tensor.contiguous() for tensor in (bias, norm_weight, norm_bias)]
    dx, xhat, dz = torch.empty_like(x), torch.empty_like(x), torch.empty_like(gradient)
    if not gradient.numel():
        dbias, dnorm = (x.new_zeros(shape, dtype=torch.float32) for shape in _sums_shapes(bias, norm_weight))
        return dx, xhat, dz, dbias, dnorm
    programs, arguments = _launch("projection_backward", x, weight, bias, norm_weight, silu_columns)
    sums = [
        None if shape == (0,) else x.new_empty(programs, *shape, dtype=torch.float32)
        for shape in _sums_shapes(bias, norm_weight)
    ]
    with torch.cuda.device_of(x):
        projection_backward_kernel[(programs,)](gradient, x, weight, *vectors, dx, xhat, dz, *sums, **arguments)
    dbias, dnorm = (x.new_empty(0, dtype=torch.float32) if tensor is None else tensor.sum(0) for tensor in sums)
    return dx, xhat, dz, dbias, dnorm


@projection.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    silu_columns: int | None = None,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@projection_backward.register_fake
def _(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    silu_columns: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dbias, dnorm = (x.new_empty(shape, dtype=torch.float32) for shape in _sums_shapes(bias, norm_weight))
    return x.new_empty(x.shape), x.new_empty(x.shape), gradient.new_empty(gradient.shape), dbias, dnorm


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.silu_columns = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    reverse_mode_only("projection", gradient)
    _, _, bias, norm_weight, norm_bias = ctx.saved_tensors
    dx, xhat, dz, dbias, dnorm = projection_backward(gradient, *ctx.saved_tensors, ctx.silu_columns)
    return (
        dx,
        xhat.T @ dz,
        None if bias is None else dbias.to(bias.dtype),
        None if norm_weight is None else dnorm[0].to(norm_weight.dtype),
        None if norm_bias is None else dnorm[1].to(norm_bias.dtype),
        None,
    )


projection.register_autograd(_backward, setup_context=_setup_context)
first_derivatives_only("projection", projection_backward)


def _sums_shapes(bias: torch.Tensor | None, norm_weight: torch.Tensor | None) -> list[tuple[int, ...]]:
    return [
        (0,) if bias is None else (bias.shape[0],),
        (0,) if norm_weight is None else (2, norm_weight.shape[0]),
    ]


def _launch(
    operation: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    silu_columns: int | None,
) -> tuple[int, dict[str, Any]]:
    """How many programs, and their arguments."""
    (tokens, d), k = x.shape, weight.shape[1]
    constants, options = _parameters(d, k, configuration(operation, _shape_class(d, x.dtype), x.device))
    constants |= {"SILU_COLUMNS": k if silu_columns is None else silu_columns}
    constants |= {"BIAS": bias is not None, "AFFINE": norm_weight is not None}
    constants["PRECISION"] = "tf32" if tf32_allowed() else "ieee"
    return triton.cdiv(tokens, constants["BLOCK_T"]), {"tokens": tokens} | constants | options


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
