"""The gate in torch: every intermediate of size T x D goes through memory."""

import torch
import torch.nn.functional as F

from ..layer_norm.naive import layer_norm

#: What is added to a row's variance (the authors' layer norms).
LAYER_NORM_EPS = 1e-6


def norm_gate(u: torch.Tensor, attended: torch.Tensor, dropout: float, training: bool) -> torch.Tensor:
    return F.dropout(u * layer_norm(attended, LAYER_NORM_EPS), dropout, training)
