"""The gate in one kernel each way: a program holds some whole rows of one head, statistics are float32.

Memory traffic, counting each element read or written once: forward 3 T D (u, attended; out), backward 5 T D
(gradient, u, attended; two gradients), and 2 T D more each way where u and attended stand beside the result. Nothing is
saved but the inputs and the seed: statistics and mask are computed again, which costs arithmetic but no traffic.
Gradients of weight and bias are summed within a program, in its fixed order, and by torch over the programs.
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
# Tokens that a program sums the gradients of (D,) weights over: its two sums of D are written and read once more.
_SUMMED = 32


@triton.jit
def _kept(seed_ptr, threshold, rows, head, PART: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which elements of rows (R, 1) dropout keeps: a function of seed, row, column, head and part of the result,
    whatever the block sizes.

    Philox makes four words of a counter, so counter (row, c, part, head) serves columns 4c to 4c + 3. A word, read as a
    signed integer, is uniform over -2^31 to 2^31 - 1.
    """
    zero = tl.zeros((ROWS, COLUMNS // 4), tl.int32)
    quarter = tl.arange(0, COLUMNS // 4)[None, :]
    a, b, c, d = tl.philox(tl.load(seed_ptr), zero + rows, zero + quarter, zero + PART, zero + head)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (ROWS, COLUMNS))
    return words.to(tl.int32, bitcast=True) >= threshold


@triton.jit
def _drop(
    tile, seed_ptr, threshold, scale, rows, head,
    PART: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Dropout of a tile of the result, or of its gradient. Part 0 is the gate, 1 u, 2 the attended."""
    if DROPOUT:
        tile = tl.where(_kept(seed_ptr, threshold, rows, head, PART, ROWS, COLUMNS), tile * scale, 0.0)
    return tile


@triton.jit
def _channels(parameter_ptr, head, columns, D: tl.constexpr, AFFINE: tl.constexpr):
    """What weight or bias has for a head's channels: (1, C), or one number."""
    if AFFINE == "head":
        return tl.load(parameter_ptr + head).to(tl.float32)
    else:  # a return behind a constant condition ends the function only so
        return tl.load(parameter_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["tokens", "threshold"])
def norm_gate_forward_kernel(
    u_ptr,
    attended_ptr,
    weight_ptr,
    bias_ptr,
    seed_ptr,
    out_ptr,
    tokens,
    threshold,
    scale,
    U_STRIDE: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DROPOUT: tl.constexpr,
    AFFINE: tl.constexpr,
    CONCAT_UX: tl.constexpr,
):
    """D: the channels that are normalised together, of HEADS times so many. AFFINE: of what weight and bias have an
    entry: none, channel or head."""
    WIDTH: tl.constexpr = HEADS * D
    OUT_WIDTH: tl.constexpr = 3 * WIDTH if CONCAT_UX else WIDTH
    head = tl.program_id(0) % HEADS
    first = (tl.program_id(0) // HEADS).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    inside = (first + rows < tokens) & (columns < D)
    row = (first + rows).to(tl.int32)
    channel = head * D  # T, T D and a few strides may pass 2^31; other offsets within a tile do not
    u = tl.load(u_ptr + channel + (first + rows) * U_STRIDE + columns, mask=inside, other=0.0).to(tl.float32)
    attended_at = attended_ptr + first * WIDTH + channel + rows * WIDTH + columns
    attended = tl.load(attended_at, mask=inside, other=0.0).to(tl.float32)
    normalised, _ = normalise(attended, columns < D, D, _EPS)
    if AFFINE != "none":
        normalised *= _channels(weight_ptr, head, columns, D, AFFINE)
        normalised += _channels(bias_ptr, head, columns, D, AFFINE)
    out = out_ptr + first * OUT_WIDTH + channel + rows * OUT_WIDTH + columns
    if CONCAT_UX:
        dropped = _drop(u, seed_ptr, threshold, scale, row, head, 1, ROWS, COLUMNS, DROPOUT)
        tl.store(out, dropped, mask=inside)
        dropped = _drop(attended, seed_ptr, threshold, scale, row, head, 2, ROWS, COLUMNS, DROPOUT)
        tl.store(out + WIDTH, dropped, mask=inside)
        out += 2 * WIDTH
    gated = _drop(u * normalised, seed_ptr, threshold, scale, row, head, 0, ROWS, COLUMNS, DROPOUT)
    tl.store(out, gated, mask=inside)


@triton.jit(do_not_specialize=["tokens", "threshold"])
def norm_gate_backward_kernel(
    gradient_ptr,
    u_ptr,
    attended_ptr,
    weight_ptr,
    bias_ptr,
    seed_ptr,
    du_ptr,
    dattended_ptr,
    sums_ptr,
    tokens,
    threshold,
    scale,
    U_STRIDE: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DROPOUT: tl.constexpr,
    AFFINE: tl.constexpr,
    CONCAT_UX: tl.constexpr,
):
    """du and dattended of STEPS x ROWS tokens; with an affine norm also their sums for weight and for bias, which are
    (programs of a head, 2, D or HEADS) float32."""
    WIDTH: tl.constexpr = HEADS * D
    OUT_WIDTH: tl.constexpr = 3 * WIDTH if CONCAT_UX else WIDTH
    head = tl.program_id(0) % HEADS
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    channel = head * D
    if AFFINE != "none":
        weight = _channels(weight_ptr, head, columns, D, AFFINE)
        bias = _channels(bias_ptr, head, columns, D, AFFINE)
        dweight = tl.zeros((ROWS, COLUMNS), tl.float32)
        dbias = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(STEPS):
        first = ((tl.program_id(0) // HEADS).to(tl.int64) * STEPS + step) * ROWS
        inside = (first + rows < tokens) & (columns < D)
        row = (first + rows).to(tl.int32)
        gradient_at = gradient_ptr + first * OUT_WIDTH + channel + rows * OUT_WIDTH + columns
        if CONCAT_UX:
            gradient = tl.load(gradient_at + 2 * WIDTH, mask=inside, other=0.0).to(tl.float32)
        else:
            gradient = tl.load(gradient_at, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(u_ptr + channel + (first + rows) * U_STRIDE + columns, mask=inside, other=0.0).to(tl.float32)
        start = first * WIDTH + channel
        at = rows * WIDTH + columns
        attended = tl.load(attended_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
        gradient = _drop(gradient, seed_ptr, threshold, scale, row, head, 0, ROWS, COLUMNS, DROPOUT)
        xhat, rstd = normalise(attended, columns < D, D, _EPS)
        if AFFINE != "none":
            du = gradient * (xhat * weight + bias)
            dnormalised = gradient * u
            dweight += dnormalised * xhat
            dbias += dnormalised
            dattended = normalise_backward(dnormalised * weight, xhat, rstd, D)
        else:
            du = gradient * xhat
            dattended = normalise_backward(gradient * u, xhat, rstd, D)
        if CONCAT_UX:
            gradient = tl.load(gradient_at, mask=inside, other=0.0).to(tl.float32)
            du += _drop(gradient, seed_ptr, threshold, scale, row, head, 1, ROWS, COLUMNS, DROPOUT)
            gradient = tl.load(gradient_at + WIDTH, mask=inside, other=0.0).to(tl.float32)
            dattended += _drop(gradient, seed_ptr, threshold, scale, row, head, 2, ROWS, COLUMNS, DROPOUT)
        tl.store(du_ptr + start + at, du, mask=inside)
        tl.store(dattended_ptr + start + at, dattended, mask=inside)
    if AFFINE == "channel":
        across = tl.arange(0, COLUMNS)
        sums = sums_ptr + tl.program_id(0).to(tl.int64) * 2 * D + across
        tl.store(sums, tl.sum(dweight, 0), mask=across < D)
        tl.store(sums + D, tl.sum(dbias, 0), mask=across < D)
    if AFFINE == "head":
        sums = sums_ptr + (tl.program_id(0) // HEADS).to(tl.int64) * 2 * HEADS + head
        tl.store(sums, tl.sum(tl.sum(dweight, 1), 0))
        tl.store(sums + HEADS, tl.sum(tl.sum(dbias, 1), 0))


def norm_gate(
    u: torch.Tensor,
    attended: torch.Tensor,
    dropout: float,
    training: bool,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    heads: int | None = None,
    concat_ux: bool = False,
) -> torch.Tensor:
    """`kernels.norm_gate.norm_gate` on tensors that Triton takes."""
    if not training or dropout == 0:
        return norm_gate_forward(u, attended, None, 0.0, weight, bias, heads, concat_ux)
    # A tensor on the device, from torch's generator: no synchronisation, and a replayed CUDA graph draws anew.
    seed = torch.randint(2**63 - 1, (1,), device=u.device)
    return norm_gate_forward(u, attended, seed, dropout, weight, bias, heads, concat_ux)


@torch.library.custom_op("hstu::norm_gate_forward", mutates_args=())
def norm_gate_forward(
    u: torch.Tensor,
    attended: torch.Tensor,
    seed: torch.Tensor | None,
    dropout: float,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    heads: int | None = None,
    concat_ux: bool = False,
) -> torch.Tensor:
    """The gate of (T, D) inputs, dropped as the seed, int64 of one element, says; nothing is dropped without one."""
    u, attended = _rows(u), attended.contiguous()
    weight, bias = (None if tensor is None else tensor.contiguous() for tensor in (weight, bias))
    tokens, width = attended.shape
    out = attended.new_empty(tokens, _out_width(width, concat_ux), dtype=torch.promote_types(u.dtype, attended.dtype))
    if out.numel():
        programs, arguments = _launch("norm_gate_forward", u, seed, dropout, weight, heads, concat_ux)
        with torch.cuda.device_of(u):
            norm_gate_forward_kernel[(programs * (heads or 1),)](u, attended, weight, bias, seed, out, **arguments)
    return out


@torch.library.custom_op("hstu::norm_gate_backward", mutates_args=())
def norm_gate_backward(
    gradient: torch.Tensor,
    u: torch.Tensor,
    attended: torch.Tensor,
    seed: torch.Tensor | None,
    dropout: float,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    heads: int | None,
    concat_ux: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of u and attended, and the float32 gradients of weight and bias, (2, D or heads); (0,) without."""
    gradient, u, attended = gradient.contiguous(), _rows(u), attended.contiguous()
    weight, bias = (None if tensor is None else tensor.contiguous() for tensor in (weight, bias))
    du, dattended = torch.empty_like(attended, dtype=u.dtype), torch.empty_like(attended)
    if not gradient.numel():
        return du, dattended, u.new_zeros(_sums_shape(weight), dtype=torch.float32)
    programs, arguments = _launch("norm_gate_backward", u, seed, dropout, weight, heads, concat_ux)
    sums = None if weight is None else u.new_empty(programs, 2, len(weight), dtype=torch.float32)
    with torch.cuda.device_of(u):
        norm_gate_backward_kernel[(programs * (heads or 1),)](
            gradient, u, attended, weight, bias, seed, du, dattended, sums, **arguments
        )
    return du, dattended, u.new_empty(0, dtype=torch.float32) if sums is None else sums.sum(0)


@norm_gate_forward.register_fake
def _(
    u: torch.Tensor,
    attended: torch.Tensor,
    seed: torch.Tensor | None,
    dropout: float,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    heads: int | None = None,
    concat_ux: bool = False,
) -> torch.Tensor:
    tokens, width = attended.shape
    return attended.new_empty(tokens, _out_width(width, concat_ux), dtype=torch.promote_types(u.dtype, attended.dtype))


@norm_gate_backward.register_fake
def _(
    gradient: torch.Tensor,
    u: torch.Tensor,
    attended: torch.Tensor,
    seed: torch.Tensor | None,
    dropout: float,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    heads: int | None,
    concat_ux: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sums = u.new_empty(_sums_shape(weight), dtype=torch.float32)
    return u.new_empty(u.shape), attended.new_empty(attended.shape), sums


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    u, attended, seed, ctx.dropout, weight, bias, ctx.heads, ctx.concat_ux = inputs
    ctx.save_for_backward(u, attended, seed, weight, bias)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    reverse_mode_only("norm_gate", gradient)
    u, attended, seed, weight, bias = ctx.saved_tensors
    du, dattended, sums = norm_gate_backward(
        gradient, u, attended, seed, ctx.dropout, weight, bias, ctx.heads, ctx.concat_ux
    )
    of_weight, of_bias = (None, None) if weight is None else (sums[0].to(weight.dtype), sums[1].to(bias.dtype))
    return du, dattended, None, None, of_weight, of_bias, None, None


norm_gate_forward.register_autograd(_backward, setup_context=_setup_context)
first_derivatives_only("norm_gate", norm_gate_backward)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x, copied only where the elements of a row are not neighbours."""
    return x if x.stride(1) == 1 else x.contiguous()


def _out_width(width: int, concat_ux: bool) -> int:
    return 3 * width if concat_ux else width


def _sums_shape(weight: torch.Tensor | None) -> tuple[int, ...]:
    return (0,) if weight is None else (2, weight.shape[0])


def _launch(
    operation: str,
    u: torch.Tensor,
    seed: torch.Tensor | None,
    dropout: float,
    weight: torch.Tensor | None,
    heads: int | None,
    concat_ux: bool,
) -> tuple[int, dict[str, Any]]:
    """How many programs a head gets, and their arguments."""
    tokens, width = len(u), u.shape[1] // (heads or 1)
    affine = "none" if weight is None else "channel" if heads is None else "head"
    summed = operation == "norm_gate_backward" and affine == "channel"
    entry = configuration(f"{operation}_affine" if summed else operation, shape_class(width), u.device)
    constants, options = _parameters(width, entry)
    arguments: dict[str, Any] = {
        "tokens": tokens,
        "threshold": round(dropout * 2**32) - 2**31,  # so many of the 2^32 words are below
        "scale": 1 / (1 - dropout),
        "U_STRIDE": u.stride(0),
        "HEADS": heads or 1,
        "DROPOUT": seed is not None,
        "AFFINE": affine,
        "CONCAT_UX": concat_ux,
    }
    rows = constants["ROWS"]  # of a step
    if operation == "norm_gate_backward":
        steps = max(1, _SUMMED // rows) if summed else 1
        arguments["STEPS"] = steps
        rows *= steps
    return triton.cdiv(tokens, rows), arguments | constants | options


def _parameters(width: int, entry: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """A kernel's constants and the compiler's options, from an entry of the table."""
    columns = max(16, triton.next_power_of_2(width))
    constants = {"D": width, "ROWS": max(1, entry["block_elements"] // columns), "COLUMNS": columns}
    return constants, {name: value for name, value in entry.items() if name.startswith("num_")}
