"""HSTU attention, its softmax ablation and cached attention in plain torch, padded to (B, h, N, N).

Shapes: B sequences of up to N tokens, T in all, of h heads. q and k are (T, h, dqk), v is (T, h, dv), times are (T,),
all jagged by offsets (B + 1,); the tables p (2P - 1,) and w (129,); num_targets (B,). With key_offsets (B + 1,), k, v
and key times are (T', ...), jagged by these.
"""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F

from .. import jagged
from .mask import CAUSAL, Mask

#: Entries of the time bias table: buckets 0..128.
TIME_BUCKETS = 129
_BUCKET_WIDTH = 0.301
_BUCKET_STARTS = [min(math.ceil(math.exp(_BUCKET_WIDTH * k)), 2**63 - 1) for k in range(1, TIME_BUCKETS)]


def hstu_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    max_len: int,
    *,
    alpha: float = 1.0,
    attention_scale: float | torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    time_bias: torch.Tensor | None = None,
    query_time: torch.Tensor | None = None,
    key_time: torch.Tensor | None = None,
    max_attn_len: int = 0,
    contextual_seq_len: int = 0,
    num_targets: torch.Tensor | None = None,
    min_full_attn_seq_len: int = 0,
    num_sink_tokens: int = 0,
    causal: bool = True,
    target_group_size: int = 1,
    key_offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    mask = Mask(
        max_attn_len, contextual_seq_len, min_full_attn_seq_len, num_sink_tokens, causal, target_group_size
    )  # fmt: skip
    scores = _scores(
        q, k, offsets, max_len, num_targets, key_offsets, alpha, position_bias, time_bias, query_time, key_time
    )
    seen = visible(offsets, max_len, mask, num_targets, key_offsets)[:, None]  # (B or 1, 1, N, N)
    n: float | torch.Tensor
    if attention_scale is None:
        n = own_length(offsets if key_offsets is None else key_offsets, num_targets)[:, None, None, None]
    elif isinstance(attention_scale, torch.Tensor):
        padded = jagged.to_padded(attention_scale[:, None].to(scores.dtype), offsets, max_len)[:, None]  # (B, 1, N, 1)
        # Queries that see nothing may have any N: a quotient of theirs that is not finite would reach dk.
        row = torch.arange(max_len, device=q.device)[None, :, None]
        there = (row < offsets.diff()[:, None, None])[:, None] & seen.any(-1, keepdim=True)
        n = torch.where(there, padded, torch.ones_like(padded))
    else:
        n = attention_scale
    weights = (F.silu(scores) / n).masked_fill(~seen, 0.0)  # (B, h, N, N)
    return _weighted_values(weights, v, q.shape[0], offsets, max_len, key_offsets)  # (T, h, dv)


def softmax_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    max_len: int,
    *,
    alpha: float = 1.0,
    position_bias: torch.Tensor | None = None,
    time_bias: torch.Tensor | None = None,
    query_time: torch.Tensor | None = None,
    key_time: torch.Tensor | None = None,
    max_attn_len: int = 0,
    contextual_seq_len: int = 0,
    num_targets: torch.Tensor | None = None,
    min_full_attn_seq_len: int = 0,
    num_sink_tokens: int = 0,
    causal: bool = True,
    target_group_size: int = 1,
    key_offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    mask = Mask(
        max_attn_len, contextual_seq_len, min_full_attn_seq_len, num_sink_tokens, causal, target_group_size
    )  # fmt: skip
    scores = _scores(
        q, k, offsets, max_len, num_targets, key_offsets, alpha, position_bias, time_bias, query_time, key_time
    )
    seen = visible(offsets, max_len, mask, num_targets, key_offsets)[:, None]  # (B or 1, 1, N, N)
    # A finite number, since a query may see nothing; its weights are zero.
    weights = torch.softmax(scores.masked_fill(~seen, torch.finfo(scores.dtype).min), dim=-1)  # (B, h, N, N)
    return _weighted_values(weights.masked_fill(~seen, 0.0), v, q.shape[0], offsets, max_len, key_offsets)


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
    *,
    alpha: float = 1.0,
    attention_scale: float | torch.Tensor | None = None,
    softmax: bool = False,
    position_bias: torch.Tensor | None = None,
    time_bias: torch.Tensor | None = None,
    query_time: torch.Tensor | None = None,
    key_time: torch.Tensor | None = None,
    cached_time: torch.Tensor | None = None,
    max_attn_len: int = 0,
    num_sink_tokens: int = 0,
    target_group_size: int = 1,
) -> torch.Tensor:
    """The new tokens as targets behind their sequence's T' stored ones, cached_k (T', h, dqk), cached_v (T', h, dv).
    query_time and key_time are (B,): a sequence's new tokens have the same."""
    rows, total = len(q), int(cached_offsets[-1])
    q, k, v = (tensor[: int(offsets[-1])] for tensor in (q, k, v))  # those behind belong to nobody
    lengths, cached_lengths = offsets.diff(), cached_offsets.diff()  # (B,)
    joined_offsets = jagged.offsets_from_lengths(lengths + cached_lengths)
    sequence_id, position = jagged.naive.sequence_and_position(joined_offsets, len(q) + total)  # (T + T',)
    is_new = position >= cached_lengths[sequence_id]

    def join(cached: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Each sequence's cached tokens, then its new ones: (T + T', ...)."""
        tokens = new.new_empty(len(is_new), *new.shape[1:])
        tokens[~is_new], tokens[is_new] = cached[:total], new
        return tokens

    times: dict[str, Any] = {}
    if time_bias is not None:
        if query_time is None or key_time is None or cached_time is None:
            raise ValueError("time_bias needs query_time, key_time and cached_time")
        owner = sequence_id[is_new]  # (T,)
        times = {"query_time": join(cached_time, query_time[owner]), "key_time": join(cached_time, key_time[owner])}
    if isinstance(attention_scale, torch.Tensor):
        attention_scale = join(attention_scale.new_ones(total), attention_scale[: len(q)])
    attend = softmax_attention if softmax else functools.partial(hstu_attention, attention_scale=attention_scale)
    joined_q = join(q.new_zeros(total, *q.shape[1:]), q)
    is_finite = v.isfinite()  # what is not would reach all, as zero times it is no number
    output = attend(
        joined_q,
        join(cached_k, k),
        join(cached_v, v.masked_fill(~is_finite, 0.0)),
        joined_offsets,
        max_len + max_cached_len,
        alpha=alpha,
        position_bias=position_bias,
        time_bias=time_bias,
        **times,
        max_attn_len=max_attn_len,
        num_targets=lengths,
        num_sink_tokens=num_sink_tokens,
        target_group_size=target_group_size,
    )
    output = output[is_new].masked_fill(_sees_any(~is_finite, offsets, target_group_size), math.nan)
    return F.pad(output, (0, 0, 0, 0, 0, rows - len(q)))  # (T, h, dv)


def _sees_any(marked: torch.Tensor, offsets: torch.Tensor, group: int) -> torch.Tensor:
    """(T, h, dv), as `marked`: whether a target, or one before it in its group, is marked."""
    index = torch.arange(len(marked), device=marked.device)
    _, position = jagged.naive.sequence_and_position(offsets, len(marked))  # (T,)
    so_far = F.pad(marked.cumsum(0), (0, 0, 0, 0, 1, 0))  # (T + 1, h, dv)
    return so_far[index + 1] > so_far[index - position % group]


def appended_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    key_offsets: torch.Tensor,
    max_new: int,
    max_len: int,
    *,
    alpha: float = 1.0,
    attention_scale: float | None = None,
    softmax: bool = False,
    position_bias: torch.Tensor | None = None,
    time_bias: torch.Tensor | None = None,
    query_time: torch.Tensor | None = None,
    key_time: torch.Tensor | None = None,
    max_attn_len: int = 0,
    num_sink_tokens: int = 0,
) -> torch.Tensor:
    """The new tokens q (T, h, dqk) as the last ones of their sequences, whose keys are k (T', h, dqk)."""
    rows, tokens, keys = len(q), int(offsets[-1]), int(key_offsets[-1])  # what is behind belongs to nobody
    attend = softmax_attention if softmax else functools.partial(hstu_attention, attention_scale=attention_scale)
    output = attend(
        q[:tokens],
        k[:keys],
        v[:keys],
        offsets,
        max(max_new, max_len),
        alpha=alpha,
        position_bias=position_bias,
        time_bias=time_bias,
        query_time=None if query_time is None else query_time[:tokens],
        key_time=None if key_time is None else key_time[:keys],
        max_attn_len=max_attn_len,
        num_sink_tokens=num_sink_tokens,
        key_offsets=key_offsets,
    )
    return F.pad(output, (0, 0, 0, 0, 0, rows - tokens))  # (T, h, dv)


def time_bucket(seconds: torch.Tensor) -> torch.Tensor:
    """clamp(floor(ln(max(1, |s|)) / 0.301), 0, 128) of int64 seconds, as int64.

    Compared against the buckets' first whole seconds, so every device gets the same bucket: a float32
    logarithm may round to either side of an edge.
    """
    return torch.bucketize(seconds.abs(), bucket_starts(seconds.device), right=True)


def bucket_starts(device: torch.device) -> torch.Tensor:
    """The least whole second in bucket k, for k = 1..128; capped at what int64 holds."""
    # What is made while something traces, such as FakeTensorMode, is of no use after it. Else it is kept: a copy to the
    # device waits for it, which a CUDA graph cannot hold.
    if torch.compiler.is_compiling() or type(torch.empty(0)) is not torch.Tensor:
        return _new_bucket_starts(device)
    return _kept_bucket_starts(device)


def _new_bucket_starts(device: torch.device) -> torch.Tensor:
    return torch.tensor(_BUCKET_STARTS, dtype=torch.int64, device=device)


_kept_bucket_starts = functools.cache(_new_bucket_starts)


def visible(
    offsets: torch.Tensor,
    max_len: int,
    mask: Mask = CAUSAL,
    num_targets: torch.Tensor | None = None,
    key_offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """Whether query i of a sequence sees its key j: rows i, columns j. `hstu_attention` states the rules.

    (B, N, N), or (1, N, N) where all sequences have the same mask, but for what is beyond their ends.
    """
    window, prefix, full, sinks, causal, group = mask
    row = torch.arange(max_len, device=offsets.device)
    i, j = row[None, :, None], row[None, None, :]
    if num_targets is None and key_offsets is None and causal and not (prefix or full):
        keys = history = row.new_full((1, 1, 1), max_len)
    else:
        keys = (offsets if key_offsets is None else key_offsets).diff()[:, None, None]  # (B, 1, 1)
        history = _history(offsets if key_offsets is None else key_offsets, num_targets)[:, None, None]
    if key_offsets is not None:
        i = i + _first_position(offsets, key_offsets)[:, None, None]  # (B, N, 1)
    end = history - max(prefix - 1, 0)  # where the history ends, the prefix counted as one

    def place(position: torch.Tensor) -> torch.Tensor:
        """Prefix tokens all stand at 0, and targets where the history ends."""
        return torch.minimum((position - max(prefix - 1, 0)).clamp(min=0), end)

    distance = place(i) - place(j)  # (B or 1, N, N)
    distance = distance if causal else distance.abs()
    seen = distance > 0
    if window:
        near = distance <= window
        if full:
            near = near | (place(i) >= end - full)
        seen = seen & (near | (j < sinks))
    seen = seen | (i == j)
    if group > 1:
        target, other = i - history, j - history
        together = (target >= 0) & (other >= 0) & (target // group == other // group)
        seen = seen | (together & (j <= i) if causal else together)
    if prefix:
        seen = seen | ((place(i) == 0) & (place(j) < end))
    return seen & (i >= 0) & (j < keys)


def own_length(offsets: torch.Tensor, num_targets: torch.Tensor | None) -> torch.Tensor:
    """(B,) tokens of a sequence, its targets counted as one, at least 1: what `attention_scale` None divides by."""
    lengths = offsets.diff()
    if num_targets is not None:
        lengths = lengths - (num_targets - 1).clamp(min=0)
    return lengths.clamp(min=1)


def _history(offsets: torch.Tensor, num_targets: torch.Tensor | None) -> torch.Tensor:
    """(B,) tokens of a sequence before its targets."""
    return offsets.diff() if num_targets is None else (offsets.diff() - num_targets).clamp(min=0)


def _first_position(offsets: torch.Tensor, key_offsets: torch.Tensor) -> torch.Tensor:
    """(B,) where a sequence's first query stands among its keys: the last query stands where the last key does."""
    return key_offsets.diff() - offsets.diff()


def _scores(
    q: torch.Tensor,
    k: torch.Tensor,
    offsets: torch.Tensor,
    max_len: int,
    num_targets: torch.Tensor | None,
    key_offsets: torch.Tensor | None,
    alpha: float,
    position_bias: torch.Tensor | None,
    time_bias: torch.Tensor | None,
    query_time: torch.Tensor | None,
    key_time: torch.Tensor | None,
) -> torch.Tensor:
    """alpha q_i . k_j + b_ij, padded: (B, h, N, N)."""
    of_keys = offsets if key_offsets is None else key_offsets
    scores = alpha * _to_heads(q, offsets, max_len) @ _to_heads(k, of_keys, max_len).transpose(-1, -2)
    if position_bias is not None:
        query = key = torch.arange(max_len, device=q.device)[None]  # (1, N)
        if key_offsets is not None:
            query = query + _first_position(offsets, key_offsets)[:, None]  # (B, N)
        if num_targets is not None or key_offsets is not None:
            history = _history(of_keys, num_targets)[:, None]  # (B, 1)
            query, key = torch.minimum(query, history), torch.minimum(key, history)  # (B, N)
        scores = scores + _position_term(position_bias, query, key)[:, None]
    if time_bias is not None:
        if query_time is None or key_time is None:
            raise ValueError("time_bias needs query_time and key_time")
        scores = scores + _time_term(time_bias, query_time, key_time, offsets, of_keys, max_len)[:, None]
    return scores


def _weighted_values(
    weights: torch.Tensor,
    v: torch.Tensor,
    tokens: int,
    offsets: torch.Tensor,
    max_len: int,
    key_offsets: torch.Tensor | None,
) -> torch.Tensor:
    """(B, h, N, N) weights times v, back to the T `tokens` of queries, jagged (T, h, dv)."""
    heads, dv = v.shape[1:]
    values = _to_heads(v, offsets if key_offsets is None else key_offsets, max_len)  # (B, h, N, dv)
    output = (weights.to(values.dtype) @ values).transpose(1, 2)
    output = output.reshape(offsets.shape[0] - 1, max_len, heads * dv)
    return jagged.to_jagged(output, offsets, tokens).view(-1, heads, dv)


def _to_heads(tensor: torch.Tensor, offsets: torch.Tensor, max_len: int) -> torch.Tensor:
    """(T, h, d) jagged to (B, h, N, d) padded."""
    heads, dim = tensor.shape[1:]
    padded = jagged.to_padded(tensor.reshape(-1, heads * dim), offsets, max_len)  # (B, N, h d)
    return padded.view(offsets.shape[0] - 1, max_len, heads, dim).transpose(1, 2)


def _position_term(table: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """p[key - query] as (B, N, N) for positions (B, N); B is 1 where all sequences have the same. Queries that see
    nothing may stand anywhere."""
    zero = (len(table) - 1) // 2
    return _Lookup.apply(table, (key[:, None, :] - query[:, :, None] + zero).clamp(0, 2 * zero))


def _time_term(
    table: torch.Tensor,
    query_time: torch.Tensor,
    key_time: torch.Tensor,
    offsets: torch.Tensor,
    key_offsets: torch.Tensor,
    n: int,
) -> torch.Tensor:
    """w[bucket(query_time_i - key_time_j)] as (B, N, N)."""
    query = jagged.to_padded(query_time[:, None], offsets, n)  # (B, N, 1)
    key = jagged.to_padded(key_time[:, None], key_offsets, n).transpose(1, 2)  # (B, 1, N)
    return _Lookup.apply(table, time_bucket(query - key))


class _Lookup(torch.autograd.Function):
    """table[index] for a short table and very many indices; the gradient is a weighted histogram.

    Indexing's own backward adds up equal indices one after the other: a whole training step of two layers
    at B 128, N 200 took 1.9 s on an H100 shared by six trainings, and 0.02 s with the histogram, shared by
    four. CUDA's histogram adds in no fixed order, so
    deterministic mode keeps indexing's backward there.
    """

    @staticmethod
    def forward(ctx: Any, table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.rows = len(table)
        return table[index]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (index,) = ctx.saved_tensors
        if grad.is_cuda and torch.are_deterministic_algorithms_enabled():
            summed = grad.new_zeros(ctx.rows).index_put_((index,), grad, accumulate=True)
        else:
            summed = torch.bincount(index.flatten(), grad.flatten(), minlength=ctx.rows).to(grad.dtype)
        return summed, None
