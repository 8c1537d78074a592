"""Layer norm over rows whose width need not suit torch's vectorised kernels."""

import torch

from ..common import fits_triton, reverse_mode_only
from . import naive

_WIDEST = 8192  # a row is one tile of the Triton kernels


def layer_norm(
    x: torch.Tensor, eps: float, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) over the last dimension, then times weight plus bias where they are given.

    Args:
        x: (T, D).
        eps: added to the variance.
        weight, bias: (D,), both or neither.

    Returns:
        (T, D), of the type of x. Statistics are float32, or the type of x where that is wider.

    Raises:
        ValueError: for x that is not (T, D), one of weight and bias alone, or either not (D,).
    """
    if x.ndim != 2:
        raise ValueError(f"x must be (T, D), not {tuple(x.shape)}")
    if (weight is None) != (bias is None):
        raise ValueError("weight and bias must both be given, or neither")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.shape != x.shape[1:]:
            raise ValueError(f"{name} must be ({x.shape[1]},), not {tuple(tensor.shape)}")
    # A kernel of its own would keep torch.compile from fusing the norm with what stands around it.
    if fits_triton(x, weight, bias) and x.shape[1] <= _WIDEST and not torch.compiler.is_compiling():
        from . import triton_op  # late: importing Triton takes time that runs on a CPU need not spend

        reverse_mode_only("layer_norm", x, weight, bias)
        return triton_op.layer_norm(x, eps, weight, bias)
    return naive.layer_norm(x, eps, weight, bias)
