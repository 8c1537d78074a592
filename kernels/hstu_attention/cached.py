"""Attention of a few new queries over stored keys and values, for scoring candidates; forward only."""
# A kernel's arguments have no Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl

from ..common import configuration, tf32_allowed
from ..tensor_cores import operand
from .tiles import buckets, exp_of, load_rows, silu
from .triton_op import (
    _block,
    _bucket_edges,
    _contiguous,
    _rows,
    check_sizes,
    shape_class,
    value_block,
)

_LOWEST = tl.constexpr(-1e30)


@triton.jit(do_not_specialize=["num_tiles", "position_zero", "window"])
def cached_kernel(
    q, k, v, output, offsets, cached_k, cached_v, cached_offsets,
    position_bias, time_bias, bucket_edges, query_time, key_time, cached_time,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ct, stride_ch, stride_wt, stride_wh,
    alpha, normaliser, num_tiles, heads, position_zero, window,
    DQK: tl.constexpr, DV: tl.constexpr, BLOCK_DQK: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, POSITION: tl.constexpr, TIME: tl.constexpr, WINDOW: tl.constexpr,
    BY_LENGTH: tl.constexpr, SOFTMAX: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of new queries of the longest row x heads, rows). Every query stands behind the stored keys, sees
    those within the window, and itself."""
    head = tl.program_id(0) // num_tiles
    row = tl.program_id(1)
    start = tl.load(offsets + row)
    end = tl.load(offsets + row + 1)
    stored = tl.load(cached_offsets + row)
    history = (tl.load(cached_offsets + row + 1) - stored).to(tl.int32)
    first = start + tl.program_id(0) % num_tiles * BLOCK_M
    if first >= end:
        return
    i = first + tl.arange(0, BLOCK_M)
    q_tile = load_rows(q, first, end, head, stride_qt, stride_qh, BLOCK_M, DQK, BLOCK_DQK, False, False, PRECISION)
    times = i.to(tl.int64)[:, None]
    if TIME:
        times = tl.load(query_time + i, mask=i < end, other=0)[:, None]

    # Itself.
    own_k = load_rows(k, first, end, head, stride_kt, stride_kh, BLOCK_M, DQK, BLOCK_DQK, False, False, PRECISION)
    own_v = load_rows(v, first, end, head, stride_vt, stride_vh, BLOCK_M, DV, BLOCK_DV, False, False, PRECISION)
    own_x = tl.sum(q_tile.to(tl.float32) * own_k.to(tl.float32), 1)[:, None] * alpha
    if POSITION:
        own_x += tl.load(position_bias + position_zero)
    if TIME:
        own_times = tl.load(key_time + i, mask=i < end, other=0)[:, None]
        own_x += tl.load(time_bias + buckets(times, own_times, bucket_edges, ASSEMBLY))
    top = own_x
    if SOFTMAX:
        mass = tl.full([BLOCK_M, 1], 1.0, tl.float32)
        total = own_v.to(tl.float32)
    else:
        mass = tl.zeros([BLOCK_M, 1], tl.float32)
        total = operand(silu(own_x, FAST), own_v.dtype, PRECISION).to(tl.float32) * own_v.to(tl.float32)

    begin = 0
    if WINDOW:
        begin = tl.maximum(history - window, 0) // BLOCK_N * BLOCK_N
    for key in range(begin, history, BLOCK_N):
        j = key + tl.arange(0, BLOCK_N)
        k_tile = load_rows(
            cached_k,
            stored + key,
            stored + history,
            head,
            stride_ct,
            stride_ch,
            BLOCK_N,
            DQK,
            BLOCK_DQK,
            False,
            False,
            PRECISION,
        )
        v_tile = load_rows(
            cached_v,
            stored + key,
            stored + history,
            head,
            stride_wt,
            stride_wh,
            BLOCK_N,
            DV,
            BLOCK_DV,
            False,
            False,
            PRECISION,
        )
        x = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * alpha
        if POSITION:
            entries = position_bias + (j - history + position_zero)
            x += tl.load(entries, mask=j < history, other=0.0)[None, :]
        if TIME:
            key_times = tl.load(cached_time + stored + j, mask=j < history, other=0)[None, :]
            x += tl.load(time_bias + buckets(times, key_times, bucket_edges, ASSEMBLY))
        seen = j < history
        if WINDOW:
            seen = seen & (history - j <= window)
        if SOFTMAX:
            x = tl.where(seen[None, :], x, _LOWEST)
            highest = tl.maximum(top, tl.max(x, 1)[:, None])
            weights = exp_of(x - highest)
            shrink = exp_of(top - highest)
            mass = mass * shrink + tl.sum(weights, 1)[:, None]
            total = total * shrink
            top = highest
        else:
            weights = tl.where(seen[None, :], silu(x, FAST), 0.0)
        total = tl.dot(operand(weights, v_tile.dtype, PRECISION), v_tile, total, input_precision=PRECISION)
    if SOFTMAX:
        total = total / mass
    else:
        if BY_LENGTH:
            normaliser = (history + 1).to(tl.float32)
        total = total / normaliser
    columns = tl.arange(0, BLOCK_DV)
    tl.store(
        output + i.to(tl.int64)[:, None] * (heads * DV) + head * DV + columns[None, :],
        total.to(output.dtype.element_ty),
        mask=(i < end)[:, None] & (columns < DV)[None, :],
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
    normaliser: float | None,
    softmax: bool,
    position_bias: torch.Tensor | None,
    time_bias: torch.Tensor | None,
    query_time: torch.Tensor | None,
    key_time: torch.Tensor | None,
    cached_time: torch.Tensor | None,
    max_attn_len: int,
) -> torch.Tensor:
    """Output (T, h, dv) of the new tokens."""
    check_sizes(q, v, offsets, max(max_len, max_cached_len))
    tokens, heads, dqk = q.shape
    dv = v.shape[2]
    output = v.new_empty(tokens, heads, dv)
    if not tokens or not max_len:
        return output
    name = shape_class(q, v, max_cached_len, position_bias is not None or time_bias is not None)
    config = configuration("hstu_attention.forward", name, q.device)
    block_m = min(config["block_m"], 64)
    tiles = triton.cdiv(max_len, block_m)
    rows = {"q": _rows(q), "k": _rows(k), "v": _rows(v), "c": _rows(cached_k), "w": _rows(cached_v)}
    strides: dict[str, Any] = {}
    for letter, tensor in rows.items():
        strides |= {f"stride_{letter}t": tensor.stride(0), f"stride_{letter}h": tensor.stride(1)}
    with torch.cuda.device_of(q):
        cached_kernel[(tiles * heads, len(offsets) - 1)](
            rows["q"],
            rows["k"],
            rows["v"],
            output,
            offsets.contiguous(),
            rows["c"],
            rows["w"],
            cached_offsets.contiguous(),
            position_bias=None if position_bias is None else position_bias.float().contiguous(),
            time_bias=None if time_bias is None else time_bias.float().contiguous(),
            bucket_edges=None if time_bias is None else _bucket_edges(q.device),
            query_time=_contiguous(query_time) if time_bias is not None else None,
            key_time=_contiguous(key_time) if time_bias is not None else None,
            cached_time=_contiguous(cached_time) if time_bias is not None else None,
            **strides,
            alpha=alpha,
            normaliser=1.0 if normaliser is None else normaliser,
            num_tiles=tiles,
            heads=heads,
            position_zero=(len(position_bias) - 1) // 2 if position_bias is not None else 0,
            window=max_attn_len,
            DQK=dqk,
            DV=dv,
            BLOCK_DQK=_block(dqk),
            BLOCK_DV=value_block(dqk, dv),
            BLOCK_M=block_m,
            BLOCK_N=min(config["block_n"], 64),
            POSITION=position_bias is not None,
            TIME=time_bias is not None,
            WINDOW=max_attn_len > 0,
            BY_LENGTH=normaliser is None,
            SOFTMAX=softmax,
            PRECISION="tf32" if q.is_cuda and tf32_allowed() else "ieee",
            FAST=q.is_cuda and q.dtype == torch.bfloat16,
            ASSEMBLY=q.is_cuda,
            num_warps=config["num_warps"],
            num_stages=2,
        )
    return output


@cached_attention.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_others: Any, **_named: Any) -> torch.Tensor:
    return v.new_empty(v.shape)
