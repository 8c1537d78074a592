"""HSTU's pointwise projection: layer norm, matrix product and SiLU."""

import torch

from ..common import fits_triton, reverse_mode_only, tf32_allowed
from . import naive

# The fused kernels take a third to a half of torch's time at d = 50 and 64, and 1.5 to 1.9 times it at d = 256, where
# cuBLAS's products win back what the layer norm and SiLU cost in passes of their own (H200, reports/studies/kernels).
_WIDEST = 64


def projection(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """silu(LN(x) W_uvqk), which U, V, Q and K are split from (equation 1 of arXiv 2402.17152).

    The layer norm is over the last dimension, without affine terms; its eps is 1e-6. The product is taken in
    the type of x, and accumulated in float32; on CUDA it is TF32 where torch.backends.cuda.matmul allows it.

    Args:
        x: (T, d).
        weight: (d, K), of the type of x.

    Returns:
        (T, K).

    Raises:
        ValueError: for shapes that do not match, or two types.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[0]:
        raise ValueError(f"x and weight must be (T, d) and (d, K), not {tuple(x.shape)} and {tuple(weight.shape)}")
    if x.dtype != weight.dtype:
        raise ValueError(f"x and weight must have one type, not {x.dtype} and {weight.dtype}")
    if fits_triton(x, weight) and _fused(x):
        from . import triton_op  # late: importing Triton takes time that runs on a CPU need not spend

        reverse_mode_only("projection", x, weight)
        return triton_op.projection(x, weight)
    return naive.projection(x, weight)


def _fused(x: torch.Tensor) -> bool:
    """Whether the Triton kernels are the faster ones."""
    # IEEE float32 products have no tensor cores: cuBLAS is left to do them.
    return x.shape[1] <= _WIDEST and (x.dtype != torch.float32 or tf32_allowed())
