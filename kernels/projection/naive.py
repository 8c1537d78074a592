"""The projection in torch: the normalised rows and the product go through memory."""

import torch
import torch.nn.functional as F

from ..layer_norm.naive import layer_norm
from ..norm_gate.naive import LAYER_NORM_EPS


def projection(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    silu_columns: int | None = None,
) -> torch.Tensor:
    normalised = layer_norm(x, LAYER_NORM_EPS, norm_weight, norm_bias)
    product = normalised @ weight if bias is None else torch.addmm(bias, normalised, weight)  # (T, K)
    if silu_columns is None:
        return F.silu(product)
    u, others = product.split([silu_columns, weight.shape[1] - silu_columns], 1)
    return torch.cat([F.silu(u), others], 1)
