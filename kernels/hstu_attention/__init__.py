"""HSTU's pointwise attention over jagged sequences, with its relative attention bias; its softmax ablation; and cached
attention for scoring candidates.

On CUDA, float32, float16 and bfloat16 go through Triton kernels that never hold an N x N matrix; elsewhere through
the torch version in `naive`, on a CPU in groups of sequences of like length. Gradients are the same to the bit from run
to run where `torch.use_deterministic_algorithms(True)` is set.
"""

from collections.abc import Callable
from typing import Any

import torch

from ..common import do_without, fits_triton, reverse_mode_only, shared_memory
from . import grouped, naive
from .naive import TIME_BUCKETS, time_bucket

__all__ = ["TIME_BUCKETS", "cached_attention", "hstu_attention", "softmax_attention", "time_bucket"]

_WIDEST_HEAD = 256
_WIDEST_FLOAT32 = 128  # of wider ones tiles take up to 134 KiB of shared memory, all others at most 99
_SHARED_MEMORY = 160 * 1024


def hstu_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    max_len: int,
    *,
    alpha: float = 1.0,
    attention_scale: float | None = None,
    position_bias: torch.Tensor | None = None,
    time_bias: torch.Tensor | None = None,
    query_time: torch.Tensor | None = None,
    key_time: torch.Tensor | None = None,
    max_attn_len: int = 0,
    contextual_seq_len: int = 0,
    num_targets: torch.Tensor | None = None,
) -> torch.Tensor:
    """O_i = sum over the keys j that i sees of silu(alpha q_i . k_j + b_ij) / N * v_j (arXiv 2402.17152, equation 2).

    Token i sees itself and the tokens before it; with `max_attn_len`, of these the last so many; with
    `contextual_seq_len`, besides, the whole prefix of that length, which prefix tokens see too. With `num_targets`, a
    sequence's last tokens are candidates: each sees the history before them and itself, and counts as standing right
    behind the history, so that its output is what a sequence of its own would give it.

    Args:
        q, k: (T, h, dqk), jagged over sequences; float32, float16 or bfloat16.
        v: (T, h, dv).
        offsets: (B + 1,) int64; must start at 0 and end at T, which is not checked: that would wait for the device.
        max_len: an upper bound of the lengths; no sequence may be longer, which is not checked either.
        alpha: factor on q . k.
        attention_scale: N, which divides; None stands for each sequence's own length, its targets counted as one.
        position_bias: p, (2P - 1,) with P >= max_len: adds p[j - i], index 0 at P - 1.
        time_bias: w, (129,): adds w[time_bucket(query_time_i - key_time_j)].
        query_time, key_time: (T,) int64, seconds; needed with `time_bias`.
        max_attn_len: 0 for no window.
        contextual_seq_len: length of the prefix.
        num_targets: (B,) int64; as many as the sequence has tokens, where they are more.

    Returns:
        (T, h, dv). Differentiable in q, k, v and both tables.

    Raises:
        ValueError: a time bias without times, shapes other than these, a negative `max_attn_len` or
            `contextual_seq_len`.
        NotImplementedError, RuntimeError: a forward-mode, or a second derivative, where Triton runs.
    """
    _check_times(time_bias, query_time, key_time)
    _check(
        q, k, v, offsets, max_len, position_bias, time_bias, query_time, key_time, max_attn_len, contextual_seq_len,
        num_targets,
    )  # fmt: skip
    if _fits(q, k, v):
        from . import op

        reverse_mode_only("hstu_attention", q, k, v, position_bias, time_bias)
        return op.attention(
            q, k, v, offsets, max_len, alpha, attention_scale, position_bias, time_bias, query_time, key_time,
            max_attn_len, contextual_seq_len, num_targets, False,
        )[0]  # fmt: skip
    return _in_torch(
        naive.hstu_attention, q, k, v, offsets, max_len, alpha=alpha, attention_scale=attention_scale,
        position_bias=position_bias, time_bias=time_bias, query_time=query_time, key_time=key_time,
        max_attn_len=max_attn_len, contextual_seq_len=contextual_seq_len, num_targets=num_targets,
    )  # fmt: skip


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
) -> torch.Tensor:
    """The ablation of `hstu_attention`: the same scores and masks, softmax over the keys seen instead of silu(.)/N.

    Takes, returns and raises what `hstu_attention` does.
    """
    _check_times(time_bias, query_time, key_time)
    _check(
        q, k, v, offsets, max_len, position_bias, time_bias, query_time, key_time, max_attn_len, contextual_seq_len,
        num_targets,
    )  # fmt: skip
    if _fits(q, k, v):
        from . import op

        reverse_mode_only("softmax_attention", q, k, v, position_bias, time_bias)
        return op.attention(
            q, k, v, offsets, max_len, alpha, None, position_bias, time_bias, query_time, key_time,
            max_attn_len, contextual_seq_len, num_targets, True,
        )[0]  # fmt: skip
    return _in_torch(
        naive.softmax_attention, q, k, v, offsets, max_len, alpha=alpha, position_bias=position_bias,
        time_bias=time_bias, query_time=query_time, key_time=key_time, max_attn_len=max_attn_len,
        contextual_seq_len=contextual_seq_len, num_targets=num_targets,
    )  # fmt: skip


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
    attention_scale: float | None = None,
    softmax: bool = False,
    position_bias: torch.Tensor | None = None,
    time_bias: torch.Tensor | None = None,
    query_time: torch.Tensor | None = None,
    key_time: torch.Tensor | None = None,
    cached_time: torch.Tensor | None = None,
    max_attn_len: int = 0,
) -> torch.Tensor:
    """Attention of candidates over a stored history: what `hstu_attention` gives them as targets behind it.

    Args:
        q, k, v: (T, h, dqk) and (T, h, dv) of the candidates, jagged over sequences by `offsets` (B + 1,).
        cached_k, cached_v: of the histories' tokens, jagged by `cached_offsets` (B + 1,).
        max_len, max_cached_len: upper bounds of both lengths. As in `hstu_attention`, that they are is not checked, nor
            that the offsets start at 0 and end at the number of tokens.
        softmax: softmax over the keys instead of silu(.)/N.
        cached_time: (T',) int64, the stored keys' times; `query_time` and `key_time` are the candidates'.
        alpha, attention_scale, position_bias, time_bias, max_attn_len: as in `hstu_attention`; P >= the longest history
            + 1.

    Returns:
        (T, h, dv). Not differentiable where Triton runs: this is inference.

    Raises:
        ValueError: a time bias without times, shapes other than these, a negative `max_attn_len`.
    """
    _check_times(time_bias, query_time, key_time, cached_time)
    _check(
        q, k, v, offsets, max_cached_len + 1, position_bias, time_bias, query_time, key_time, max_attn_len, 0, None,
    )  # fmt: skip
    if cached_k.shape[1:] != k.shape[1:] or cached_v.shape[1:] != v.shape[1:] or cached_k.shape[0] != cached_v.shape[0]:
        shapes = f"{tuple(cached_k.shape)} and {tuple(cached_v.shape)}"
        raise ValueError(f"cached_k and cached_v must be (T', h, dqk) and (T', h, dv) as k and v are, not {shapes}")
    if cached_offsets.shape != offsets.shape:
        raise ValueError(f"offsets and cached_offsets must be of one length, not {len(offsets)}, {len(cached_offsets)}")
    _check_lengths(cached_k.shape[0], cached_time=cached_time)
    if _fits(q, k, v) and _fits(q, cached_k, cached_v):
        from . import cached

        reverse_mode_only("cached_attention", q, k, v, cached_k, cached_v, position_bias, time_bias)
        times = [query_time, key_time, cached_time] if time_bias is not None else []
        return cached.cached_attention(
            q, k, v, offsets, cached_k, cached_v, cached_offsets, max_len, max_cached_len, alpha, attention_scale,
            softmax, position_bias, time_bias, times, max_attn_len,
        )  # fmt: skip
    return naive.cached_attention(
        q, k, v, offsets, cached_k, cached_v, cached_offsets, max_len, max_cached_len, alpha=alpha,
        attention_scale=attention_scale, softmax=softmax, position_bias=position_bias, time_bias=time_bias,
        query_time=query_time, key_time=key_time, cached_time=cached_time, max_attn_len=max_attn_len,
    )  # fmt: skip


def _in_torch(attend: Callable[..., torch.Tensor], q: torch.Tensor, *inputs: Any, **named: Any) -> torch.Tensor:
    # A program that torch.export makes has no groups: their sizes are known with the sequences' lengths alone.
    if q.is_cuda or torch.compiler.is_exporting() or not len(q):
        return attend(q, *inputs, **named)
    return grouped.by_length(attend, q, *inputs, **named)


def _fits(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    if not fits_triton(q, k, v):
        return False
    widest = max(q.shape[2], v.shape[2])
    if not (q.dtype == k.dtype == v.dtype and widest <= _WIDEST_HEAD):
        do_without(f"Triton attention takes one type, and heads of at most {_WIDEST_HEAD} dimensions")
        return False
    if q.dtype == torch.float32 and widest > _WIDEST_FLOAT32 and shared_memory() < _SHARED_MEMORY:
        do_without(f"float32 heads of more than {_WIDEST_FLOAT32} dimensions do not fit this GPU's shared memory")
        return False
    return True


def _check_times(time_bias: torch.Tensor | None, *times: torch.Tensor | None) -> None:
    if time_bias is not None and any(time is None for time in times):
        raise ValueError("time_bias needs query_time and key_time (and cached_time, with a cache)")


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    longest: int,
    position_bias: torch.Tensor | None,
    time_bias: torch.Tensor | None,
    query_time: torch.Tensor | None,
    key_time: torch.Tensor | None,
    max_attn_len: int,
    contextual_seq_len: int,
    num_targets: torch.Tensor | None,
) -> None:
    """ValueError for what shapes and Python numbers show to be wrong: a look at values would wait for the device.

    `longest`: positions that a position bias must tell apart.
    """
    if q.ndim != 3 or k.shape != q.shape or v.ndim != 3 or v.shape[:2] != q.shape[:2]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (q, k, v))
        raise ValueError(f"q, k and v must be (T, h, dqk), the same and (T, h, dv), not {shapes}")
    if position_bias is not None and (position_bias.ndim != 1 or len(position_bias) < 2 * longest - 1):
        shape = tuple(position_bias.shape)
        raise ValueError(f"position_bias must have at least {2 * longest - 1} entries, not shape {shape}")
    if time_bias is not None and time_bias.shape != (TIME_BUCKETS,):
        raise ValueError(f"time_bias must be ({TIME_BUCKETS},), not {tuple(time_bias.shape)}")
    if max_attn_len < 0 or contextual_seq_len < 0:
        given = f"{max_attn_len} and {contextual_seq_len}"
        raise ValueError(f"max_attn_len and contextual_seq_len must not be negative, as in {given}")
    # Not len(): it would make a number of a size that torch.export leaves open.
    _check_lengths(q.shape[0], query_time=query_time, key_time=key_time)
    _check_lengths(offsets.shape[0] - 1, num_targets=num_targets)


def _check_lengths(length: int, **tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != (length,):
            raise ValueError(f"{name} must be ({length},), not {tuple(tensor.shape)}")
