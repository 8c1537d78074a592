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
from .checks import check, check_cached, check_numbers, check_scale, check_times
from .mask import Mask
from .naive import TIME_BUCKETS, time_bucket

__all__ = [
    "TIME_BUCKETS",
    "appended_attention",
    "cached_attention",
    "hstu_attention",
    "runs_in_triton",
    "softmax_attention",
    "time_bucket",
]

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
    """O_i = sum over the keys j that i sees of silu(alpha q_i . k_j + b_ij) / N * v_j (arXiv 2402.17152, equation 2).

    Masks are those of the authors' code, in its terms, and semi-local attention (arXiv 2602.16986), drawn in
    docs/kernels.md. Of a sequence's n tokens the last m = `num_targets` are candidates, the others the history. Every
    token has a place, which the mask counts by: its position; with a prefix of c = `contextual_seq_len` tokens,
    max(position - c + 1, 0), so that the prefix counts as one; and candidates all stand at M, where the history ends.
    Token i sees itself, and

    - the tokens of lower places; with `causal=False` those of any other place, candidates included, which history
      tokens then see;
    - of these, with a window, those at most `max_attn_len` places away. Two things lift the window: the first
      `num_sink_tokens` tokens are seen from anywhere, and queries of the last `min_full_attn_seq_len` places of the
      history, and candidates, see from one end to the other;
    - with a prefix, where i is in it: the whole history, also what comes after. Other tokens see the prefix as they see
      any token before them: with a window, not from beyond. In a sequence whose history is shorter than c, tokens see
      themselves and their group alone;
    - with groups of candidates (the first `target_group_size`, the next so many, ...): where i is one, those of its
      group up to itself; with `causal=False` all of its group.

    A candidate's output is, but for its group, what a sequence of its own would give it. With `key_offsets`, sequences
    have keys and values of their own number: a sequence's queries are its last tokens, so that query r of nq stands at
    position nk - nq + r among its nk keys. So new tokens attend to keys that are stored, or one sequence to another
    (with `causal=False`, and but the key in its own place none is hidden). Queries that would stand before the first
    key see nothing: their outputs and gradients are zero.

    Args:
        q, k: (T, h, dqk), jagged over sequences; float32, float16 or bfloat16, v too, all of one type. With
            `key_offsets` k is (T', h, dqk).
        v: (T, h, dv), or (T', h, dv).
        offsets: (B + 1,) int64; must start at 0 and end at T, which is not checked: that would wait for the device.
        max_len: an upper bound of the lengths, of queries and of keys; no sequence may be longer, which is not checked
            either.
        alpha: factor on q . k.
        attention_scale: N, which divides; None stands for each sequence's own number of keys, its targets counted as
            one. A tensor (T,) of floats has an N for each query: the reciprocal of the factor that the authors' code
            multiplies a query's output by. It gets no gradient.
        position_bias: p, (2P - 1,) with P >= max_len: adds p[j - i], index 0 at P - 1. Here i and j are positions,
            those of candidates cut at the history's length; a prefix changes none.
        time_bias: w, (129,): adds w[time_bucket(query_time_i - key_time_j)].
        query_time, key_time: (T,) int64, seconds; needed with `time_bias`. With `key_offsets` key_time is (T',).
        max_attn_len: 0 for no window; a query sees so many tokens beside itself on a side.
        contextual_seq_len: length of the prefix.
        num_targets: (B,) int64; as many as the sequence has tokens, where they are more.
        min_full_attn_seq_len, num_sink_tokens: with a window only; 0 for none.
        causal: whether tokens see only what is before them.
        target_group_size: with `num_targets` only; 1 for candidates that do not see each other.
        key_offsets: (B + 1,) int64, of k, v and key_time; must start at 0 and end at T'. None where they are q's.

    Returns:
        (T, h, dv). Differentiable in q, k, v and both tables.

    Raises:
        ValueError: a time bias without times, shapes or types other than these, a negative number, masks that make no
            sense together, an `attention_scale` that wants a gradient.
        NotImplementedError, RuntimeError: a forward-mode, or a second derivative, where Triton runs.
    """
    mask = Mask(
        max_attn_len, contextual_seq_len, min_full_attn_seq_len, num_sink_tokens, causal, target_group_size
    )  # fmt: skip
    check_times(time_bias, query_time, key_time)
    check(q, k, v, offsets, max_len, position_bias, time_bias, query_time, key_time, mask, num_targets, key_offsets)
    check_scale(attention_scale, q.shape[0])
    if runs_in_triton(q, k, v):
        from . import op

        common_scale, query_scale = _scales(attention_scale)
        reverse_mode_only("hstu_attention", q, k, v, position_bias, time_bias, query_scale)
        return op.attention(
            q, k, v, offsets, max_len, alpha, common_scale, position_bias, time_bias, query_time, key_time,
            max_attn_len, contextual_seq_len, num_targets, False, min_full_attn_seq_len, num_sink_tokens, causal,
            target_group_size, key_offsets, query_scale,
        )[0]  # fmt: skip
    return _in_torch(
        naive.hstu_attention, q, k, v, offsets, max_len, alpha=alpha, attention_scale=attention_scale,
        position_bias=position_bias, time_bias=time_bias, query_time=query_time, key_time=key_time,
        num_targets=num_targets, key_offsets=key_offsets, **mask._asdict(),
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
    min_full_attn_seq_len: int = 0,
    num_sink_tokens: int = 0,
    causal: bool = True,
    target_group_size: int = 1,
    key_offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """The ablation of `hstu_attention`: the same scores and masks, softmax over the keys seen instead of silu(.)/N.

    Takes, returns and raises what `hstu_attention` does, but for `attention_scale`.
    """
    mask = Mask(
        max_attn_len, contextual_seq_len, min_full_attn_seq_len, num_sink_tokens, causal, target_group_size
    )  # fmt: skip
    check_times(time_bias, query_time, key_time)
    check(q, k, v, offsets, max_len, position_bias, time_bias, query_time, key_time, mask, num_targets, key_offsets)
    if runs_in_triton(q, k, v):
        from . import op

        reverse_mode_only("softmax_attention", q, k, v, position_bias, time_bias)
        return op.attention(
            q, k, v, offsets, max_len, alpha, None, position_bias, time_bias, query_time, key_time,
            max_attn_len, contextual_seq_len, num_targets, True, min_full_attn_seq_len, num_sink_tokens, causal,
            target_group_size, key_offsets, None,
        )[0]  # fmt: skip
    return _in_torch(
        naive.softmax_attention, q, k, v, offsets, max_len, alpha=alpha, position_bias=position_bias,
        time_bias=time_bias, query_time=query_time, key_time=key_time, num_targets=num_targets,
        key_offsets=key_offsets, **mask._asdict(),
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
    """Attention of candidates over a stored history: what `hstu_attention` gives them as targets behind it.

    Of its masks those that a candidate knows: a window, to which a stored prefix counts as so many tokens, not as one;
    tokens seen beyond it; and groups. With `min_full_attn_seq_len` a model's candidates see everything: give no window.

    Args:
        q, k, v: (T, h, dqk) and (T, h, dv) of the candidates, jagged over sequences by `offsets` (B + 1,).
        cached_k, cached_v: (T', h, dqk) and (T', h, dv) of the histories' tokens, jagged by `cached_offsets` (B + 1,);
            of q's type.
        offsets, cached_offsets: start at 0. Rows from their last number on, as buffers of a fixed size have them,
            belong to nobody: they are not read, and outputs of theirs may be anything.
        max_len, max_cached_len: upper bounds of both lengths. As in `hstu_attention`, that they are is not checked, nor
            what the offsets are.
        softmax: softmax over the keys instead of silu(.)/N.
        query_time, key_time: (B,) int64, seconds: all candidates of a sequence ask at one time, and stand at one as
            keys.
        cached_time: (T',) int64, the stored keys' times.
        alpha, attention_scale, position_bias, time_bias, max_attn_len, num_sink_tokens, target_group_size: as in
            `hstu_attention`; P >= max_cached_len + 1. `softmax` leaves attention_scale unread.

    Returns:
        (T, h, dv). Differentiable in torch alone: this is for inference.

    Raises:
        ValueError: a time bias without times, shapes or types other than these, a negative number, tokens seen beyond a
            window that is not there.
        NotImplementedError, RuntimeError: a derivative, where Triton runs.
    """
    check_times(time_bias, query_time, key_time, cached_time)
    mask = Mask(max_attn_len, num_sink_tokens=num_sink_tokens, target_group_size=target_group_size)
    check_numbers(max_len=max_len, max_cached_len=max_cached_len)
    check(q, k, v, offsets, max_cached_len + 1, position_bias, time_bias, None, None, mask, offsets[1:], None)
    check_cached(q, k, v, offsets, cached_k, cached_v, cached_offsets, query_time, key_time, cached_time)
    check_scale(attention_scale, q.shape[0])
    if runs_in_triton(q, k, v) and runs_in_triton(q, cached_k, cached_v):
        from . import cached

        common_scale, query_scale = _scales(attention_scale)
        reverse_mode_only("cached_attention", q, k, v, cached_k, cached_v, position_bias, time_bias, query_scale)
        times = [query_time, key_time, cached_time] if time_bias is not None else []
        return cached.cached_attention(
            q, k, v, offsets, cached_k, cached_v, cached_offsets, max_len, max_cached_len, alpha, common_scale,
            softmax, position_bias, time_bias, times, max_attn_len, num_sink_tokens, target_group_size, query_scale,
        )  # fmt: skip
    return naive.cached_attention(
        q, k, v, offsets, cached_k, cached_v, cached_offsets, max_len, max_cached_len, alpha=alpha,
        attention_scale=attention_scale, softmax=softmax, position_bias=position_bias, time_bias=time_bias,
        query_time=query_time, key_time=key_time, cached_time=cached_time, max_attn_len=max_attn_len,
        num_sink_tokens=num_sink_tokens, target_group_size=target_group_size,
    )  # fmt: skip


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
    """Attention of new tokens over histories that they are the last tokens of: what `hstu_attention` and
    `softmax_attention` give them with `key_offsets`, under the causal mask or semi-local, for inference alone.

    Faster where a sequence's new tokens are few beside its keys: the bias of each pair is calculated once for all
    heads, in parts of at most 64 MiB.

    Args:
        q: (T, h, dqk), of the new tokens, jagged over sequences by `offsets` (B + 1,).
        k, v: (T', h, dqk) and (T', h, dv) of all tokens, the new ones included, jagged by `key_offsets` (B + 1,).
        offsets, key_offsets: start at 0. Rows from their last number on belong to nobody: they are not read, and
            outputs of theirs may be anything.
        max_new, max_len: upper bounds of a sequence's new tokens, and of all its tokens.
        attention_scale: a number; None stands for each sequence's own number of tokens.
        softmax: softmax over the keys instead of silu(.)/N.
        query_time, key_time: (T,) and (T',) int64, seconds; needed with `time_bias`.
        alpha, position_bias, time_bias, max_attn_len, num_sink_tokens: as in `hstu_attention`; P >= max_len.

    None of these bounds is checked, nor that a sequence has at least as many keys as new tokens.

    Returns:
        (T, h, dv). Differentiable in torch alone.

    Raises:
        ValueError: a time bias without times, shapes or types other than these, a negative number, tokens seen beyond a
            window that is not there.
        NotImplementedError, RuntimeError: a derivative, where Triton runs.
    """
    check_times(time_bias, query_time, key_time)
    mask = Mask(max_attn_len, num_sink_tokens=num_sink_tokens)
    check_numbers(max_new=max_new)
    check(q, k, v, offsets, max_len, position_bias, time_bias, query_time, key_time, mask, None, key_offsets)
    if isinstance(attention_scale, torch.Tensor):
        raise ValueError("attention_scale must be a number or None, not a tensor: hstu_attention takes one")
    if runs_in_triton(q, k, v):
        from . import appended

        reverse_mode_only("appended_attention", q, k, v, position_bias, time_bias)
        return appended.appended_attention(
            q, k, v, offsets, key_offsets, max_new, max_len, alpha, attention_scale, softmax, position_bias, time_bias,
            query_time, key_time, max_attn_len, num_sink_tokens,
        )  # fmt: skip
    return naive.appended_attention(
        q, k, v, offsets, key_offsets, max_new, max_len, alpha=alpha, attention_scale=attention_scale, softmax=softmax,
        position_bias=position_bias, time_bias=time_bias, query_time=query_time, key_time=key_time,
        max_attn_len=max_attn_len, num_sink_tokens=num_sink_tokens,
    )  # fmt: skip


def _in_torch(attend: Callable[..., torch.Tensor], q: torch.Tensor, *inputs: Any, **named: Any) -> torch.Tensor:
    # A program that torch.export makes has no groups: their sizes are known with the sequences' lengths alone.
    if q.is_cuda or torch.compiler.is_exporting() or not len(q):
        return attend(q, *inputs, **named)
    return grouped.by_length(attend, q, *inputs, **named)


def runs_in_triton(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether attention of (T, h, dqk) and (T, h, dv) like these goes through Triton kernels, which do not wait for the
    device: a CUDA graph can hold them."""
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


def _scales(attention_scale: float | torch.Tensor | None) -> tuple[float | None, torch.Tensor | None]:
    """As operations of torch take it: one number for all queries, or one for each."""
    if isinstance(attention_scale, torch.Tensor):
        return None, attention_scale
    return attention_scale, None
