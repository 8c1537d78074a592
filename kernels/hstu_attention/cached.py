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


@triton.jit(do_not_specialize=["num_tiles", "position_zero", "window"])
def cached_kernel(
    q, k, v, output, offsets, cache, tables, strides, cache_strides, alpha, attention_scale, heads, num_tiles,
    position_zero, window, SHAPE: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of new queries of the longest sequence x heads of `launch_grid`. Every query stands behind the
    stored keys, sees those within the window, and itself."""
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

    # Itself.
    own_k = load_tile(OWN_K, first, end, BLOCK_M, SHAPE.DQK, BLOCK_DQK, False, FLAGS)
    own_v = load_tile(OWN_V, first, end, BLOCK_M, SHAPE.DV, BLOCK_DV, False, FLAGS)
    own_x = tl.sum(q_tile.to(tl.float32) * own_k.to(tl.float32), 1)[:, None] * alpha
    if FLAGS.POSITION:
        own_x += tl.load(tables.position + position_zero)
    if FLAGS.TIME:
        own_times = tl.load(tables.key_time + i, mask=i < end, other=0)[:, None]
        own_x += tl.load(tables.time + exact_bucket(times - own_times, tables.edges, FLAGS.INLINE_ASM))
    m_i = own_x
    if FLAGS.SOFTMAX:
        l_i = tl.full([BLOCK_M, 1], 1.0, tl.float32)
        acc = own_v.to(tl.float32)
    else:
        l_i = tl.zeros([BLOCK_M, 1], tl.float32)
        own_weights = operand(silu(own_x, FLAGS.APPROXIMATE_TANH), own_v.dtype, PRECISION)
        acc = own_weights.to(tl.float32) * own_v.to(tl.float32)

    begin = 0
    if FLAGS.WINDOW:
        begin = tl.maximum(history - window, 0) // BLOCK_N * BLOCK_N
    for key in range(begin, history, BLOCK_N):
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
            seen = seen & (history - j <= window)
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
) -> torch.Tensor:
    """Output (T, h, dv) of the new tokens. `times`, with a time bias: query_time, key_time and cached_time."""
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
            attention_scale=1.0 if attention_scale is None else attention_scale,
            heads=heads,
            num_tiles=tiles,
            position_zero=(len(position_bias) - 1) // 2 if position_bias is not None else 0,
            window=max_attn_len,
            SHAPE=Shape(dqk, dv, block_of(dqk), value_block(dqk, dv), block_m, block_n),
            FLAGS=Flags(
                POSITION=position_bias is not None,
                TIME=time_bias is not None,
                TARGETS=False,
                WINDOW=max_attn_len > 0,
                PREFIX=False,
                GENERAL=False,
                BY_LENGTH=attention_scale is None,
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
