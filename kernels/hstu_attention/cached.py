"""Attention of a few new queries over stored keys and values, for scoring candidates; forward only."""
# A kernel's arguments have no Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..common import configuration, tf32_allowed
from ..tensor_cores import operand
from .activations import exp_of, silu
from .arguments import Flags, Shape, Strides, Tokens
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
from .tiles import load_tile, sequence_id

_LOWEST = tl.constexpr(-1e30)


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


class Tables(NamedTuple):
    """Pointers of the bias tables and times; None for what a call does not need."""

    position: Any
    time: Any
    edges: Any
    query_time: Any
    key_time: Any
    cached_time: Any


@triton.jit
def _own_key(q_tile, OWN_K, OWN_V, tables, times, j, first, start, end, alpha, position_zero, SHAPE, FLAGS):
    """Scores (queries, 1) with the new keys j, which begin at `first`, one for each query; and these keys' values."""
    BLOCK_M: tl.constexpr = SHAPE.BLOCK_M
    k_tile = load_tile(OWN_K, first, end, BLOCK_M, SHAPE.DQK, SHAPE.BLOCK_DQK, False, FLAGS, start, FLAGS.GROUPS)
    v_tile = load_tile(OWN_V, first, end, BLOCK_M, SHAPE.DV, SHAPE.BLOCK_DV, False, FLAGS, start, FLAGS.GROUPS)
    x = tl.sum(q_tile.to(tl.float32) * k_tile.to(tl.float32), 1)[:, None] * alpha
    if FLAGS.POSITION:
        x += tl.load(tables.position + position_zero)
    if FLAGS.TIME:
        inside = j < end
        if FLAGS.GROUPS:
            inside = inside & (j >= start)
        key_times = tl.load(tables.key_time + j, mask=inside, other=0)[:, None]
        x += tl.load(tables.time + exact_bucket(times - key_times, tables.edges, FLAGS.INLINE_ASM))
    return x, v_tile


@triton.jit(do_not_specialize=["num_tiles", "position_zero", "window", "sinks", "group"])
def cached_kernel(
    q, k, v, output, offsets, cache, tables, strides, cache_strides, alpha, attention_scale, heads, num_tiles,
    position_zero, window, sinks, group, SHAPE: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of new queries of the longest sequence x heads of `launch_grid`. Every query stands behind the
    stored keys, sees those within the window, the first `sinks`, itself, and those before it in its group."""
    BLOCK_M: tl.constexpr = SHAPE.BLOCK_M
    BLOCK_N: tl.constexpr = SHAPE.BLOCK_N
    BLOCK_DQK: tl.constexpr = SHAPE.BLOCK_DQK
    BLOCK_DV: tl.constexpr = SHAPE.BLOCK_DV
    PRECISION: tl.constexpr = FLAGS.PRECISION
    head = tl.program_id(0) // num_tiles
    index = sequence_id()
    start = tl.load(offsets + index)
    end = tl.load(offsets + index + 1)
    stored = tl.load(cache.offsets + index)
    history = (tl.load(cache.offsets + index + 1) - stored).to(tl.int32)
    first = start + tl.program_id(0) % num_tiles * BLOCK_M
    if first >= end:
        return
    Q = Tokens(q, strides.q_token, strides.q_head, head)
    OWN_K = Tokens(k, strides.k_token, strides.k_head, head)
    OWN_V = Tokens(v, strides.v_token, strides.v_head, head)
    K = Tokens(cache.k, cache_strides.k_token, cache_strides.k_head, head)
    V = Tokens(cache.v, cache_strides.v_token, cache_strides.v_head, head)
    i = first + tl.arange(0, BLOCK_M)
    q_tile = load_tile(Q, first, end, BLOCK_M, SHAPE.DQK, BLOCK_DQK, False, FLAGS)
    times = i.to(tl.int64)[:, None]
    if FLAGS.TIME:
        times = tl.load(tables.query_time + i, mask=i < end, other=0)[:, None]

    own_x, own_v = _own_key(
        q_tile, OWN_K, OWN_V, tables, times, i, first, start, end, alpha, position_zero, SHAPE, FLAGS
    )
    m_i = own_x
    if FLAGS.SOFTMAX:
        l_i = tl.full([BLOCK_M, 1], 1.0, tl.float32)
        acc = own_v.to(tl.float32)
    else:
        l_i = tl.zeros([BLOCK_M, 1], tl.float32)
        own_weights = operand(silu(own_x, FLAGS.APPROXIMATE_TANH), own_v.dtype, PRECISION)
        acc = own_weights.to(tl.float32) * own_v.to(tl.float32)
    if FLAGS.GROUPS:
        for before in range(1, tl.minimum(group, (end - start).to(tl.int32))):
            own_x, own_v = _own_key(
                q_tile, OWN_K, OWN_V, tables, times, i - before, first - before, start, end, alpha, position_zero,
                SHAPE, FLAGS,
            )  # fmt: skip
            in_group = ((i - start) % group >= before)[:, None]
            if FLAGS.SOFTMAX:
                own_x = tl.where(in_group, own_x, _LOWEST)
                m_new = tl.maximum(m_i, own_x)
                own_weights = exp_of(own_x - m_new)
                shrink = exp_of(m_i - m_new)
                l_i = l_i * shrink + own_weights
                acc = acc * shrink
                m_i = m_new
            else:
                own_weights = tl.where(in_group, silu(own_x, FLAGS.APPROXIMATE_TANH), 0.0)
            own_weights = operand(own_weights, own_v.dtype, PRECISION)
            acc += own_weights.to(tl.float32) * own_v.to(tl.float32)

    begin = 0
    before_window = 0
    if FLAGS.WINDOW:
        begin = tl.maximum(history - window, 0) // BLOCK_N * BLOCK_N
        if FLAGS.SINKS:
            before_window = tl.minimum(tl.cdiv(sinks, BLOCK_N) * BLOCK_N, begin)
    for step in range(begin - before_window, history, BLOCK_N):
        key = step
        if FLAGS.SINKS:
            key = tl.where(step < begin, step - (begin - before_window), step)
        j = key + tl.arange(0, BLOCK_N)
        k_tile = load_tile(K, stored + key, stored + history, BLOCK_N, SHAPE.DQK, BLOCK_DQK, False, FLAGS)
        v_tile = load_tile(V, stored + key, stored + history, BLOCK_N, SHAPE.DV, BLOCK_DV, False, FLAGS)
        x = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * alpha
        if FLAGS.POSITION:
            pointers = tables.position + (j - history + position_zero)
            x += tl.load(pointers, mask=j < history, other=0.0)[None, :]
        if FLAGS.TIME:
            key_times = tl.load(tables.cached_time + stored + j, mask=j < history, other=0)[None, :]
            x += tl.load(tables.time + exact_bucket(times - key_times, tables.edges, FLAGS.INLINE_ASM))
        seen = j < history
        if FLAGS.WINDOW:
            near = history - j <= window
            if FLAGS.SINKS:
                near = near | (j < sinks)
            seen = seen & near
        if FLAGS.SOFTMAX:
            x = tl.where(seen[None, :], x, _LOWEST)
            m_new = tl.maximum(m_i, tl.max(x, 1)[:, None])
            weights = exp_of(x - m_new)
            shrink = exp_of(m_i - m_new)
            l_i = l_i * shrink + tl.sum(weights, 1)[:, None]
            acc = acc * shrink
            m_i = m_new
        else:
            weights = tl.where(seen[None, :], silu(x, FLAGS.APPROXIMATE_TANH), 0.0)
        weights = operand(weights, v_tile.dtype, PRECISION)
        acc = tl.dot(weights, v_tile, acc, input_precision=PRECISION)
    if FLAGS.SOFTMAX:
        acc = acc / l_i
    elif FLAGS.QUERY_SCALE:
        acc = acc / tl.load(attention_scale + i, mask=i < end, other=1.0)[:, None]
    else:
        if FLAGS.BY_LENGTH:
            attention_scale = (history + 1).to(tl.float32)
        acc = acc / attention_scale
    columns = tl.arange(0, BLOCK_DV)
    tl.store(
        output + i.to(tl.int64)[:, None] * (heads * SHAPE.DV) + head * SHAPE.DV + columns[None, :],
        acc.to(output.dtype.element_ty),
        mask=(i < end)[:, None] & (columns < SHAPE.DV)[None, :],
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
    name = shape_class(q, v, max_cached_len, position_bias is not None or time_bias is not None)
    config = configuration("hstu_attention.forward", name, q.device)
    block_m, block_n = min(config["block_m"], 64), min(config["block_n"], 64)
    tiles = triton.cdiv(max_len, block_m)
    tables = Tables(float_table(position_bias), None, None, None, None, None)
    if time_bias is not None:
        edges = bucket_edges(q.device)
        tables = Tables(tables.position, float_table(time_bias), edges, *(time.contiguous() for time in times))
    scale = float_table(query_scale) if attention_scale is None else attention_scale
    mask = Mask(max_attn_len, num_sink_tokens=num_sink_tokens, target_group_size=target_group_size)
    mask = cut_mask(mask, max_len + max_cached_len)
    rows, cache_rows = (q, k, v, output), (cached_k, cached_v)
    with torch.cuda.device_of(q):
        cached_kernel[launch_grid(tiles * heads, len(offsets) - 1)](
            q,
            k,
            v,
            output,
            launch_offsets(offsets),
            Cache(cached_k, cached_v, launch_offsets(cached_offsets)),
            tables,
            Strides(*(stride for tensor in rows for stride in tensor.stride()[:2])),
            CacheStrides(*(stride for tensor in cache_rows for stride in tensor.stride()[:2])),
            alpha=alpha,
            attention_scale=1.0 if scale is None else scale,
            heads=heads,
            num_tiles=tiles,
            position_zero=(len(position_bias) - 1) // 2 if position_bias is not None else 0,
            window=mask.max_attn_len,
            sinks=mask.num_sink_tokens,
            group=mask.target_group_size,
            SHAPE=Shape(dqk, dv, block_of(dqk), value_block(dqk, dv), block_m, block_n),
            FLAGS=Flags(
                POSITION=position_bias is not None,
                TIME=time_bias is not None,
                TARGETS=False,
                WINDOW=max_attn_len > 0,
                PREFIX=False,
                FULL=False,
                SINKS=num_sink_tokens > 0,
                BIDIRECTIONAL=False,
                GROUPS=target_group_size > 1,
                KEY_OFFSETS=False,
                QUERY_SCALE=query_scale is not None,
                GENERAL=False,
                WHOLE=False,
                BY_LENGTH=attention_scale is None and query_scale is None,
                SOFTMAX=softmax,
                DESCRIPTOR=False,
                PRECISION="tf32" if q.is_cuda and tf32_allowed() else "ieee",
                APPROXIMATE_TANH=q.is_cuda and q.dtype == torch.bfloat16,
                MMA_LAYOUT=False,
                INLINE_ASM=q.is_cuda,
            ),
            num_warps=config["num_warps"],
            num_stages=2,
        )
    return output


@cached_attention.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_others: Any, **_named: Any) -> torch.Tensor:
    return v.new_empty(v.shape)
