"""Backward kernels of the bias tables: sums of score gradients, and the position table's gradient from them.

Of other masks than the causal one, `backward_bias_general` takes the sums.
"""
# A kernel's arguments have no Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .activations import weights_and_derivatives
from .arguments import MASK_NUMBERS, Bias, Buckets, Side, Tokens
from .assembly import add_to_entries
from .bias_tiles import (
    add_time_steps,
    band_pointers,
    exact_bucket,
    finite,
    first_near_key,
    load_band,
    tile_bias,
    times_since,
    unpack_tile,
)
from .tiles import is_query, load_tile, one_over_n, sequence_of, visible

#: The bit of a tile's entry that says that its int32 times were not cut.
_NOT_CUT = tl.constexpr(1 << 17)


class Sums(NamedTuple):
    """Pointers that a launch of `bias_gradient_kernel` adds to, or, the last, writes; None for a table not there."""

    position: Any  # (distances, BLOCK_M, BLOCK_N) float32, DETERMINISTIC (distances, splits, BLOCK_M, BLOCK_N)
    time: Any  # (copies, 256) float32, DETERMINISTIC a copy for each program
    band: Any  # (T, 2 BAND_BLOCK) float32: gradients of the biases that the band brings


@triton.jit
def add_to_buckets(
    time_sum, copy, tile_sum, seen, packed, buckets, scale, sequence, bias, small_edges, i, j, FLAGS, DETERMINISTIC
):  # fmt: skip
    """Adds a tile's score gradients, summed over heads, to the bucket sums: to `time_sum` (256,), a bucket a pass, or,
    where there are many buckets and not DETERMINISTIC, to `copy` in memory, element by element."""
    slot = tl.arange(0, 256)
    start, key_start, n, tables = sequence.start, sequence.key_start, sequence.n, bias.tables
    query = is_query(i, sequence, FLAGS)
    if buckets.first == buckets.last:
        time_sum += tl.where(slot == buckets.first, tl.sum(tile_sum) * scale, 0.0)
    elif packed >= _NOT_CUT:
        passed = tl.load(tables.since + start + i, mask=query, other=0)[:, None]
        passed -= tl.load(bias.key_since + key_start + j, mask=j < n, other=0)[None, :]
        bucket_tile = exact_bucket(passed, small_edges, FLAGS.INLINE_ASM)
        if DETERMINISTIC or buckets.last - buckets.first < 4:
            for bucket in range(buckets.first, buckets.last + 1):
                in_bucket = tl.sum(tl.where(bucket_tile == bucket, tile_sum, 0.0))
                time_sum += tl.where(slot == bucket, in_bucket * scale, 0.0)
        else:
            add_to_entries(copy, bucket_tile, tile_sum * scale, seen, FLAGS.INLINE_ASM and FLAGS.MMA_LAYOUT)
    else:
        query_times = tl.load(tables.query_time + start + i, mask=query, other=0)[:, None]
        key_times = tl.load(tables.key_time + key_start + j, mask=j < n, other=0)[None, :]
        for bucket in range(buckets.first, buckets.last + 1):
            inside = tl.abs(query_times - key_times) >= tl.load(tables.edges + bucket)
            inside &= tl.abs(query_times - key_times) < tl.load(tables.edges + bucket + 1)
            in_bucket = tl.sum(tl.where(inside, tile_sum, 0.0))
            time_sum += tl.where(slot == bucket, in_bucket * scale, 0.0)
    return time_sum


@triton.jit(
    do_not_specialize=[
        "num_sequences",
        "sequence_splits",
        "tile_splits",
        "copies",
        "lowest",
        "tiles_width",
        "total_tokens",
        "position_zero",
        *MASK_NUMBERS,
    ]
)
def bias_gradient_kernel(
    q, k, v, do, sums, lse, delta, sequences, tables, small_edges, strides, alpha, attention_scale, heads,
    num_sequences, sequence_splits, tile_splits, copies, lowest, tiles_width, total_tokens, position_zero, window,
    prefix, full, sinks, group, SHAPE: tl.constexpr, FLAGS: tl.constexpr, DETERMINISTIC: tl.constexpr,
):  # fmt: skip
    """Sums of score gradients for the bias tables, by the tiles' distance from the diagonal.

    Grid (distances x sequence splits x tile splits): a program takes every sequence_splits-th sequence and, of each,
    every tile_splits-th of the tiles whose first query is `distance` BLOCK_N beyond their first key. On these, an
    element's place in the tile decides its j - i, so the position sums stay one (BLOCK_M, BLOCK_N) tile however many
    go in; heads share the bias, so bucket sums are taken of their sum. Near the diagonal, where a tile has many
    buckets, this sum is written to the band's gradient, from which `band_gradient_kernel` takes the bucket sums.
    DETERMINISTIC, no two programs add to one place.
    """
    BLOCK_M: tl.constexpr = SHAPE.BLOCK_M
    BLOCK_N: tl.constexpr = SHAPE.BLOCK_N
    BLOCK_DQK: tl.constexpr = SHAPE.BLOCK_DQK
    BLOCK_DV: tl.constexpr = SHAPE.BLOCK_DV
    RATIO: tl.constexpr = BLOCK_M // BLOCK_N
    splits = sequence_splits * tile_splits
    distance = lowest + tl.program_id(0) // splits
    tile_split = tl.program_id(0) % splits // sequence_splits
    program = tl.program_id(0).to(tl.int64)
    bias = Bias(tables, position_zero, tables.since + total_tokens if FLAGS.TIME else None)
    slot = tl.arange(0, 256)
    position_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    time_sum = tl.zeros([256], tl.float32)
    for index in range(tl.program_id(0) % sequence_splits, num_sequences, sequence_splits):
        sequence = sequence_of(sequences, index, window, prefix, full, sinks, group, FLAGS)
        start, n = sequence.start, sequence.n
        scale = one_over_n(attention_scale, sequence, FLAGS)
        tile_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        tile_x = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        packed, buckets, near = 0, Buckets(0, 0, True, 0.0), False
        first_tile = tl.cdiv(tl.maximum(distance, 0), RATIO)
        end_tile = tl.minimum(tl.cdiv(n, BLOCK_M), tl.cdiv(tl.maximum(tl.cdiv(n, BLOCK_N) + distance, 0), RATIO))
        tiles = tl.maximum(end_tile - first_tile, 0)
        tiles = tl.cdiv(tl.maximum(tiles - tile_split, 0), tile_splits)
        for step in range(tiles * heads):
            tile = first_tile + tile_split + step // heads * tile_splits
            head = step % heads
            query = tile * BLOCK_M
            key_tile = tile * RATIO - distance
            key = key_tile * BLOCK_N
            Q = Tokens(q, strides.q_token, strides.q_head, head)
            K = Tokens(k, strides.k_token, strides.k_head, head)
            DO = Tokens(do, strides.o_token, strides.o_head, head)
            V = Tokens(v, strides.v_token, strides.v_head, head)
            q_tile = load_tile(Q, start + query, start + n, BLOCK_M, SHAPE.DQK, BLOCK_DQK, False, FLAGS)
            k_tile = load_tile(K, start + key, start + n, BLOCK_N, SHAPE.DQK, BLOCK_DQK, False, FLAGS)
            do_tile = load_tile(DO, start + query, start + n, BLOCK_M, SHAPE.DV, BLOCK_DV, False, FLAGS)
            v_tile = load_tile(V, start + key, start + n, BLOCK_N, SHAPE.DV, BLOCK_DV, False, FLAGS)
            i = query + tl.arange(0, BLOCK_M)
            j = key + tl.arange(0, BLOCK_N)
            if head == 0:
                tile_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                tile_x = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                queries = Side(i, tables.query_time, times_since(tables.since, start, i, i < n, FLAGS))
                keys = Side(j, tables.key_time, bias.key_since)
                if FLAGS.TIME:
                    packed = tl.load(tables.tiles + (start // BLOCK_M + index + tile) * tiles_width + key_tile)
                    buckets = unpack_tile(packed, tables.time)
                    near = key >= first_near_key(query)
                    if near:
                        tile_x = load_band(tables.band, sequence, i[:, None], j[None, :])
                if not near:
                    tile_x = tile_bias(
                        bias,
                        sequence,
                        queries,
                        keys,
                        buckets.w_first,
                        BLOCK_M,
                        BLOCK_N,
                        FLAGS,
                        False,
                        True,
                        False,
                        True,
                    )
                    if FLAGS.TIME:
                        if buckets.last > buckets.first:
                            tile_x = add_time_steps(tile_x, tables, sequence, queries, keys, buckets, True, FLAGS)
            x = tl.dot(q_tile, tl.trans(k_tile), input_precision=FLAGS.PRECISION) * alpha + tile_x
            if FLAGS.TIME:
                x = finite(x, tables.band)
            dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=FLAGS.PRECISION)
            lse_tile = tl.zeros([BLOCK_M], tl.float32)
            if FLAGS.SOFTMAX:
                lane = head.to(tl.int64) * total_tokens + start + i
                lse_tile = tl.load(lse + lane, mask=i < n, other=0.0)
                dp -= tl.load(delta + lane, mask=i < n, other=0.0)[:, None]
            _, dact = weights_and_derivatives(x, x, lse_tile[:, None], False, FLAGS)
            tile_sum += dp * dact
            if head == heads - 1:
                # Heads share the mask too, so it waits for their sum.
                seen = visible(i[:, None], j[None, :], sequence, FLAGS)
                seen = seen & (i < n)[:, None] & (j < n)[None, :]
                tile_sum = tl.where(seen, tile_sum, 0.0)
                if FLAGS.TIME:
                    if near:
                        pointers = band_pointers(sums.band, sequence, i[:, None], j[None, :])
                        tl.store(pointers, tile_sum * scale, mask=(i < n)[:, None])
                if FLAGS.TIME:
                    if not near:
                        time_sum = add_to_buckets(
                            time_sum, sums.time + program % copies * 256, tile_sum, seen, packed, buckets, scale,
                            sequence, bias, small_edges, i, j, FLAGS, DETERMINISTIC,
                        )  # fmt: skip
                if FLAGS.POSITION:
                    position_sum += tile_sum * scale
    if FLAGS.POSITION:
        element = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        copy = program if DETERMINISTIC else program // splits
        tl.atomic_add(sums.position + copy * BLOCK_M * BLOCK_N + element, position_sum, sem="relaxed")
    if FLAGS.TIME:
        tl.atomic_add(sums.time + program % copies * 256 + slot, time_sum, sem="relaxed")


@triton.jit(do_not_specialize=["distances", "lowest", "position_zero"])
def diagonal_sum_kernel(
    position_sums, gradient, distances, lowest, position_zero, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """dp from the tiles (distances, BLOCK_M, BLOCK_N) of position sums; grid (distances + BLOCK_M / BLOCK_N,).

    A program sums for i - j = window BLOCK_N + t, 0 <= t < BLOCK_N. In a tile `above` distances nearer, these are the
    elements whose row is above BLOCK_N + t beyond their column.
    """
    window = lowest - 1 + tl.program_id(0)
    row = tl.arange(0, BLOCK_M)[:, None]
    t = tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    for above in tl.static_range(-1, BLOCK_M // BLOCK_N):
        tile = window - above - lowest
        column = row - above * BLOCK_N - t[None, :]
        if (tile >= 0) & (tile < distances):
            pointers = position_sums + tile.to(tl.int64) * BLOCK_M * BLOCK_N + row * BLOCK_N + column
            total += tl.sum(tl.load(pointers, mask=(column >= 0) & (column < BLOCK_N), other=0.0), 0)
    index = position_zero - (window * BLOCK_N + t)
    tl.store(gradient + index, total, mask=(index >= 0) & (index <= 2 * position_zero))
