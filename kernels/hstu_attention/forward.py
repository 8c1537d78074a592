"""Forward kernel: one program is one tile of queries of one sequence and head, and walks over the keys it sees."""
# A kernel's arguments have no Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..tensor_cores import operand
from .activations import exp_of, silu
from .arguments import MASK_NUMBERS, Bias, Buckets, Side, Tokens, WholeTiles
from .bias_tiles import add_time_steps, finite, first_near_key, tile_bias, times_since, unpack_tile
from .tiles import (
    is_query,
    key_tiles,
    load_keys,
    load_queries,
    one_over_n_of,
    other_tile_of,
    sequence_id,
    sequence_of,
    store_tile,
    tile_count,
    visible,
    whole_count,
    whole_key_tiles,
    whole_tile_of,
)

#: The first running maximum of softmax: finite, so that no difference of two is undefined.
_LOWEST = tl.constexpr(-1e30)


class Sums(NamedTuple):
    """What a program gathers: acc (queries, dv); for softmax the running maximum m_i and sum l_i of its weights."""

    acc: Any
    m_i: Any
    l_i: Any


@triton.jit
def _attend(sums, q_tile, queries, key, K, V, sequence, bias, buckets, alpha, SHAPE, FLAGS, MASK, CUT):
    """One tile of keys from position `key`: adds its weighted values.

    MASK: "none", and there every pair is seen; "whole", likewise where GENERAL; "band", which brings it with
    the bias; or "compare". CUT: the tile may end beyond the sequence.
    """
    BLOCK_N: tl.constexpr = SHAPE.BLOCK_N
    PRECISION: tl.constexpr = FLAGS.PRECISION
    STEPS: tl.constexpr = MASK == "none" or MASK == "whole"
    k_tile = load_keys(K, key, sequence, BLOCK_N, SHAPE.DQK, SHAPE.BLOCK_DQK, CUT, FLAGS)
    j = key + tl.arange(0, BLOCK_N)
    keys = Side(j, bias.tables.key_time, bias.key_since)
    i = queries.position
    x = tile_bias(
        bias, sequence, queries, keys, buckets.w_first, SHAPE.BLOCK_M, BLOCK_N, FLAGS, MASK == "band",
        STEPS, FLAGS.MMA_LAYOUT, True,
    )  # fmt: skip
    x = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * alpha + x
    if MASK == "band":
        x = finite(x, bias.tables.band)
    if FLAGS.TIME and STEPS:
        if buckets.last > buckets.first:
            x = add_time_steps(x, bias.tables, sequence, queries, keys, buckets, True, FLAGS)
    acc, m_i, l_i = sums.acc, sums.m_i, sums.l_i
    if FLAGS.SOFTMAX:
        if MASK == "compare":
            seen = visible(i[:, None], j[None, :], sequence, FLAGS)
            x = tl.where(seen & (j < sequence.n)[None, :], x, -float("inf"))
        m_new = tl.maximum(m_i, tl.max(x, 1))
        weights = exp_of(x - m_new[:, None])
        shrink = exp_of(m_i - m_new)
        l_i = l_i * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        m_i = m_new
    else:
        weights = silu(x, FLAGS.APPROXIMATE_TANH)
        if MASK == "compare":
            weights = tl.where(visible(i[:, None], j[None, :], sequence, FLAGS), weights, 0.0)
    v_tile = load_keys(V, key, sequence, BLOCK_N, SHAPE.DV, SHAPE.BLOCK_DV, CUT, FLAGS)
    weights = operand(weights, v_tile.dtype, PRECISION)
    acc = tl.dot(weights, v_tile, acc, input_precision=PRECISION)
    return Sums(acc, m_i, l_i)


@triton.jit(do_not_specialize=["num_tiles", "tiles_width", "total_tokens", "position_zero", *MASK_NUMBERS])
def forward_kernel(
    q, k, v, output, lse, sequences, tables, strides, alpha, attention_scale,
    num_tiles, tiles_width, total_tokens, position_zero, window, prefix, full, sinks, group,
    SHAPE: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of the longest sequence x heads of `launch_grid`. The last tiles of a sequence have the most keys
    and start first."""
    BLOCK_M: tl.constexpr = SHAPE.BLOCK_M
    BLOCK_N: tl.constexpr = SHAPE.BLOCK_N
    BLOCK_DV: tl.constexpr = SHAPE.BLOCK_DV
    EDGE: tl.constexpr = "band" if FLAGS.TIME else "compare"
    head = tl.program_id(0) // num_tiles
    tile = num_tiles - 1 - tl.program_id(0) % num_tiles
    sequence = sequence_of(sequences, sequence_id(), window, prefix, full, sinks, group, FLAGS)
    first = tile * BLOCK_M
    if first >= sequence.n:
        return
    if FLAGS.KEY_OFFSETS:
        if first + BLOCK_M <= sequence.first:
            return
    Q = Tokens(q, strides.q_token, strides.q_head, head)
    K = Tokens(k, strides.k_token, strides.k_head, head)
    V = Tokens(v, strides.v_token, strides.v_head, head)
    bias = Bias(tables, position_zero, tables.since + total_tokens if FLAGS.TIME else None)
    i = first + tl.arange(0, BLOCK_M)
    q_tile = load_queries(Q, first, sequence, BLOCK_M, SHAPE.DQK, SHAPE.BLOCK_DQK, False, FLAGS)
    sums = Sums(
        tl.zeros([BLOCK_M, BLOCK_DV], tl.float32),
        tl.full([BLOCK_M], _LOWEST, tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
    )
    queries = Side(
        i, tables.query_time, times_since(tables.since, sequence.start, i, is_query(i, sequence, FLAGS), FLAGS)
    )
    buckets = Buckets(0, 0, True, 0.0)
    end = tl.minimum(first + BLOCK_M, sequence.n)
    if FLAGS.GENERAL:
        runs = key_tiles(first, end, sequence, BLOCK_N, FLAGS)
        if FLAGS.WHOLE:
            whole_tiles = whole_key_tiles(first, end, runs, sequence, BLOCK_N, FLAGS)
            for index in range(whole_count(whole_tiles)):
                key = whole_tile_of(index, whole_tiles, runs) * BLOCK_N
                own = buckets
                if FLAGS.TIME:
                    row = (sequence.key_start // BLOCK_M + sequence_id() + tile).to(tl.int64) * tiles_width
                    own = unpack_tile(tl.load(tables.tiles + row + key // BLOCK_N), tables.time)
                sums = _attend(
                    sums, q_tile, queries, key, K, V, sequence, bias, own, alpha, SHAPE, FLAGS, "whole", False
                )
        else:
            whole_tiles = WholeTiles(0, 0, 0, 0)
        for index in range(tile_count(runs) - whole_count(whole_tiles)):
            key = other_tile_of(index, whole_tiles, runs) * BLOCK_N
            sums = _attend(
                sums, q_tile, queries, key, K, V, sequence, bias, buckets, alpha, SHAPE, FLAGS,
                "compare", True,
            )  # fmt: skip
    else:
        whole = end
        if FLAGS.DESCRIPTOR:  # the sequence's last tile of keys, where it is not full, is CUT, after the others
            whole = tl.minimum(end, sequence.n // BLOCK_N * BLOCK_N)
        if FLAGS.TIME:
            # Buckets of the next tile are looked up while the current one's products run. Near the diagonal the band
            # brings bias and mask.
            edge = tl.maximum(first_near_key(first), 0)
            tiles = tables.tiles + (sequence.start // BLOCK_M + sequence_id() + tile) * tiles_width
            buckets = unpack_tile(tl.load(tiles), tables.time)
            for key in range(0, edge, BLOCK_N):
                following = tl.load(tiles + key // BLOCK_N + 1)
                sums = _attend(
                    sums, q_tile, queries, key, K, V, sequence, bias, buckets, alpha, SHAPE, FLAGS, "none", False
                )
                buckets = unpack_tile(following, tables.time)
        else:
            edge = first // BLOCK_N * BLOCK_N
            for key in range(0, edge, BLOCK_N):
                sums = _attend(
                    sums, q_tile, queries, key, K, V, sequence, bias, buckets, alpha, SHAPE, FLAGS,
                    "none", False,
                )  # fmt: skip
        for key in range(edge, whole, BLOCK_N):
            sums = _attend(
                sums, q_tile, queries, key, K, V, sequence, bias, buckets, alpha, SHAPE, FLAGS,
                EDGE, False,
            )  # fmt: skip
        if FLAGS.DESCRIPTOR:
            if whole < end:
                sums = _attend(
                    sums, q_tile, queries, whole, K, V, sequence, bias, buckets, alpha, SHAPE, FLAGS,
                    EDGE, True,
                )  # fmt: skip

    acc = sums.acc
    if FLAGS.SOFTMAX:
        acc = acc / sums.l_i[:, None]
        lse_of_head = lse + head.to(tl.int64) * total_tokens
        tl.store(lse_of_head + sequence.start + i, sums.m_i + tl.log(sums.l_i), mask=is_query(i, sequence, FLAGS))
    else:
        acc = acc * one_over_n_of(attention_scale, i[:, None], sequence, FLAGS)
    OUT = Tokens(output, strides.o_token, strides.o_head, head)
    store_tile(OUT, acc, first, sequence, BLOCK_M, SHAPE.DV, BLOCK_DV, False, FLAGS.KEY_OFFSETS)
