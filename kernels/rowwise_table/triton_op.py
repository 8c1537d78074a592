"""A step of rowwise Adagrad in one kernel: a program holds some whole rows, in float32.

Memory traffic: each row's gradient and sum are read once, its sum is written, and its vector is read and written.
Rounding needs 13 random bits a float of float16, from one seed a step: nothing random is stored. Every gradient is
added up by one program in the order in which it stands: the result is the same each time.
"""
# A kernel's arguments have no Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

import torch
import triton
import triton.language as tl

from ..common import configuration
from ..layer_norm.triton_op import shape_class
from .naive import DROPPED

_DROPPED = tl.constexpr(DROPPED)


@triton.jit
def _stochastically(value, seed_ptr, row, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """float32 (R, C) to float32 that float16 has, but for its range; as `naive.stochastically`.

    Philox makes four words of a counter, so counter (row (R,), c) serves columns 4c to 4c + 3 of that row of the table.
    """
    zero = tl.zeros((ROWS, COLUMNS // 4), tl.int32)
    quarter = tl.arange(0, COLUMNS // 4)[None, :]
    low = zero + row.to(tl.int32)[:, None]
    high = zero + (row >> 32).to(tl.int32)[:, None]
    a, b, c, d = tl.philox(tl.load(seed_ptr), low, high, zero + quarter, zero)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (ROWS, COLUMNS))
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.add(bits, (words >> (32 - _DROPPED)).to(tl.int32), sanitize_overflow=False)
    rounded = ((bits >> _DROPPED) << _DROPPED).to(tl.float32, bitcast=True)
    return tl.where(value == value, rounded, value)  # more bits would make a number of the GPU's NaN


@triton.jit(do_not_specialize=["n"])
def rowwise_adagrad_kernel(
    weight_ptr, sums_ptr, rows_ptr, order_ptr, gradient_ptr, seed_ptr, n, lr, eps,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, REPEATED: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """REPEATED: equal rows stand one after the other, and row i's gradient at order[i]; the first of them does all."""
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)[None, :]
    here = place < n
    row = tl.load(rows_ptr + place, mask=here, other=0).to(tl.int64)  # row D passes 2^31 in a large table
    if REPEATED:
        here &= row != tl.load(rows_ptr + place - 1, mask=here & (place > 0), other=-1)
        gradient = tl.zeros((ROWS, COLUMNS), tl.float32)
        more = here
        while tl.max(more.to(tl.int32), 0) > 0:
            source = gradient_ptr + tl.load(order_ptr + place, mask=more, other=0)[:, None] * D + columns
            gradient += tl.load(source, mask=more[:, None] & (columns < D), other=0.0).to(tl.float32)
            place += 1
            more &= place < n
            more &= row == tl.load(rows_ptr + place, mask=more, other=-1)
    else:
        source = gradient_ptr + place[:, None] * D + columns
        gradient = tl.load(source, mask=here[:, None] & (columns < D), other=0.0).to(tl.float32)
    inside = here[:, None] & (columns < D)
    vector = weight_ptr + row[:, None] * D + columns
    before = tl.load(sums_ptr + row, mask=here, other=0.0).to(tl.float32)
    value = tl.load(vector, mask=inside, other=0.0).to(tl.float32)
    after = before + tl.sum(gradient * gradient, 1) / D
    value -= tl.div_rn(lr, tl.sqrt_rn(after) + eps)[:, None] * gradient
    if STOCHASTIC:
        value = _stochastically(value, seed_ptr, row, ROWS, COLUMNS)
    tl.debug_barrier()  # several threads may have read what one of them writes now
    tl.store(sums_ptr + row, after, mask=here)
    tl.store(vector, value, mask=inside)


def update(
    weight: torch.Tensor, sums: torch.Tensor, rows: torch.Tensor, gradient: torch.Tensor, lr: float, eps: float
) -> None:
    """`naive.update`: unique rows. One may stand there again where its gradients are 0: all write what it was."""
    _launch(weight, sums, rows, None, gradient, lr, eps)


def update_repeated(
    weight: torch.Tensor, sums: torch.Tensor, rows: torch.Tensor, gradient: torch.Tensor, lr: float, eps: float
) -> None:
    """`naive.update_repeated`: rows that may stand there several times."""
    ordered, order = rows.sort(stable=True)
    _launch(weight, sums, ordered, order, gradient, lr, eps)


def _launch(
    weight: torch.Tensor,
    sums: torch.Tensor,
    rows: torch.Tensor,
    order: torch.Tensor | None,
    gradient: torch.Tensor,
    lr: float,
    eps: float,
) -> None:
    """weight and sums are contiguous, as they change in place."""
    n, width = gradient.shape
    if not gradient.numel():
        return
    entry = configuration("rowwise_adagrad", shape_class(width), weight.device)
    columns = max(16, triton.next_power_of_2(width))
    block = max(1, entry["block_elements"] // columns)
    # A tensor on the device, from torch's generator: no synchronisation, and a replayed CUDA graph draws anew.
    stochastic = weight.dtype == torch.float16
    seed = torch.randint(2**63 - 1, (1,), device=weight.device) if stochastic else None
    with torch.cuda.device_of(weight):
        rowwise_adagrad_kernel[(triton.cdiv(n, block),)](
            weight, sums, rows.contiguous(), order, gradient.contiguous(), seed, n, float(lr), float(eps),
            D=width, ROWS=block, COLUMNS=columns, REPEATED=order is not None, STOCHASTIC=stochastic,
            num_warps=entry["num_warps"],
        )  # fmt: skip
