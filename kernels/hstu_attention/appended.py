"""Attention of a sequence's new tokens over its keys, stored and new, for histories that go on; forward only.

What `hstu_attention` with `key_offsets` calculates, where queries are few and keys many: the bias of every pair, and
with it the mask, is made once for all heads, a float32 a pair of so many queries at a time that it stays small.
Programs share the keys of a tile of queries (`shared_keys`).
"""
# A kernel's arguments have no Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl

from ..common import configuration
from .arguments import Shape, Strides, Tokens
from .bias_tiles import exact_bucket
from .cached import CacheTables
from .inputs import (
    block_of,
    bucket_edges,
    check_sizes,
    float_table,
    launch_grid,
    launch_offsets,
    shape_class,
    token_rows,
    value_block,
)
from .mask import Mask, cut_mask
from .shared_keys import LOWEST, Sums, add_tile, inference_flags, join, num_splits, room_for_found, store_found
from .tiles import load_tile, sequence_id

#: Pairs whose bias is in memory at a time: 64 MiB.
MOST_PAIRS = 2**24
_ROWS, _KEYS = 16, 128  # a tile of `pair_bias_kernel`


@triton.jit
def _sees(position, j, window, sinks, FLAGS):
    """Whether queries at these positions see keys j, expanded to a tile."""
    seen = j <= position
    if FLAGS.WINDOW:
        near = position - j <= window
        if FLAGS.SINKS:
            near = near | (j < sinks)
        seen = seen & near
    return seen


@triton.jit(do_not_specialize=["low", "high", "num_blocks", "position_zero", "window", "sinks"])
def pair_bias_kernel(
    bias, offsets, key_offsets, tables, width, low, high, num_blocks, position_zero, window, sinks,
    ROWS: tl.constexpr, KEYS: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of queries and of keys of the longest sequence x sequences of `launch_grid`. The bias (high - low,
    width) of the tokens from `low` to before `high`, float32; of keys that a query does not see, -1e30."""
    index = sequence_id()
    key_start = tl.load(key_offsets + index)
    n = (tl.load(key_offsets + index + 1) - key_start).to(tl.int32)
    end = tl.load(offsets + index + 1)
    last = tl.minimum(end, high)
    first = tl.maximum(tl.load(offsets + index), low) + tl.program_id(0) // num_blocks * ROWS
    first_key = tl.program_id(0) % num_blocks * KEYS
    if (first >= last) | (first_key >= n):
        return
    i = first + tl.arange(0, ROWS)
    j = (first_key + tl.arange(0, KEYS))[None, :]
    position = ((i - end).to(tl.int32) + n)[:, None]
    inside = (i < last)[:, None] & (j < n)
    x = tl.zeros([ROWS, KEYS], tl.float32)
    if FLAGS.POSITION:
        x += tl.load(tables.position + (j - position + position_zero), mask=inside, other=0.0)
    if FLAGS.TIME:
        query_times = tl.load(tables.query_time + i, mask=i < last, other=0)[:, None]
        key_times = tl.load(tables.cached_time + key_start + j, mask=j < n, other=0)
        x += tl.load(tables.time + exact_bucket(query_times - key_times, tables.edges, FLAGS.INLINE_ASM))
    x = tl.where(_sees(position, j, window, sinks, FLAGS), x, LOWEST)
    tl.store(bias + (i - low)[:, None] * width + j, x, mask=inside)


@triton.jit(do_not_specialize=["num_tiles", "tokens", "splits", "low", "high", "window", "sinks"])
def appended_kernel(
    q, k, v, output, offsets, key_offsets, bias, parts, strides, alpha, attention_scale, heads, num_tiles, tokens,
    splits, width, low, high, window, sinks, SHAPE: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr,
    FLAGS: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of new queries of the longest sequence x heads x splits of `launch_grid`, for the tokens from `low`
    to before `high`. A sequence's last query stands at its last key. SPLIT: as in `cached_kernel`."""
    BLOCK_M: tl.constexpr = SHAPE.BLOCK_M
    BLOCK_N: tl.constexpr = SHAPE.BLOCK_N
    BLOCK_DQK: tl.constexpr = SHAPE.BLOCK_DQK
    BLOCK_DV: tl.constexpr = SHAPE.BLOCK_DV
    PRECISION: tl.constexpr = FLAGS.PRECISION
    head = tl.program_id(0) // num_tiles
    split = head // heads
    head = head % heads
    index = sequence_id()
    end = tl.load(offsets + index + 1)
    last = tl.minimum(end, high)
    first = tl.maximum(tl.load(offsets + index), low) + tl.program_id(0) % num_tiles * BLOCK_M
    if first >= last:
        return
    key_start = tl.load(key_offsets + index)
    n = (tl.load(key_offsets + index + 1) - key_start).to(tl.int32)
    Q = Tokens(q, strides.q_token, strides.q_head, head)
    K = Tokens(k, strides.k_token, strides.k_head, head)
    V = Tokens(v, strides.v_token, strides.v_head, head)
    i = first + tl.arange(0, BLOCK_M)
    q_tile = load_tile(Q, first, last, BLOCK_M, SHAPE.DQK, BLOCK_DQK, False, FLAGS)
    first_position = (first - end).to(tl.int32) + n
    position = (first_position + tl.arange(0, BLOCK_M))[:, None]
    is_query = (i < last)[:, None]

    sums = Sums(
        tl.zeros([BLOCK_M, BLOCK_DV], tl.float32),
        tl.full([BLOCK_M, 1], LOWEST, tl.float32),
        tl.zeros([BLOCK_M, 1], tl.float32),
    )
    begin = 0
    before_window = 0
    if FLAGS.WINDOW:
        begin = tl.maximum(first_position - window, 0) // BLOCK_N * BLOCK_N
        if FLAGS.SINKS:
            before_window = tl.minimum(tl.cdiv(sinks, BLOCK_N) * BLOCK_N, begin)
    from_key = begin - before_window
    to_key = tl.minimum(first_position + BLOCK_M, n)
    if SPLIT:
        share = tl.cdiv(tl.cdiv(to_key - from_key, BLOCK_N), splits) * BLOCK_N
        from_key += split * share
        to_key = tl.minimum(from_key + share, to_key)
    for step in range(from_key, to_key, BLOCK_N):
        key = step
        if FLAGS.SINKS:
            key = tl.where(step < begin, step - (begin - before_window), step)
        j = (key + tl.arange(0, BLOCK_N))[None, :]
        k_tile = load_tile(K, key_start + key, key_start + n, BLOCK_N, SHAPE.DQK, BLOCK_DQK, False, FLAGS)
        v_tile = load_tile(V, key_start + key, key_start + n, BLOCK_N, SHAPE.DV, BLOCK_DV, False, FLAGS)
        x = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * alpha
        if BIAS:
            x += tl.load(bias + (i - low)[:, None] * width + j, mask=is_query & (j < n), other=LOWEST)
        else:
            x = tl.where(_sees(position, j, window, sinks, FLAGS), x, LOWEST)
        sums = add_tile(sums, x, v_tile, FLAGS)

    store_found(sums, output, parts, i, i < last, split, tokens, head, heads, attention_scale, n, SHAPE, SPLIT, FLAGS)


@torch.library.custom_op("hstu::appended_attention", mutates_args=())
def appended_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    key_offsets: torch.Tensor,
    max_new: int,
    max_len: int,
    alpha: float,
    attention_scale: float | None,
    softmax: bool,
    position_bias: torch.Tensor | None,
    time_bias: torch.Tensor | None,
    query_time: torch.Tensor | None,
    key_time: torch.Tensor | None,
    max_attn_len: int,
    num_sink_tokens: int,
) -> torch.Tensor:
    """Output (T, h, dv) of the new tokens."""
    check_sizes(q, v, max_len)
    tokens, heads, dqk = q.shape
    dv = v.shape[2]
    output = v.new_empty(tokens, heads, dv)
    if not tokens or not max_new:
        return output
    q, k, v = (token_rows(tensor) for tensor in (q, k, v))
    config = configuration("hstu_attention.appended", shape_class(q, v, max_len, False), q.device)
    sequences = len(offsets) - 1
    mask = cut_mask(Mask(max_attn_len, num_sink_tokens=num_sink_tokens), max_len)
    shape = Shape(dqk, dv, block_of(dqk), value_block(dqk, dv), config["block_m"], config["block_n"])
    biased = position_bias is not None or time_bias is not None
    flags = inference_flags(q, mask, softmax, position_bias, time_bias, attention_scale)
    offsets, key_offsets = launch_offsets(offsets), launch_offsets(key_offsets)
    width = triton.cdiv(max_len, 16) * 16  # so that rows lie on 64 bytes
    at_once = min(tokens, max(1, MOST_PAIRS // width)) if biased else tokens
    seen = min(max_len, mask.max_attn_len + mask.num_sink_tokens + shape.BLOCK_M) if max_attn_len else max_len
    splits = num_splits(at_once, sequences, heads, seen, config, q.device)
    found, parts = room_for_found(output, splits, softmax)
    bias = q.new_empty(at_once * width, dtype=torch.float32) if biased else None
    longest = min(max_new, at_once)
    tiles, blocks = triton.cdiv(longest, shape.BLOCK_M), triton.cdiv(max_len, _KEYS)
    tables = CacheTables(float_table(position_bias), None, None, None, None, None)
    if time_bias is not None and query_time is not None and key_time is not None:
        edges, times = bucket_edges(q.device), (query_time.contiguous(), None, key_time.contiguous())
        tables = CacheTables(tables.position, float_table(time_bias), edges, *times)
    masks = {"window": mask.max_attn_len, "sinks": mask.num_sink_tokens}
    with torch.cuda.device_of(q):
        for low in range(0, tokens, at_once):
            high = min(low + at_once, tokens)
            if biased:
                pair_bias_kernel[launch_grid(triton.cdiv(longest, _ROWS) * blocks, sequences)](
                    bias,
                    offsets,
                    key_offsets,
                    tables,
                    width=width,
                    low=low,
                    high=high,
                    num_blocks=blocks,
                    position_zero=(len(position_bias) - 1) // 2 if position_bias is not None else 0,
                    **masks,
                    ROWS=_ROWS,
                    KEYS=_KEYS,
                    FLAGS=flags,
                )
            appended_kernel[launch_grid(tiles * heads * splits, sequences)](
                q,
                k,
                v,
                found,
                offsets,
                key_offsets,
                bias,
                parts,
                Strides(*(stride for tensor in (q, k, v, output) for stride in tensor.stride()[:2])),
                alpha=alpha,
                attention_scale=1.0 if attention_scale is None else attention_scale,
                heads=heads,
                num_tiles=tiles,
                tokens=tokens,
                splits=splits,
                width=width,
                low=low,
                high=high,
                **masks,
                SHAPE=shape,
                SPLIT=splits > 1,
                BIAS=biased,
                FLAGS=flags,
                **{name: number for name, number in config.items() if name not in ("block_m", "block_n")},
            )
        join(found, parts, output, shape, softmax)
    return output


@appended_attention.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_others: Any, **_named: Any) -> torch.Tensor:
    return v.new_empty(q.shape[0], *v.shape[1:])
