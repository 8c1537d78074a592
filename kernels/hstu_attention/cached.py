"""Attention of a few new queries over stored keys and values, for scoring candidates; forward only.

A sequence's queries all ask at one time and stand at one place, so both biases depend on the key alone: a small kernel
makes them first, a float32 a key, for all heads and queries. Programs share the stored keys of a tile of queries
(`shared_keys`).
"""
# A kernel's arguments have no Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..common import configuration
from ..tensor_cores import operand
from .activations import exp_of, silu
from .arguments import Shape, Strides, Tokens
from .bias_tiles import exact_bucket
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

_BIAS_BLOCK = 1024  # keys of a program of `key_bias_kernel`


class Cache(NamedTuple):
    """The stored keys and values, (T', h, dqk) and (T', h, dv), and their offsets (B + 1,)."""

    k: Any
    v: Any
    offsets: Any


class CacheStrides(NamedTuple):
    """Elements from a stored token to the next, and from a head to the next."""

    k_token: int
    k_head: int
    v_token: int
    v_head: int


class CacheTables(NamedTuple):
    """Pointers of the bias tables and times; None for what a call does not need."""

    position: Any
    time: Any
    edges: Any
    query_time: Any
    key_time: Any
    cached_time: Any


class KeyBias(NamedTuple):
    """float32 biases of the stored keys (T',), and of each sequence's new ones (B,); None without a bias."""

    stored: Any
    own: Any


@triton.jit(do_not_specialize=["position_zero"])
def key_bias_kernel(bias, offsets, cached_offsets, tables, position_zero, BLOCK: tl.constexpr, FLAGS: tl.constexpr):
    """Grid: blocks of keys of the longest sequence x sequences of `launch_grid`. The new key stands behind the stored
    ones."""
    index = sequence_id()
    if tl.load(offsets + index) >= tl.load(offsets + index + 1):  # nobody asks
        return
    start = tl.load(cached_offsets + index)
    history = (tl.load(cached_offsets + index + 1) - start).to(tl.int32)
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_own = j == history
    x = tl.zeros([BLOCK], tl.float32)
    if FLAGS.POSITION:
        x += tl.load(tables.position + (j - history + position_zero), mask=j <= history, other=0.0)
    if FLAGS.TIME:
        key_times = tl.load(tables.cached_time + start + j, mask=j < history, other=0)
        key_times = tl.where(is_own, tl.load(tables.key_time + index), key_times)
        seconds = tl.load(tables.query_time + index) - key_times
        x += tl.load(tables.time + exact_bucket(seconds, tables.edges, FLAGS.INLINE_ASM))
    tl.store(bias.stored + start + j, x, mask=j < history)
    tl.store(bias.own + index + tl.zeros_like(j), x, mask=is_own)


@triton.jit(do_not_specialize=["num_tiles", "tokens", "splits", "window", "sinks", "group"])
def cached_kernel(
    q, k, v, output, offsets, cache, bias, parts, strides, cache_strides, alpha, attention_scale, heads, num_tiles,
    tokens, splits, window, sinks, group, SHAPE: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr,
    FLAGS: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of new queries of the longest sequence x heads x splits of `launch_grid`. Every query stands behind
    the stored keys, sees those within the window, the first `sinks`, itself, and those before it in its group. SPLIT:
    several programs share a tile's keys, and write what each found to `output`, (splits, T, h, dv) float32."""
    BLOCK_M: tl.constexpr = SHAPE.BLOCK_M
    BLOCK_N: tl.constexpr = SHAPE.BLOCK_N
    BLOCK_DQK: tl.constexpr = SHAPE.BLOCK_DQK
    BLOCK_DV: tl.constexpr = SHAPE.BLOCK_DV
    PRECISION: tl.constexpr = FLAGS.PRECISION
    head = tl.program_id(0) // num_tiles
    split = head // heads
    head = head % heads
    index = sequence_id()
    start = tl.load(offsets + index)
    end = tl.load(offsets + index + 1)
    first = start + tl.program_id(0) % num_tiles * BLOCK_M
    if first >= end:
        return
    stored = tl.load(cache.offsets + index)
    history = (tl.load(cache.offsets + index + 1) - stored).to(tl.int32)
    Q = Tokens(q, strides.q_token, strides.q_head, head)
    OWN_K = Tokens(k, strides.k_token, strides.k_head, head)
    OWN_V = Tokens(v, strides.v_token, strides.v_head, head)
    K = Tokens(cache.k, cache_strides.k_token, cache_strides.k_head, head)
    V = Tokens(cache.v, cache_strides.v_token, cache_strides.v_head, head)
    i = first + tl.arange(0, BLOCK_M)
    q_tile = load_tile(Q, first, end, BLOCK_M, SHAPE.DQK, BLOCK_DQK, False, FLAGS)
    own_bias = 0.0
    if BIAS:
        own_bias = tl.load(bias.own + index)

    m_i = tl.full([BLOCK_M, 1], LOWEST, tl.float32)
    l_i = tl.zeros([BLOCK_M, 1], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    own = 1
    if FLAGS.GROUPS:
        own = tl.minimum(group, (end - start).to(tl.int32))
    if SPLIT:  # the first program takes the new keys
        own = tl.where(split == 0, own, 0)
    for before in range(0, own):
        k_tile = load_tile(OWN_K, first - before, end, BLOCK_M, SHAPE.DQK, BLOCK_DQK, False, FLAGS, start, FLAGS.GROUPS)
        v_tile = load_tile(OWN_V, first - before, end, BLOCK_M, SHAPE.DV, BLOCK_DV, False, FLAGS, start, FLAGS.GROUPS)
        x = tl.sum(q_tile.to(tl.float32) * k_tile.to(tl.float32), 1)[:, None] * alpha + own_bias
        if FLAGS.GROUPS:
            same = ((i - start) % group >= before)[:, None]
            x = tl.where(same, x, LOWEST)
            v_tile = tl.where(same, v_tile, 0.0)  # of another group, which may be no number
        if FLAGS.SOFTMAX:
            m_new = tl.maximum(m_i, x)
            weights = exp_of(x - m_new)
            shrink = exp_of(m_i - m_new)
            l_i = l_i * shrink + weights
            acc = acc * shrink
            m_i = m_new
        else:
            weights = silu(x, FLAGS.APPROXIMATE_TANH)
        acc += operand(weights, v_tile.dtype, PRECISION).to(tl.float32) * v_tile.to(tl.float32)
    sums = Sums(acc, m_i, l_i)

    begin = 0
    before_window = 0
    if FLAGS.WINDOW:
        begin = tl.maximum(history - window, 0) // BLOCK_N * BLOCK_N
        if FLAGS.SINKS:
            before_window = tl.minimum(tl.cdiv(sinks, BLOCK_N) * BLOCK_N, begin)
    low = begin - before_window
    high = history
    if SPLIT:
        share = tl.cdiv(tl.cdiv(history - low, BLOCK_N), splits) * BLOCK_N
        low += split * share
        high = tl.minimum(low + share, history)
    for step in range(low, high, BLOCK_N):
        key = step
        if FLAGS.SINKS:
            key = tl.where(step < begin, step - (begin - before_window), step)
        j = key + tl.arange(0, BLOCK_N)
        k_tile = load_tile(K, stored + key, stored + history, BLOCK_N, SHAPE.DQK, BLOCK_DQK, False, FLAGS)
        v_tile = load_tile(V, stored + key, stored + history, BLOCK_N, SHAPE.DV, BLOCK_DV, False, FLAGS)
        x = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * alpha
        # A key that is not seen has a bias that leaves it no weight; one beyond the history has no value either.
        seen = j < history
        if FLAGS.WINDOW:
            near = history - j <= window
            if FLAGS.SINKS:
                near = near | (j < sinks)
            seen = seen & near
        if BIAS:
            x += tl.load(bias.stored + stored + j, mask=seen, other=LOWEST)[None, :]
        elif FLAGS.SOFTMAX or FLAGS.WINDOW:
            x += tl.where(seen, 0.0, LOWEST)[None, :]
        sums = add_tile(sums, x, v_tile, FLAGS)

    store_found(
        sums, output, parts, i, i < end, split, tokens, head, heads, attention_scale, history + 1, SHAPE, SPLIT, FLAGS
    )


@torch.library.custom_op("hstu::cached_attention", mutates_args=())
def cached_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    cached_k: torch.Tensor,
    cached_v: torch.Tensor,
    cached_offsets: torch.Tensor,
    max_len: int,
    max_cached_len: int,
    alpha: float,
    attention_scale: float | None,
    softmax: bool,
    position_bias: torch.Tensor | None,
    time_bias: torch.Tensor | None,
    times: Sequence[torch.Tensor],
    max_attn_len: int,
    num_sink_tokens: int = 0,
    target_group_size: int = 1,
    query_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Output (T, h, dv) of the new tokens. `times`, with a time bias: query_time, key_time and cached_time.
    `query_scale` (T,): an N for each token."""
    check_sizes(q, v, max(max_len, max_cached_len))
    tokens, heads, dqk = q.shape
    dv = v.shape[2]
    output = v.new_empty(tokens, heads, dv)
    if not tokens or not max_len:
        return output
    q, k, v, cached_k, cached_v = (token_rows(tensor) for tensor in (q, k, v, cached_k, cached_v))
    config = configuration("hstu_attention.cached", shape_class(q, v, max_cached_len, False), q.device)
    sequences = len(offsets) - 1
    mask = Mask(max_attn_len, num_sink_tokens=num_sink_tokens, target_group_size=target_group_size)
    mask = cut_mask(mask, max_len + max_cached_len)
    shape = Shape(dqk, dv, block_of(dqk), value_block(dqk, dv), config["block_m"], config["block_n"])
    flags = inference_flags(q, mask, softmax, position_bias, time_bias, attention_scale, query_scale)
    offsets, cached_offsets = launch_offsets(offsets), launch_offsets(cached_offsets)
    seen = min(max_cached_len, mask.max_attn_len + mask.num_sink_tokens) if max_attn_len else max_cached_len
    splits = num_splits(tokens, sequences, heads, seen, config, q.device)
    found, parts = room_for_found(output, splits, softmax)
    bias = KeyBias(None, None)
    tiles = triton.cdiv(max_len, shape.BLOCK_M)
    scale = float_table(query_scale) if attention_scale is None else attention_scale
    rows, cache_rows = (q, k, v, output), (cached_k, cached_v)
    with torch.cuda.device_of(q):
        if flags.POSITION or flags.TIME:
            tables = CacheTables(float_table(position_bias), None, None, None, None, None)
            if time_bias is not None:
                edges = bucket_edges(q.device)
                tables = CacheTables(
                    tables.position, float_table(time_bias), edges, *(time.contiguous() for time in times)
                )
            bias = KeyBias(*(q.new_empty(n, dtype=torch.float32) for n in (len(cached_k), sequences)))
            key_bias_kernel[launch_grid(triton.cdiv(max_cached_len + 1, _BIAS_BLOCK), sequences)](
                bias,
                offsets,
                cached_offsets,
                tables,
                position_zero=(len(position_bias) - 1) // 2 if position_bias is not None else 0,
                BLOCK=_BIAS_BLOCK,
                FLAGS=flags,
            )
        cached_kernel[launch_grid(tiles * heads * splits, sequences)](
            q,
            k,
            v,
            found,
            offsets,
            Cache(cached_k, cached_v, cached_offsets),
            bias,
            parts,
            Strides(*(stride for tensor in rows for stride in tensor.stride()[:2])),
            CacheStrides(*(stride for tensor in cache_rows for stride in tensor.stride()[:2])),
            alpha=alpha,
            attention_scale=1.0 if scale is None else scale,
            heads=heads,
            num_tiles=tiles,
            tokens=tokens,
            splits=splits,
            window=mask.max_attn_len,
            sinks=mask.num_sink_tokens,
            group=mask.target_group_size,
            SHAPE=shape,
            SPLIT=splits > 1,
            BIAS=flags.POSITION or flags.TIME,
            FLAGS=flags,
            **{name: number for name, number in config.items() if name not in ("block_m", "block_n")},
        )
        join(found, parts, output, shape, softmax)
    return output


@cached_attention.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_others: Any, **_named: Any) -> torch.Tensor:
    return v.new_empty(v.shape)
