"""The position bias in Hopper's backward kernel, and sums for its table's gradient, in tiles of 64 keys by 64 queries.

A thread of a warp group holds, of such a tile, pairs of neighbouring queries in two keys eight apart. As `parts`, the
tile falls into 2 x 8 tensors of (4 warps, 8 keys, 8 queries), of which a thread has two elements each: what lies on
one diagonal is the same element of some of them, so that loads and sums are shared without a word between threads.
"""
# A kernel's arguments have no Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, assignment"

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .bias_tiles import spread_center

#: Keys and queries of a tile.
SIDE = gl.constexpr(64)
#: Blocks of eight distances before the diagonal's.
BEFORE = tl.constexpr(16)

SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
_PART = gl.constexpr(gl.BlockedLayout([1, 1, 2], [1, 8, 4], [4, 1, 1], [2, 1, 0]))


class Position(NamedTuple):
    """What the groups of a program share."""

    diagonal: Any  # pointer to p[0], of entries in falling order
    sums: Any  # pointer to the program's copy of the sums (blocks of eight distances, 8 keys, 8 queries)


@gluon.jit
def program_position(spread, sums, zero, blocks, copy):
    """`Position` of a program that adds to so many `blocks` of a `copy`."""
    center = spread_center(zero)
    # The third copy of the spread table is reversed: p[key - query] is at center + query - key.
    return Position(spread + 2 * (2 * center + 2).to(gl.int64) + center, sums + copy.to(gl.int64) * blocks * 64)


@gluon.jit
def parts_of(tile):
    """The 16 parts of a tile: of its warps' lower rows those of the eight blocks of columns, then of the upper rows."""
    found = (tile.reshape([4, 2, 8, 2, 2, 2, 8]).permute([0, 2, 6, 5, 4, 3, 1]),)
    for _ in gl.static_range(4):
        halves = ()
        for index in gl.static_range(len(found)):
            halves += gl.split(found[index])
        found = halves
    parts = ()
    for index in gl.static_range(16):
        parts += (gl.convert_layout(found[index], _PART, assert_trivial=True),)
    return parts


@gluon.jit
def whole_of(parts):
    """The tile of 16 parts."""
    for _ in gl.static_range(4):
        joined = ()
        for index in gl.static_range(len(parts) // 2):
            joined += (gl.join(parts[2 * index], parts[2 * index + 1]),)
        parts = joined
    tile = parts[0].permute([0, 6, 1, 5, 4, 3, 2]).reshape([64, 64])
    return gl.convert_layout(tile, SCORES, assert_trivial=True)


@gluon.jit
def places():
    """Numbers of a part's elements: their warp, key and query."""
    warp = gl.arange(0, 4, gl.SliceLayout(1, gl.SliceLayout(2, _PART)))
    key = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(2, _PART)))
    query = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, _PART)))
    return warp[:, None, None], key[None, :, None], query[None, None, :]


@gluon.jit
def position_bias(position, first_query, first_key):
    """p[key - query] of a tile: nine loads of two entries a thread."""
    warp, key, query = places()
    first = position.diagonal + (first_query - first_key) + (query - key - 16 * warp)
    found = ()
    for block in gl.static_range(-1, 8):
        found += (gl.load(first + 8 * block),)
    parts = ()
    for index in gl.static_range(16):
        parts += (found[index % 8 + 1 - index // 8],)
    return whole_of(parts)


@gluon.jit
def diagonals(tile):
    """Nine sums of the parts that are on one diagonal, from the lowest distance on."""
    parts = parts_of(tile)
    sums = (parts[8],)
    for index in gl.static_range(7):
        sums += (parts[index] + parts[index + 9],)
    sums += (parts[7],)
    return sums


@gluon.jit
def zero_diagonals():
    """`diagonals` of a tile of zeros."""
    sums = (gl.zeros([4, 8, 8], gl.float32, _PART),)
    for _ in gl.static_range(8):
        sums += (gl.zeros([4, 8, 8], gl.float32, _PART),)
    return sums


@gluon.jit
def added_diagonals(one, other):
    """Sums of `diagonals` of two tiles at one distance."""
    sums = (one[0] + other[0],)
    for index in gl.static_range(1, 9):
        sums += (one[index] + other[index],)
    return sums


@gluon.jit
def add_distances(position, first_query, first_key, sums, scale, COUNT: gl.constexpr):
    """Adds the first COUNT `diagonals` of a tile of score gradients, times `scale`, to the sums of their distances:
    8 m + query - key for m = 0, 1, ..."""
    warp, key, query = places()
    block = first_query // 8 - first_key // 8 + BEFORE - 2 * warp
    place = position.sums + (block.to(gl.int64) * 64 + key * 8 + query)
    for index in gl.static_range(COUNT):
        gl.atomic_add(place + 64 * (index - 1), sums[index] * scale, sem="relaxed")


@triton.jit(do_not_specialize=["zero", "blocks"])
def position_gradient_kernel(sums, dp, zero, blocks, COPIES: tl.constexpr, BLOCK: tl.constexpr):
    """dp (2P - 1,) from sums (COPIES, blocks, 8 keys, 8 queries), whose element (m, key, query) has the distance
    8 (m - BEFORE) + query - key. Grid: tiles of BLOCK entries."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    back = zero - entry  # how far the key is before the query
    total = tl.zeros([BLOCK], tl.float32)
    for key in tl.static_range(8):
        block = (back + key) // 8 + BEFORE
        place = sums + block.to(tl.int64) * 64 + key * 8 + (back + key) % 8
        for copy in tl.static_range(COPIES):
            pointers = place + copy * blocks.to(tl.int64) * 64
            total += tl.load(pointers, mask=(back >= 0) & (block < blocks), other=0.0)
    tl.store(dp + entry, total, mask=entry <= 2 * zero)
