"""Whether what `assembly` builds on, the layout of Hopper's score tiles, holds: tried before anything relies on it."""
# A kernel's arguments have no Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

import warnings
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .assembly import add_to_entries
from .bias_tiles import position_diagonals
from .prepare import spread_table


class Tile(NamedTuple):
    """What a tile's layout may depend on."""

    device: torch.device
    dtype: torch.dtype  # of the product's operands
    rows: int
    columns: int
    warps: int
    rows_are_queries: bool


@triton.jit
def mma_layout_kernel(
    zeros, spread, found, counts, position_zero, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS_ARE_QUERIES: tl.constexpr, INLINE_ASM: tl.constexpr,
):  # fmt: skip
    """A score tile as the attention kernels have it: a product plus the position bias, which becomes the operand of a
    second product, here with the identity. Writes what that gives; and adds 1 to `counts` at every element; both
    (ROWS, COLUMNS)."""
    row, column = tl.expand_dims(tl.arange(0, ROWS), 1), tl.expand_dims(tl.arange(0, COLUMNS), 0)
    across = tl.expand_dims(tl.arange(0, COLUMNS), 1)
    a = tl.load(zeros + row * COLUMNS + column)
    b = tl.load(zeros + across * COLUMNS + column)
    bias = position_diagonals(spread, position_zero, row, column, COLUMNS, ROWS_ARE_QUERIES, INLINE_ASM, True)
    x = tl.dot(a, tl.trans(b), input_precision="tf32") + bias
    add_to_entries(counts, row * COLUMNS + column, x * 0.0 + 1.0, x == x, INLINE_ASM)
    identity = tl.where(across == column, 1.0, 0.0).to(a.dtype)
    product = tl.dot(x.to(a.dtype), identity, input_precision="tf32")
    tl.store(found + row * COLUMNS + column, product)


def wrong_elements(tile: Tile, inline_asm: bool) -> int:
    """How many of a tile's elements are not what they should be, or are held by more than one thread."""
    device, longest = tile.device, max(tile.rows, tile.columns)
    # Whole numbers that every type holds, and TF32 too; others on neighbouring diagonals.
    table = (torch.arange(4 * longest + 1, device=device) * 37 % 251).float()
    zeros = torch.zeros(longest, tile.columns, dtype=tile.dtype, device=device)
    found, counts = torch.zeros(2, tile.rows, tile.columns, device=device)
    mma_layout_kernel[(1,)](
        zeros, spread_table(table), found, counts, 2 * longest, ROWS=tile.rows, COLUMNS=tile.columns,
        ROWS_ARE_QUERIES=tile.rows_are_queries, INLINE_ASM=inline_asm, num_warps=tile.warps,
    )  # fmt: skip
    distance = torch.arange(tile.columns, device=device) - torch.arange(tile.rows, device=device)[:, None]
    expected = table[2 * longest + (distance if tile.rows_are_queries else -distance)]
    return int(((found != expected) | (counts != 1)).sum())


_tried: dict[Tile, bool] = {}


def has_mma_layout(tile: Tile) -> bool:
    """Whether such tiles have Hopper's layout.

    They are tried at their first use, by one small launch that the host waits for. While a CUDA graph is captured the
    host cannot wait: a tile that was not tried before is then read entry by entry.
    """
    if tile not in _tried:
        if torch.cuda.is_current_stream_capturing():
            _warn(tile, "not tried before a CUDA graph was captured")
            return False
        try:
            wrong = wrong_elements(tile, inline_asm=True)
        except Exception as error:  # whatever a compiler says of assembly that it does not take
            _warn(tile, f"{type(error).__name__}: {error}")
            wrong = 1
        else:
            if wrong:
                _warn(tile, f"{wrong} elements are elsewhere")
        _tried[tile] = not wrong
    return _tried[tile]


def _warn(tile: Tile, reason: str) -> None:
    what = f"{tile.rows} x {tile.columns} tiles of {tile.dtype} in {tile.warps} warps"
    warnings.warn(f"attention reads its position bias entry by entry: {what}: {reason}", stacklevel=2)
