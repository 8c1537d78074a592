"""Random inputs of the operations, as the tuner and the benchmark use them."""

from typing import Any

import torch


def lengths_of(batch: int, max_len: int, ragged: bool, device: str) -> torch.Tensor:
    """(batch,) row lengths: all `max_len`; or, as in MovieLens, spread from a tenth of it, a third at the maximum."""
    if not ragged:
        return torch.full((batch,), max_len, device=device)
    share = torch.linspace(0.1, 1.4, batch, device=device).clamp(max=1.0)
    return (share * max_len).long()[torch.randperm(batch, device=device)]


def attention_inputs(
    lengths: torch.Tensor, heads: int, dqk: int, dv: int, dtype: torch.dtype, bias: str
) -> dict[str, Any]:
    """Arguments of `hstu_attention`: Q, K and V are views of one product, as in a layer; N is the longest length.

    `bias` is none, position, time or both. Gaps between timestamps are log-normal, a minute at the median, with a
    standard deviation of 2 in the logarithm; the query's time is the next item's.
    """
    device = lengths.device
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    total, longest = int(offsets[-1]), int(lengths.max())
    mixed = torch.randn(total, heads * (2 * dqk + 2 * dv), device=device).to(dtype)
    _, v, q, k = mixed.split([heads * dv, heads * dv, heads * dqk, heads * dqk], dim=1)
    time = (60 * torch.exp(2 * torch.randn(total + 1, device=device, dtype=torch.float64))).long().cumsum(0) + 10**9
    return {
        "q": q.view(total, heads, dqk),
        "k": k.view(total, heads, dqk),
        "v": v.view(total, heads, dv),
        "offsets": offsets,
        "max_len": longest,
        "alpha": dqk**-0.5,
        "attention_scale": float(longest),
        "position_bias": 0.02 * torch.randn(2 * longest - 1, device=device) if bias in ("position", "both") else None,
        "time_bias": 0.02 * torch.randn(129, device=device) if bias in ("time", "both") else None,
        "query_time": time[1:] if bias in ("time", "both") else None,
        "key_time": time[:-1] if bias in ("time", "both") else None,
        "max_attn_len": 0,
        "contextual_seq_len": 0,
        "num_targets": None,
        "softmax": False,
    }


def attention_flops(lengths: torch.Tensor, heads: int, dqk: int, dv: int) -> tuple[float, float]:
    """Floating-point operations, forward and backward: 2 h (dqk + dv) sum n^2 / 2, and 2.5 times that."""
    forward = 2 * heads * (dqk + dv) * float((lengths.double() ** 2).sum()) / 2
    return forward, 2.5 * forward
