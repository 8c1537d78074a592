"""The time bias in Hopper's backward kernel, and the sums of its table's gradient, in tiles of 64 keys by 64 queries.

Near the diagonal, bias and mask come from the band, and score gradients go to memory, as a tile has many buckets there.
Elsewhere a tile has one bucket or a few: at each edge between two the bias takes a step.
"""
# A kernel's arguments have no Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, assignment"

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .bias_tiles import BAND_BLOCK, first_near_key
from .hopper_position import SCORES, SIDE, parts_of, places, whole_of
from .prepare import add_runs
from .tiles import sequence_id

BUCKETS = tl.constexpr(129)
#: Threads' own places in a bucket's sum.
LANES = tl.constexpr(256)
#: Queries whose score gradients go to memory, from the first of a block of 64 keys on.
NEAR = tl.constexpr(128)


#: Queries of a program of `near_gradient_kernel`.
NEAR_TILE = 16


class TimeTables(NamedTuple):
    """Pointers of what a call with a time bias reads and adds to; those of another call point anywhere."""

    tiles: Any  # `prepare.tile_bucket_kernel`, of tiles of 64 queries and 64 keys
    query_time: Any
    key_time: Any
    key_since: Any
    edges: Any
    sums: Any  # (copies, 129, LANES)
    weights: Any  # (129,)
    small_edges: Any  # `inputs.small_edges`
    cut: Any  # (sequences,) int32: whether times were cut


class TimePointers(NamedTuple):
    """Where a program's times are."""

    tiles: Any  # the entry of the program's first tile, of `prepare.tile_bucket_kernel`
    width: Any  # entries from a tile of queries to the next
    query_time: Any  # of the sequence's first token
    key_time: Any
    edges: Any  # int64
    sums: Any  # the program's copy (129, LANES)


class TileTimes(NamedTuple):
    """What is there of a tile, loaded a step ahead."""

    packed: Any  # its entry
    query_since: Any  # (64,) in shared memory
    key_since: Any  # (64,)
    weights: Any  # (256, 1) in shared memory: w
    edges: Any  # (256, 1) in shared memory


@gluon.jit
def in_band(query, key):
    """Whether the band has a tile's bias and mask."""
    return key >= query // BAND_BLOCK * BAND_BLOCK - BAND_BLOCK


@gluon.jit
def packed_buckets(pointers, step, group):
    """The entry of a program's tile; anything beyond the sequence."""
    return gl.load(pointers.tiles + (step * pointers.width + group))


@gluon.jit
def load_key_since(since, key, n):
    """Times of a tile's keys since the sequence's first one, of a pointer to that of the first."""
    key += gl.arange(0, SIDE, gl.SliceLayout(1, SCORES))
    return gl.load(since + key, mask=key < n, other=0)


@gluon.jit
def _entry(table, index):
    """An entry of a table in shared memory, (1, 1)."""
    return table.index(index).load(gl.SliceLayout(1, SCORES))[:, None]


@gluon.jit
def _query_since(times):
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return times.query_since._reinterpret(gl.int32, [SIDE], FLAT).load(gl.SliceLayout(0, SCORES))


@gluon.jit
def _is_past(times, query_since, bucket):
    """Where a tile's times are as far apart as the least of a bucket, either way."""
    edge = _entry(times.edges, bucket)
    key_since = times.key_since[:, None]
    return (key_since <= query_since[None, :] - edge) | (key_since >= query_since[None, :] + edge)


@gluon.jit
def _part_is_past(pointers, query, key, n, bucket, INDEX: gl.constexpr):
    """The same of a part, of the times themselves: beyond 17 years differences do not fit 32 bits."""
    edge = gl.load(pointers.edges + bucket)
    warp, part_key, part_query = places()
    part_query += query + INDEX % 8 * 8
    part_key += key + 16 * warp + INDEX // 8 * 8
    query_time = gl.load(pointers.query_time + part_query, mask=part_query < n, other=0)
    key_time = gl.load(pointers.key_time + part_key, mask=part_key < n, other=0)
    return (key_time <= query_time - edge) | (key_time >= query_time + edge)


@gluon.jit
def add_times(x, pointers, times, query, key, n, CUT: gl.constexpr):
    """x + w[bucket(query_time - key_time)] of a tile beyond the band. CUT: the sequence has times that were cut."""
    first, last = times.packed & 255, (times.packed >> 8) & 255
    x = x + _entry(times.weights, first)
    if first < last:
        if CUT:
            for bucket in range(first + 1, last + 1):
                found = ()
                for index in gl.static_range(16):
                    found += (gl.where(_part_is_past(pointers, query, key, n, bucket, index), 1.0, 0.0),)
                x = x + whole_of(found) * (_entry(times.weights, bucket) - _entry(times.weights, bucket - 1))
        else:
            query_since = _query_since(times)
            for bucket in range(first + 1, last + 1):
                step = _entry(times.weights, bucket) - _entry(times.weights, bucket - 1)
                x = x + gl.where(_is_past(times, query_since, bucket), step, 0.0)
    return x


@gluon.jit
def _added(parts):
    """The sum of 16 parts."""
    total = parts[0]
    for index in gl.static_range(1, 16):
        total += parts[index]
    return total


@gluon.jit
def add_buckets(pointers, times, query, key, n, ds, scale, CUT: gl.constexpr):
    """Adds a tile of score gradients, times `scale`, to the sums of their buckets, each thread in its place."""
    first, last = times.packed & 255, (times.packed >> 8) & 255
    warp, part_key, part_query = places()
    place = pointers.sums + (64 * warp + 8 * part_key + part_query)
    total = _added(parts_of(ds.to(gl.float32)))
    if first < last:
        if CUT:
            parts = parts_of(ds.to(gl.float32))
            for bucket in range(first + 1, last + 1):
                past = gl.where(_part_is_past(pointers, query, key, n, bucket, 0), parts[0], 0.0)
                for index in gl.static_range(1, 16):
                    past += gl.where(_part_is_past(pointers, query, key, n, bucket, index), parts[index], 0.0)
                gl.atomic_add(place + (bucket - 1) * LANES, (total - past) * scale, sem="relaxed")
                total = past
        else:
            query_since = _query_since(times)
            for bucket in range(first + 1, last + 1):
                past = _added(parts_of(gl.where(_is_past(times, query_since, bucket), ds.to(gl.float32), 0.0)))
                gl.atomic_add(place + (bucket - 1) * LANES, (total - past) * scale, sem="relaxed")
                total = past
    gl.atomic_add(place + last * LANES, total * scale, sem="relaxed")


@triton.jit(do_not_specialize=["attention_scale", "heads"])
def near_gradient_kernel(
    near, near_buckets, sums, offsets, attention_scale, heads, BY_LENGTH: tl.constexpr, COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the score gradients near the diagonal, (T keys, heads, NEAR queries), to bucket sums (COPIES, 256).
    Grid: tiles of BLOCK queries of `launch_grid`."""
    index, tile = sequence_id(), tl.program_id(0)
    start = tl.load(offsets + index)
    n = (tl.load(offsets + index + 1) - start).to(tl.int32)
    first = tile * BLOCK
    if first < n:
        i = first + tl.arange(0, BLOCK)
        column = tl.arange(0, 2 * BAND_BLOCK)
        key = first_near_key(first) + column
        block = key // 64 * 64  # whose first query is the first of the key's row in `near`
        seen = ((key >= 0) & (first < block + NEAR))[None, :] & (key[None, :] <= i[:, None]) & (i < n)[:, None]
        place = ((start + key) * (heads * NEAR) - block)[None, :] + i[:, None]
        gradient = tl.zeros([BLOCK, 2 * BAND_BLOCK], tl.float32)
        for head in tl.range(0, heads, loop_unroll_factor=4):
            gradient += tl.load(near + place + head * NEAR, mask=seen, other=0.0).to(tl.float32)
        if BY_LENGTH:
            gradient *= 1.0 / n.to(tl.float32)
        else:
            gradient *= 1.0 / attention_scale
        copy = (index.to(tl.int64) * tl.num_programs(0) + tile) % COPIES
        buckets = near_buckets + (start + i)[:, None] * (2 * BAND_BLOCK) + column[None, :]
        bucket = tl.load(buckets, mask=seen, other=0).to(tl.int32)
        add_runs(sums + copy * 256, gradient, bucket, buckets, seen, key[None, :] < i[:, None], column, BLOCK)


@triton.jit
def time_gradient_kernel(sums, near_sums, dw, COPIES: tl.constexpr, NEAR_COPIES: tl.constexpr):
    """dw (129,) from sums (COPIES, 129, LANES) and near ones (NEAR_COPIES, 256). Grid: entries of dw."""
    bucket = tl.program_id(0)
    total = tl.sum(tl.load(near_sums + tl.arange(0, NEAR_COPIES) * 256 + bucket))
    for copy in tl.static_range(COPIES):
        total += tl.sum(tl.load(sums + (copy * BUCKETS + bucket) * LANES + tl.arange(0, LANES)))
    tl.store(dw + bucket, total)
