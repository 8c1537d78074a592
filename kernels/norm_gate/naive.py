"""The gate in torch: every intermediate of size T x D goes through memory."""

import torch
import torch.nn.functional as F

#: What is added to a row's variance (the authors' layer norms).
LAYER_NORM_EPS = 1e-6


def layer_norm(x: torch.Tensor) -> torch.Tensor:
    """LayerNorm over the last dimension, without affine terms."""
    return F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)


def norm_gate(u: torch.Tensor, attended: torch.Tensor, dropout: float, training: bool) -> torch.Tensor:
    return F.dropout(u * layer_norm(attended), dropout, training)
