"""Backward kernel of keys and values, which can add up the gradients of queries on the way."""
# A kernel's arguments have no Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..tensor_cores import operand
from .activations import weights_and_derivatives
from .arguments import MASK_NUMBERS, Bias, Buckets, Side, Tokens, WholeTiles
from .bias_tiles import (
    BAND_BLOCK,
    HIDDEN,
    add_time_steps,
    finite,
    tile_bias,
    times_since,
    unpack_tile,
)
from .tiles import (
    is_query,
    load_keys,
    load_queries,
    one_over_n,
    one_over_n_of,
    other_tile_of,
    query_tiles,
    sequence_id,
    sequence_of,
    store_tile,
    tile_count,
    visible,
    whole_count,
    whole_query_tiles,
    whole_tile_of,
)


class Sums(NamedTuple):
    """What a program gathers: dk and dv of its keys; and score gradients of targets, those of other tokens' keys and
    those of their own, for the position bias."""

    dk: Any
    dv: Any
    targets: Any
    targets_own: Any


class Keys(NamedTuple):
    """The tile that a program keeps."""

    k: Any
    v: Any
    side: Any


class Queries(NamedTuple):
    """The tensors that it walks over: q, the output's gradient, dq; softmax's denominators and deltas (T,);
    QUERY_SCALE, every query's N (T,)."""

    Q: Any
    DO: Any
    DQ: Any
    lse: Any
    delta: Any
    attention_scale: Any


@triton.jit
def _add_queries(
    sums, kept, first, walked, sequence, bias, buckets, alpha, scale, SHAPE, FLAGS, MASK, CUT, ADD_DQ
):  # fmt: skip
    """One tile of queries from position `first`. Scores are held transposed, (keys, queries), so that weights and score
    gradients enter their products from registers.

    MASK as in the forward kernel. CUT: the tile may end beyond the sequence.
    """
    BLOCK_M: tl.constexpr = SHAPE.BLOCK_M
    PRECISION: tl.constexpr = FLAGS.PRECISION
    STEPS: tl.constexpr = MASK == "none" or MASK == "whole"
    start, n = sequence.start, sequence.n
    q_tile = load_queries(walked.Q, first, sequence, BLOCK_M, SHAPE.DQK, SHAPE.BLOCK_DQK, CUT, FLAGS)
    i = first + tl.arange(0, BLOCK_M)
    j = kept.side.position
    queries = Side(i, bias.tables.query_time, bias.tables.since)
    x = tile_bias(
        bias, sequence, kept.side, queries, buckets.w_first, SHAPE.BLOCK_N, BLOCK_M, FLAGS, MASK == "band",
        STEPS, FLAGS.MMA_LAYOUT, False,
    )  # fmt: skip
    x = tl.dot(kept.k, tl.trans(q_tile), input_precision=PRECISION) * alpha + x
    if MASK == "band":
        x = finite(x, bias.tables.band)
    if FLAGS.TIME and STEPS:
        if buckets.last > buckets.first:
            x = add_time_steps(x, bias.tables, sequence, kept.side, queries, buckets, False, FLAGS)
        if MASK == "none" and (CUT or not FLAGS.DESCRIPTOR):  # only the last tile has queries beyond the sequence
            x += tl.where(i < n, 0.0, HIDDEN)[None, :]
    seen = visible(i[None, :], j[:, None], sequence, FLAGS)
    seen = seen & (i < n)[None, :] & (j < n)[:, None]
    lse = tl.zeros([BLOCK_M], tl.float32)
    if FLAGS.SOFTMAX:
        lse = tl.load(walked.lse + start + i, mask=is_query(i, sequence, FLAGS), other=0.0)
    weights, dact = weights_and_derivatives(x, seen, lse[None, :], MASK == "compare", FLAGS)
    if FLAGS.QUERY_SCALE:
        own_scale = one_over_n_of(walked.attention_scale, i[None, :], sequence, FLAGS)
        weights, dact = weights * own_scale, dact * own_scale
    do_tile = load_queries(walked.DO, first, sequence, BLOCK_M, SHAPE.DV, SHAPE.BLOCK_DV, CUT, FLAGS)
    dv = tl.dot(operand(weights, do_tile.dtype, PRECISION), do_tile, sums.dv, input_precision=PRECISION)
    dp = tl.dot(kept.v, tl.trans(do_tile), input_precision=PRECISION)
    if FLAGS.SOFTMAX:
        dp -= tl.load(walked.delta + start + i, mask=is_query(i, sequence, FLAGS), other=0.0)[None, :]
    # float16 ends at 65,504: there the score gradients take 1/N at once, elsewhere with the last product.
    ds = dp * dact * scale if q_tile.dtype == tl.float16 else dp * dact
    targets, targets_own = sums.targets, sums.targets_own
    if FLAGS.TARGETS and FLAGS.POSITION:
        by_target = ((i >= sequence.history) & (i < n))[None, :]
        own = i[None, :] == j[:, None]
        targets += tl.sum(tl.where(by_target & (own == 0), ds, 0.0), 1)
        targets_own += tl.sum(tl.where(by_target & own, ds, 0.0), 1)
    ds = operand(ds, q_tile.dtype, PRECISION)
    dk = tl.dot(ds, q_tile, sums.dk, input_precision=PRECISION)
    if ADD_DQ:
        dq_tile = tl.dot(tl.trans(ds), kept.k, input_precision=PRECISION)
        dq_tile *= alpha if q_tile.dtype == tl.float16 else alpha * scale
        _add_dq(walked.DQ, dq_tile, first, sequence, SHAPE, FLAGS, CUT)
    return Sums(dk, dv, targets, targets_own)


@triton.jit
def _add_dq(DQ, dq_tile, first, sequence, SHAPE, FLAGS, CUT):
    """Adds a tile's share of dq to memory, atomically."""
    BLOCK_M: tl.constexpr = SHAPE.BLOCK_M
    i = first + tl.arange(0, BLOCK_M)
    if FLAGS.DESCRIPTOR:
        if CUT:  # what is added beyond the sequence is nothing, though the sequence's own keys be not finite
            dq_tile = tl.where((i < sequence.n)[:, None], dq_tile, 0.0)
        DQ.source.atomic_add([sequence.start.to(tl.int32) + first, DQ.head * SHAPE.DQK], dq_tile)
    else:
        columns = tl.arange(0, SHAPE.BLOCK_DQK)
        rows = DQ.source + (sequence.start + i).to(tl.int64)[:, None] * DQ.token_stride + DQ.head * DQ.head_stride
        mask = is_query(i, sequence, FLAGS)[:, None] & (columns < SHAPE.DQK)[None, :]
        tl.atomic_add(rows + columns[None, :], dq_tile, mask=mask, sem="relaxed")


@triton.jit
def _walk(first, K, V, walked, sequence, bias, tiles_width, alpha, scale, SHAPE, FLAGS, CUT_KEYS, ADD_DQ):
    """The sums over all queries that see the tile of keys from position `first`. CUT_KEYS: it may end beyond the
    sequence."""
    BLOCK_M: tl.constexpr = SHAPE.BLOCK_M
    BLOCK_N: tl.constexpr = SHAPE.BLOCK_N
    BLOCK_DQK: tl.constexpr = SHAPE.BLOCK_DQK
    BLOCK_DV: tl.constexpr = SHAPE.BLOCK_DV
    start, n = sequence.start, sequence.n
    j = first + tl.arange(0, BLOCK_N)
    kept = Keys(
        load_keys(K, first, sequence, BLOCK_N, SHAPE.DQK, BLOCK_DQK, CUT_KEYS, FLAGS),
        load_keys(V, first, sequence, BLOCK_N, SHAPE.DV, BLOCK_DV, CUT_KEYS, FLAGS),
        Side(j, bias.tables.key_time, times_since(bias.key_since, sequence.key_start, j, j < n, FLAGS)),
    )
    sums = Sums(
        tl.zeros([BLOCK_N, BLOCK_DQK], tl.float32),
        tl.zeros([BLOCK_N, BLOCK_DV], tl.float32),
        tl.zeros([BLOCK_N], tl.float32),
        tl.zeros([BLOCK_N], tl.float32),
    )
    buckets = Buckets(0, 0, True, 0.0)

    end = tl.minimum(first + BLOCK_N, n)
    if FLAGS.GENERAL:
        runs = query_tiles(first, end, sequence, BLOCK_M, FLAGS)
        if FLAGS.WHOLE:
            whole_tiles = whole_query_tiles(first, first + BLOCK_N, runs, sequence, BLOCK_M, FLAGS)
            for index in range(whole_count(whole_tiles)):
                query = whole_tile_of(index, whole_tiles, runs) * BLOCK_M
                own = buckets
                if FLAGS.TIME:
                    row = (sequence.key_start // BLOCK_M + sequence_id() + query // BLOCK_M).to(tl.int64) * tiles_width
                    own = unpack_tile(tl.load(bias.tables.tiles + row + first // BLOCK_N), bias.tables.time)
                sums = _add_queries(
                    sums, kept, query, walked, sequence, bias, own, alpha, scale, SHAPE, FLAGS, "whole", False,
                    ADD_DQ,
                )  # fmt: skip
        else:
            whole_tiles = WholeTiles(0, 0, 0, 0)
        for index in range(tile_count(runs) - whole_count(whole_tiles)):
            query = other_tile_of(index, whole_tiles, runs) * BLOCK_M
            sums = _add_queries(
                sums, kept, query, walked, sequence, bias, buckets, alpha, scale, SHAPE, FLAGS, "compare", True, ADD_DQ
            )  # fmt: skip
    else:
        begin = first // BLOCK_M
        tiles = tl.cdiv(n, BLOCK_M)
        full = tiles
        if FLAGS.DESCRIPTOR:  # the sequence's last tile of queries, where it is not full, is CUT
            full = n // BLOCK_M
        if FLAGS.TIME:
            # As in the forward kernel: the band near the diagonal, and buckets one tile ahead.
            rest = tl.minimum((first // BAND_BLOCK + 2) * BAND_BLOCK // BLOCK_M, tiles)
            for tile in range(begin, tl.minimum(rest, full)):
                sums = _add_queries(
                    sums, kept, tile * BLOCK_M, walked, sequence, bias, buckets, alpha, scale, SHAPE, FLAGS, "band",
                    False, ADD_DQ,
                )  # fmt: skip
            FAR: tl.constexpr = not (CUT_KEYS and FLAGS.DESCRIPTOR)  # a cut tile of keys sees none beyond the band
            entry = bias.tables.tiles + (start // BLOCK_M + sequence_id()) * tiles_width + first // BLOCK_N
            # Tiles of a sequence times tiles of the longest pass 2^31 at 3 million tokens.
            if FAR:
                following = tl.load(entry + tl.minimum(rest, tiles - 1).to(tl.int64) * tiles_width)
                buckets = unpack_tile(following, bias.tables.time)
                for tile in range(rest, full):
                    following = tl.load(entry + tl.minimum(tile + 1, tiles - 1).to(tl.int64) * tiles_width)
                    sums = _add_queries(
                        sums, kept, tile * BLOCK_M, walked, sequence, bias, buckets, alpha, scale, SHAPE, FLAGS,
                        "none", False, ADD_DQ,
                    )  # fmt: skip
                    buckets = unpack_tile(following, bias.tables.time)
            if FLAGS.DESCRIPTOR:
                if full < tiles:
                    if full < rest:
                        sums = _add_queries(
                            sums, kept, full * BLOCK_M, walked, sequence, bias, buckets, alpha, scale, SHAPE, FLAGS,
                            "band", True, ADD_DQ,
                        )  # fmt: skip
                    elif FAR:
                        sums = _add_queries(
                            sums, kept, full * BLOCK_M, walked, sequence, bias, buckets, alpha, scale, SHAPE, FLAGS,
                            "none", True, ADD_DQ,
                        )  # fmt: skip
        else:
            # Two kinds of tiles are masked: those across the diagonal, and the sequence's last one where it is not
            # full.
            rest = tl.cdiv(end, BLOCK_M)
            whole = tl.maximum(n // BLOCK_M - rest, 0)
            for index in range(full - begin - whole):
                tile = tl.where(begin + index < rest, begin + index, begin + index + whole)
                sums = _add_queries(
                    sums, kept, tile * BLOCK_M, walked, sequence, bias, buckets, alpha, scale, SHAPE, FLAGS,
                    "compare", False, ADD_DQ,
                )  # fmt: skip
            if FLAGS.DESCRIPTOR:
                if full < tiles:
                    sums = _add_queries(
                        sums, kept, full * BLOCK_M, walked, sequence, bias, buckets, alpha, scale, SHAPE, FLAGS,
                        "compare", True, ADD_DQ,
                    )  # fmt: skip
            for tile in range(rest, rest + whole):
                sums = _add_queries(
                    sums, kept, tile * BLOCK_M, walked, sequence, bias, buckets, alpha, scale, SHAPE, FLAGS, "none",
                    False, ADD_DQ,
                )  # fmt: skip
    return sums


@triton.jit(do_not_specialize=["num_tiles", "tiles_width", "total_tokens", "position_zero", *MASK_NUMBERS])
def bwd_dkdv_kernel(
    q, k, v, do, dq, dk, dv, target_sums, lse, delta, sequences, tables, strides, alpha, attention_scale, heads,
    num_tiles, tiles_width, total_tokens, position_zero, window, prefix, full, sinks, group,
    SHAPE: tl.constexpr, FLAGS: tl.constexpr, ADD_DQ: tl.constexpr,
):  # fmt: skip
    """dk, dv of one tile of keys of one sequence and head; grid as the forward kernel's, first tiles first.

    With ADD_DQ each tile's share of dq is added to a float32 buffer, in no fixed order. With targets and a position
    bias, `target_sums` (T, 2, h), of keys, get the two sums of `Sums`.
    """
    BLOCK_N: tl.constexpr = SHAPE.BLOCK_N
    BLOCK_DQK: tl.constexpr = SHAPE.BLOCK_DQK
    BLOCK_DV: tl.constexpr = SHAPE.BLOCK_DV
    head = tl.program_id(0) // num_tiles
    tile = tl.program_id(0) % num_tiles
    sequence = sequence_of(sequences, sequence_id(), window, prefix, full, sinks, group, FLAGS)
    n = sequence.n
    first = tile * BLOCK_N
    if first >= n:
        return
    scale = one_over_n(attention_scale, sequence, FLAGS)
    bias = Bias(tables, position_zero, tables.since + total_tokens if FLAGS.TIME else None)
    K = Tokens(k, strides.k_token, strides.k_head, head)
    V = Tokens(v, strides.v_token, strides.v_head, head)
    if FLAGS.SOFTMAX:
        lse += head.to(tl.int64) * total_tokens
        delta += head.to(tl.int64) * total_tokens
    walked = Queries(
        Tokens(q, strides.q_token, strides.q_head, head),
        Tokens(do, strides.o_token, strides.o_head, head),
        Tokens(dq, heads * SHAPE.DQK, SHAPE.DQK, head),
        lse,
        delta,
        attention_scale,
    )
    # A cut tile of keys is held in registers. With code of their own, whole tiles stay in shared memory: 7 % less time
    # at d 64 and N 8,192.
    if FLAGS.DESCRIPTOR and ADD_DQ and FLAGS.TIME and not FLAGS.GENERAL:
        if first + BLOCK_N > n:
            sums = _walk(first, K, V, walked, sequence, bias, tiles_width, alpha, scale, SHAPE, FLAGS, True, ADD_DQ)
        else:
            sums = _walk(first, K, V, walked, sequence, bias, tiles_width, alpha, scale, SHAPE, FLAGS, False, ADD_DQ)
    else:
        sums = _walk(first, K, V, walked, sequence, bias, tiles_width, alpha, scale, SHAPE, FLAGS, ADD_DQ, ADD_DQ)

    j = first + tl.arange(0, BLOCK_N)
    dk_tile = sums.dk * (alpha if dk.dtype.element_ty == tl.float16 else alpha * scale)
    DK = Tokens(dk, heads * SHAPE.DQK, SHAPE.DQK, head)
    DV = Tokens(dv, heads * SHAPE.DV, SHAPE.DV, head)
    store_tile(DK, dk_tile, first, sequence, BLOCK_N, SHAPE.DQK, BLOCK_DQK, True)
    store_tile(DV, sums.dv * scale, first, sequence, BLOCK_N, SHAPE.DV, BLOCK_DV, True)
    if FLAGS.TARGETS and FLAGS.POSITION:
        scale = 1.0 if dk.dtype.element_ty == tl.float16 else scale
        pointers = target_sums + (sequence.key_start + j) * (2 * heads) + head
        tl.store(pointers, sums.targets * scale, mask=j < n)
        tl.store(pointers + heads, sums.targets_own * scale, mask=j < n)
