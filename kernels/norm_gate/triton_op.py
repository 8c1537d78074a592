"""The gate in one kernel each way: a program holds some whole rows, statistics are float32.

Memory traffic, counting each element read or written once: forward 3 T D (u, attended; out), backward 5 T D
(gradient, u, attended; two gradients). Nothing is saved but the inputs and the seed: statistics and mask are
computed again, which costs arithmetic but no traffic.
"""
# A kernel's arguments have no Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ..common import configuration, first_derivatives_only, reverse_mode_only
from ..layer_norm.triton_op import normalise, normalise_backward, shape_class
from .naive import LAYER_NORM_EPS

_EPS = tl.constexpr(LAYER_NORM_EPS)


@triton.jit
def _kept(seed_ptr, threshold, rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which elements of rows (R, 1) dropout keeps: a function of seed, row and column, whatever the block sizes.

    Philox makes four words of a counter, so counter (row, c) serves columns 4c to 4c + 3. A word, read as a
    signed integer, is uniform over -2^31 to 2^31 - 1.
    """
    zero = tl.zeros((ROWS, COLUMNS // 4), tl.int32)
    quarter = tl.arange(0, COLUMNS // 4)[None, :]
    a, b, c, d = tl.philox(tl.load(seed_ptr), zero + rows, zero + quarter, zero, zero)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (ROWS, COLUMNS))
    return words.to(tl.int32, bitcast=True) >= threshold


@triton.jit(do_not_specialize=["tokens", "threshold"])
def norm_gate_forward_kernel(
    u_ptr,
    attended_ptr,
    seed_ptr,
    out_ptr,
    tokens,
    threshold,
    scale,
    U_STRIDE: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    inside = (first + rows < tokens) & (columns < D)
    start = first * D  # T, T D and a few strides may pass 2^31; other offsets within a tile do not
    at = rows * D + columns
    u = tl.load(u_ptr + (first + rows) * U_STRIDE + columns, mask=inside, other=0.0).to(tl.float32)
    attended = tl.load(attended_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
    xhat, _ = normalise(attended, columns < D, D, _EPS)
    gated = u * xhat
    if DROPOUT:
        gated = tl.where(_kept(seed_ptr, threshold, (first + rows).to(tl.int32), ROWS, COLUMNS), gated * scale, 0.0)
    tl.store(out_ptr + start + at, gated, mask=inside)


@triton.jit(do_not_specialize=["tokens", "threshold"])
def norm_gate_backward_kernel(
    gradient_ptr,
    u_ptr,
    attended_ptr,
    seed_ptr,
    du_ptr,
    dattended_ptr,
    tokens,
    threshold,
    scale,
    U_STRIDE: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    inside = (first + rows < tokens) & (columns < D)
    start = first * D
    at = rows * D + columns
    gradient = tl.load(gradient_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + (first + rows) * U_STRIDE + columns, mask=inside, other=0.0).to(tl.float32)
    attended = tl.load(attended_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
    if DROPOUT:
        gradient = tl.where(
            _kept(seed_ptr, threshold, (first + rows).to(tl.int32), ROWS, COLUMNS), gradient * scale, 0.0
        )
    xhat, rstd = normalise(attended, columns < D, D, _EPS)
    tl.store(du_ptr + start + at, gradient * xhat, mask=inside)
    dattended = normalise_backward(gradient * u, xhat, rstd, D)
    tl.store(dattended_ptr + start + at, dattended, mask=inside)


def norm_gate(u: torch.Tensor, attended: torch.Tensor, dropout: float, training: bool) -> torch.Tensor:
    """`kernels.norm_gate.norm_gate` on tensors that Triton takes."""
    if not training or dropout == 0:
        return norm_gate_forward(u, attended, None, 0.0)
    # A tensor on the device, from torch's generator: no synchronisation, and a replayed CUDA graph draws anew.
    seed = torch.randint(2**63 - 1, (1,), device=u.device)
    return norm_gate_forward(u, attended, seed, dropout)


@torch.library.custom_op("hstu::norm_gate_forward", mutates_args=())
def norm_gate_forward(
    u: torch.Tensor, attended: torch.Tensor, seed: torch.Tensor | None, dropout: float
) -> torch.Tensor:
    """The gate of (T, D) inputs, dropped as the seed, int64 of one element, says; nothing is dropped without one."""
    u, attended = _rows(u), attended.contiguous()
    out = torch.empty_like(attended, dtype=torch.promote_types(u.dtype, attended.dtype))
    if out.numel():
        grid, arguments = _launch("norm_gate_forward", u, seed, dropout)
        with torch.cuda.device_of(u):
            norm_gate_forward_kernel[grid](u, attended, seed, out, **arguments)
    return out


@torch.library.custom_op("hstu::norm_gate_backward", mutates_args=())
def norm_gate_backward(
    gradient: torch.Tensor, u: torch.Tensor, attended: torch.Tensor, seed: torch.Tensor | None, dropout: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of u and attended."""
    gradient, u, attended = gradient.contiguous(), _rows(u), attended.contiguous()
    du, dattended = torch.empty_like(attended, dtype=u.dtype), torch.empty_like(attended)
    if gradient.numel():
        grid, arguments = _launch("norm_gate_backward", u, seed, dropout)
        with torch.cuda.device_of(u):
            norm_gate_backward_kernel[grid](gradient, u, attended, seed, du, dattended, **arguments)
    return du, dattended


@norm_gate_forward.register_fake
def _(u: torch.Tensor, attended: torch.Tensor, seed: torch.Tensor | None, dropout: float) -> torch.Tensor:
    return attended.new_empty(attended.shape, dtype=torch.promote_types(u.dtype, attended.dtype))


@norm_gate_backward.register_fake
def _(
    gradient: torch.Tensor, u: torch.Tensor, attended: torch.Tensor, seed: torch.Tensor | None, dropout: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return u.new_empty(u.shape), attended.new_empty(attended.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    u, attended, seed, ctx.dropout = inputs
    ctx.save_for_backward(u, attended, seed)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
    reverse_mode_only("norm_gate", gradient)
    du, dattended = norm_gate_backward(gradient, *ctx.saved_tensors, ctx.dropout)
    return du, dattended, None, None


norm_gate_forward.register_autograd(_backward, setup_context=_setup_context)
first_derivatives_only("norm_gate", norm_gate_backward)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x, copied only where the elements of a row are not neighbours."""
    return x if x.stride(1) == 1 else x.contiguous()


def _launch(
    operation: str, u: torch.Tensor, seed: torch.Tensor | None, dropout: float
) -> tuple[tuple[int], dict[str, Any]]:
    tokens, width = u.shape
    constants, options = _parameters(width, configuration(operation, shape_class(width), u.device))
    arguments = {
        "tokens": tokens,
        "threshold": round(dropout * 2**32) - 2**31,  # so many of the 2^32 words are below
        "scale": 1 / (1 - dropout),
        "U_STRIDE": u.stride(0),
        "DROPOUT": seed is not None,
    }
    return (triton.cdiv(tokens, constants["ROWS"]),), arguments | constants | options


def _parameters(width: int, entry: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """A kernel's constants and the compiler's options, from an entry of the table."""
    columns = max(16, triton.next_power_of_2(width))
    constants = {"D": width, "ROWS": max(1, entry["block_elements"] // columns), "COLUMNS": columns}
    return constants, {name: value for name, value in entry.items() if name.startswith("num_")}
