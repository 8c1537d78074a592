"""Backward kernel of queries alone."""
# A kernel's arguments have no Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..tensor_cores import operand
from .activations import weights_and_derivatives
from .arguments import MASK_NUMBERS, Bias, Buckets, Side, Tokens, WholeTiles
from .bias_tiles import add_time_steps, finite, first_near_key, tile_bias, times_since, unpack_tile
from .tiles import (
    is_query,
    key_tiles,
    load_keys,
    load_queries,
    one_over_n,
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


class Sums(NamedTuple):
    """What a program gathers: dq of its queries; and, where history tokens see targets, for the position bias the score
    gradients of each with all targets."""

    dq: Any
    targets: Any


class Queries(NamedTuple):
    """The tile that a program keeps: q, the output's gradient; softmax's denominators and deltas (queries,)."""

    q: Any
    do: Any
    side: Any
    lse: Any
    delta: Any


@triton.jit
def _add_keys(sums, kept, key, K, V, sequence, bias, buckets, alpha, scale, SHAPE, FLAGS, MASK, CUT):
    """One tile of keys from position `key`: adds what it brings. MASK and CUT as in the forward kernel's."""
    BLOCK_N: tl.constexpr = SHAPE.BLOCK_N
    PRECISION: tl.constexpr = FLAGS.PRECISION
    STEPS: tl.constexpr = MASK == "none" or MASK == "whole"
    k_tile = load_keys(K, key, sequence, BLOCK_N, SHAPE.DQK, SHAPE.BLOCK_DQK, CUT, FLAGS)
    v_tile = load_keys(V, key, sequence, BLOCK_N, SHAPE.DV, SHAPE.BLOCK_DV, CUT, FLAGS)
    j = key + tl.arange(0, BLOCK_N)
    i = kept.side.position
    keys = Side(j, bias.tables.key_time, bias.key_since)
    x = tile_bias(
        bias, sequence, kept.side, keys, buckets.w_first, SHAPE.BLOCK_M, BLOCK_N, FLAGS, MASK == "band",
        STEPS, FLAGS.MMA_LAYOUT, True,
    )  # fmt: skip
    x = tl.dot(kept.q, tl.trans(k_tile), input_precision=PRECISION) * alpha + x
    if MASK == "band":
        x = finite(x, bias.tables.band)
    if FLAGS.TIME and STEPS:
        if buckets.last > buckets.first:
            x = add_time_steps(x, bias.tables, sequence, kept.side, keys, buckets, True, FLAGS)
    dp = tl.dot(kept.do, tl.trans(v_tile), input_precision=PRECISION)
    seen = visible(i[:, None], j[None, :], sequence, FLAGS) & (j < sequence.n)[None, :]
    _, dact = weights_and_derivatives(x, seen, kept.lse[:, None], MASK == "compare", FLAGS)
    if FLAGS.SOFTMAX:
        dp -= kept.delta[:, None]
    ds = dp * dact * scale if kept.q.dtype == tl.float16 else dp * dact
    targets = sums.targets
    if FLAGS.BIDIRECTIONAL and FLAGS.TARGETS and FLAGS.POSITION:
        between = (i < sequence.history)[:, None] & (j >= sequence.history)[None, :]
        targets += tl.sum(tl.where(between, ds, 0.0), 1)
    dq = tl.dot(operand(ds, k_tile.dtype, PRECISION), k_tile, sums.dq, input_precision=PRECISION)
    return Sums(dq, targets)


@triton.jit(do_not_specialize=["num_tiles", "tiles_width", "total_tokens", "position_zero", *MASK_NUMBERS])
def bwd_dq_kernel(
    q, k, v, do, dq, target_sums, lse, delta, sequences, tables, strides, alpha, attention_scale, heads,
    num_tiles, tiles_width, total_tokens, position_zero, window, prefix, full, sinks, group,
    SHAPE: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries, in one fixed order of additions; recomputes scores: 7 products in all instead of 5.
    The grid and the walk over keys are the forward kernel's.

    Where history tokens see targets, and with a position bias, `target_sums` (T, h) get the sums of `Sums`.
    """
    BLOCK_M: tl.constexpr = SHAPE.BLOCK_M
    BLOCK_N: tl.constexpr = SHAPE.BLOCK_N
    BLOCK_DQK: tl.constexpr = SHAPE.BLOCK_DQK
    EDGE: tl.constexpr = "band" if FLAGS.TIME else "compare"
    head = tl.program_id(0) // num_tiles
    tile = num_tiles - 1 - tl.program_id(0) % num_tiles
    sequence = sequence_of(sequences, sequence_id(), window, prefix, full, sinks, group, FLAGS)
    start, n = sequence.start, sequence.n
    first = tile * BLOCK_M
    if first >= n:
        return
    if FLAGS.KEY_OFFSETS:
        if first + BLOCK_M <= sequence.first:
            return
    scale = one_over_n(attention_scale, sequence, FLAGS)
    bias = Bias(tables, position_zero, tables.since + total_tokens if FLAGS.TIME else None)
    Q = Tokens(q, strides.q_token, strides.q_head, head)
    K = Tokens(k, strides.k_token, strides.k_head, head)
    V = Tokens(v, strides.v_token, strides.v_head, head)
    DO = Tokens(do, strides.o_token, strides.o_head, head)
    i = first + tl.arange(0, BLOCK_M)
    if FLAGS.QUERY_SCALE:
        scale = one_over_n_of(attention_scale, i[:, None], sequence, FLAGS)
    q_tile = load_queries(Q, first, sequence, BLOCK_M, SHAPE.DQK, BLOCK_DQK, False, FLAGS)
    do_tile = load_queries(DO, first, sequence, BLOCK_M, SHAPE.DV, SHAPE.BLOCK_DV, False, FLAGS)
    lse_tile = tl.zeros([BLOCK_M], tl.float32)
    delta_tile = tl.zeros([BLOCK_M], tl.float32)
    if FLAGS.SOFTMAX:
        lse_of_head, delta_of_head = lse + head.to(tl.int64) * total_tokens, delta + head.to(tl.int64) * total_tokens
        lse_tile = tl.load(lse_of_head + start + i, mask=is_query(i, sequence, FLAGS), other=0.0)
        delta_tile = tl.load(delta_of_head + start + i, mask=is_query(i, sequence, FLAGS), other=0.0)
    queries = Side(
        i, tables.query_time, times_since(tables.since, sequence.start, i, is_query(i, sequence, FLAGS), FLAGS)
    )
    kept = Queries(q_tile, do_tile, queries, lse_tile, delta_tile)
    buckets = Buckets(0, 0, True, 0.0)
    sums = Sums(tl.zeros([BLOCK_M, BLOCK_DQK], tl.float32), tl.zeros([BLOCK_M], tl.float32))

    end = tl.minimum(first + BLOCK_M, n)
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
                sums = _add_keys(sums, kept, key, K, V, sequence, bias, own, alpha, scale, SHAPE, FLAGS, "whole", False)
        else:
            whole_tiles = WholeTiles(0, 0, 0, 0)
        for index in range(tile_count(runs) - whole_count(whole_tiles)):
            key = other_tile_of(index, whole_tiles, runs) * BLOCK_N
            sums = _add_keys(
                sums, kept, key, K, V, sequence, bias, buckets, alpha, scale, SHAPE, FLAGS, "compare", True
            )
    else:
        whole = end
        if FLAGS.DESCRIPTOR:  # the sequence's last tile of keys, where it is not full, is CUT, after the others
            whole = tl.minimum(end, n // BLOCK_N * BLOCK_N)
        if FLAGS.TIME:
            # Buckets of the next tile are looked up while the current one's products run. Near the diagonal the band
            # brings bias and mask.
            edge = tl.maximum(first_near_key(first), 0)
            tiles = tables.tiles + (start // BLOCK_M + sequence_id() + tile) * tiles_width
            buckets = unpack_tile(tl.load(tiles), tables.time)
            for key in range(0, edge, BLOCK_N):
                following = tl.load(tiles + key // BLOCK_N + 1)
                sums = _add_keys(
                    sums, kept, key, K, V, sequence, bias, buckets, alpha, scale, SHAPE, FLAGS, "none", False
                )
                buckets = unpack_tile(following, tables.time)
        else:
            edge = first // BLOCK_N * BLOCK_N
            for key in range(0, edge, BLOCK_N):
                sums = _add_keys(
                    sums, kept, key, K, V, sequence, bias, buckets, alpha, scale, SHAPE, FLAGS, "none", False
                )
        for key in range(edge, whole, BLOCK_N):
            sums = _add_keys(sums, kept, key, K, V, sequence, bias, buckets, alpha, scale, SHAPE, FLAGS, EDGE, False)
        if FLAGS.DESCRIPTOR:
            if whole < end:
                sums = _add_keys(
                    sums, kept, whole, K, V, sequence, bias, buckets, alpha, scale, SHAPE, FLAGS, EDGE, True
                )

    dq_tile = sums.dq * (alpha if q_tile.dtype == tl.float16 else alpha * scale)
    DQ = Tokens(dq, heads * SHAPE.DQK, SHAPE.DQK, head)
    store_tile(DQ, dq_tile, first, sequence, BLOCK_M, SHAPE.DQK, BLOCK_DQK, False, FLAGS.KEY_OFFSETS)
    if FLAGS.BIDIRECTIONAL and FLAGS.TARGETS and FLAGS.POSITION:
        of_targets = sums.targets
        if q_tile.dtype != tl.float16:
            of_targets *= one_over_n_of(attention_scale, i, sequence, FLAGS)
        tl.store(target_sums + (start + i) * heads + head, of_targets, mask=is_query(i, sequence, FLAGS))
