"""The gate in torch: every intermediate of size T x D goes through memory."""

import torch
import torch.nn.functional as F

from ..layer_norm.naive import layer_norm

#: What is added to a row's variance (the authors' layer norms).
LAYER_NORM_EPS = 1e-6


def norm_gate(
    u: torch.Tensor,
    attended: torch.Tensor,
    dropout: float,
    training: bool,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    heads: int | None = None,
    concat_ux: bool = False,
) -> torch.Tensor:
    if heads is None:
        normalised = layer_norm(attended, LAYER_NORM_EPS, weight, bias)
    else:
        normalised = _norm_of_heads(attended, heads, weight, bias)
    gated = u * normalised
    if concat_ux:
        gated = torch.cat([u, attended, gated], 1)  # (T, 3 D)
    return F.dropout(gated, dropout, training)


def _norm_of_heads(
    attended: torch.Tensor, heads: int, weight: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """Each head of (T, h dv) by itself; weight and bias are (h,)."""
    tokens, width = attended.shape
    normalised = layer_norm(attended.view(tokens, heads, width // heads), LAYER_NORM_EPS)  # (T, h, dv)
    if weight is not None and bias is not None:
        normalised = normalised * weight[:, None] + bias[:, None]
    return normalised.view(tokens, width)
