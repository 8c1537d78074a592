"""Backward kernel of the bias tables under other masks than the causal one: sums of score gradients."""
# A kernel's arguments have no Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

import triton
import triton.language as tl

from .activations import weights_and_derivatives
from .arguments import MASK_NUMBERS, Bias, Side, Tokens
from .backward_bias import add_to_buckets
from .bias_tiles import tile_bias, unpack_tile
from .tiles import has_tile, is_query, key_tiles, load_keys, load_queries, one_over_n_of, sequence_of, visible


@triton.jit
def _head_sum(Q, K, V, DO, tile_x, query, key, sequence, alpha, lse, delta, lane, SHAPE, FLAGS):
    """One head's score gradients of a tile, those beyond the mask too."""
    BLOCK_M: tl.constexpr = SHAPE.BLOCK_M
    BLOCK_N: tl.constexpr = SHAPE.BLOCK_N
    i = query + tl.arange(0, BLOCK_M)
    q_tile = load_queries(Q, query, sequence, BLOCK_M, SHAPE.DQK, SHAPE.BLOCK_DQK, False, FLAGS)
    k_tile = load_keys(K, key, sequence, BLOCK_N, SHAPE.DQK, SHAPE.BLOCK_DQK, False, FLAGS)
    do_tile = load_queries(DO, query, sequence, BLOCK_M, SHAPE.DV, SHAPE.BLOCK_DV, False, FLAGS)
    v_tile = load_keys(V, key, sequence, BLOCK_N, SHAPE.DV, SHAPE.BLOCK_DV, False, FLAGS)
    x = tl.dot(q_tile, tl.trans(k_tile), input_precision=FLAGS.PRECISION) * alpha + tile_x
    dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=FLAGS.PRECISION)
    lse_tile = tl.zeros([BLOCK_M], tl.float32)
    if FLAGS.SOFTMAX:
        inside = is_query(i, sequence, FLAGS)
        lse_tile = tl.load(lse + lane + i, mask=inside, other=0.0)
        dp -= tl.load(delta + lane + i, mask=inside, other=0.0)[:, None]
    _, dact = weights_and_derivatives(x, x, lse_tile[:, None], False, FLAGS)
    return dp * dact


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
def general_bias_gradient_kernel(
    q, k, v, do, sums, lse, delta, sequences, tables, small_edges, strides, alpha, attention_scale, heads,
    num_sequences, sequence_splits, tile_splits, copies, lowest, tiles_width, total_tokens, position_zero, window,
    prefix, full, sinks, group, SHAPE: tl.constexpr, FLAGS: tl.constexpr, DETERMINISTIC: tl.constexpr,
):  # fmt: skip
    """As `bias_gradient_kernel`, of the tiles that the mask lets someone see.

    There is no band: tiles of many buckets add to the bucket sums element by element, or, DETERMINISTIC, take a pass a
    bucket. Targets stand at one position, so that an element's place in the tile does not decide their j - i: what they
    add to the position bias is summed in other kernels, by key where they are queries, by query where they are keys.
    """
    BLOCK_M: tl.constexpr = SHAPE.BLOCK_M
    BLOCK_N: tl.constexpr = SHAPE.BLOCK_N
    RATIO: tl.constexpr = BLOCK_M // BLOCK_N
    splits = sequence_splits * tile_splits
    distance = lowest + tl.program_id(0) // splits
    tile_split = tl.program_id(0) % splits // sequence_splits
    program = tl.program_id(0).to(tl.int64)
    bias = Bias(tables, position_zero, tables.since + total_tokens if FLAGS.TIME else None)
    position_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    time_sum = tl.zeros([256], tl.float32)
    for index in range(tl.program_id(0) % sequence_splits, num_sequences, sequence_splits):
        sequence = sequence_of(sequences, index, window, prefix, full, sinks, group, FLAGS)
        start, n = sequence.start, sequence.n
        first_tile = tl.cdiv(tl.maximum(distance, 0), RATIO)
        end_tile = tl.minimum(tl.cdiv(n, BLOCK_M), tl.cdiv(tl.maximum(tl.cdiv(n, BLOCK_N) + distance, 0), RATIO))
        for tile in range(first_tile + tile_split, end_tile, tile_splits):
            query = tile * BLOCK_M
            key_tile = tile * RATIO - distance
            key = key_tile * BLOCK_N
            visited = has_tile(key_tile, key_tiles(query, tl.minimum(query + BLOCK_M, n), sequence, BLOCK_N, FLAGS))
            if FLAGS.KEY_OFFSETS:
                visited = visited & (query + BLOCK_M > sequence.first)
            if visited:
                i = query + tl.arange(0, BLOCK_M)
                j = key + tl.arange(0, BLOCK_N)
                queries, keys = Side(i, tables.query_time, i), Side(j, tables.key_time, j)
                tile_x = tile_bias(
                    bias, sequence, queries, keys, 0.0, BLOCK_M, BLOCK_N, FLAGS, False, False, False, True
                )
                tile_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                for head in range(heads):
                    Q = Tokens(q, strides.q_token, strides.q_head, head)
                    K = Tokens(k, strides.k_token, strides.k_head, head)
                    DO = Tokens(do, strides.o_token, strides.o_head, head)
                    V = Tokens(v, strides.v_token, strides.v_head, head)
                    lane = total_tokens.to(tl.int64) * head + start
                    tile_sum += _head_sum(
                        Q, K, V, DO, tile_x, query, key, sequence, alpha, lse, delta, lane, SHAPE, FLAGS
                    )
                # Heads share the mask and N too, so both wait for their sum.
                seen = visible(i[:, None], j[None, :], sequence, FLAGS)
                seen = seen & (i < n)[:, None] & (j < n)[None, :]
                tile_sum = tl.where(seen, tile_sum, 0.0) * one_over_n_of(attention_scale, i[:, None], sequence, FLAGS)
                if FLAGS.TIME:
                    copy = sums.time + program % copies * 256
                    packed = tl.load(
                        tables.tiles + (sequence.key_start // BLOCK_M + index + tile) * tiles_width + key_tile
                    )
                    buckets = unpack_tile(packed, tables.time)
                    time_sum = add_to_buckets(
                        time_sum, copy, tile_sum, seen, packed, buckets, 1.0, sequence, bias, small_edges, i, j, FLAGS,
                        DETERMINISTIC,
                    )  # fmt: skip
                if FLAGS.POSITION:
                    if FLAGS.TARGETS:
                        tile_sum = tl.where((i < sequence.history)[:, None], tile_sum, 0.0)
                        if FLAGS.BIDIRECTIONAL:
                            tile_sum = tl.where((j < sequence.history)[None, :], tile_sum, 0.0)
                    position_sum += tile_sum
    if FLAGS.POSITION:
        element = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        copy = program if DETERMINISTIC else program // splits
        tl.atomic_add(sums.position + copy * BLOCK_M * BLOCK_N + element, position_sum, sem="relaxed")
    if FLAGS.TIME:
        tl.atomic_add(sums.time + program % copies * 256 + tl.arange(0, 256), time_sum, sem="relaxed")
