"""HSTU's pointwise projection: layer norm, matrix product and SiLU."""

import torch

from ..common import fits_triton, reverse_mode_only, tf32_allowed
from . import naive

# The fused kernels take a third to a half of torch's time at d = 50 and 64, and 1.5 to 1.9 times it at d = 256, where
# cuBLAS's products win back what the layer norm and SiLU cost in passes of their own (H200, reports/studies/kernels).
_WIDEST = 64


def projection(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    silu_columns: int | None = None,
) -> torch.Tensor:
    """silu(LN(x) W_uvqk + b), which U, V, Q and K are split from (equation 1 of arXiv 2402.17152).

    As it stands, without bias, it is that of the authors' retrieval experiments. Their ranking model has a bias, weight
    and bias in the layer norm, and silu for U alone, the first h dv columns.

    The layer norm is over the last dimension; its eps is 1e-6. The product is taken in the type of x, and accumulated
    in float32; on CUDA it is TF32 where torch.backends.cuda.matmul allows it.

    Args:
        x: (T, d).
        weight: (d, K), of the type of x.
        bias: (K,), added to the product.
        norm_weight, norm_bias: (d,), of the layer norm, both or neither.
        silu_columns: how many of the first columns go through silu, the others staying what they are; None: all.

    Returns:
        (T, K).

    Raises:
        ValueError: for shapes that do not match, two types, one of norm_weight and norm_bias alone, or silu_columns
            beyond K.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[0]:
        raise ValueError(f"x and weight must be (T, d) and (d, K), not {tuple(x.shape)} and {tuple(weight.shape)}")
    if x.dtype != weight.dtype:
        raise ValueError(f"x and weight must have one type, not {x.dtype} and {weight.dtype}")
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError("norm_weight and norm_bias must both be given, or neither")
    (d, k), vectors = weight.shape, (bias, norm_weight, norm_bias)
    for name, size, tensor in zip(("bias", "norm_weight", "norm_bias"), (k, d, d), vectors, strict=True):
        if tensor is not None and tensor.shape != (size,):
            raise ValueError(f"{name} must be ({size},), not {tuple(tensor.shape)}")
    if silu_columns is not None and not 0 <= silu_columns <= k:
        raise ValueError(f"silu_columns must be in 0 to {k}, not {silu_columns}")
    if fits_triton(x, weight, *vectors) and _fused(x):
        from . import triton_op  # late: importing Triton takes time that runs on a CPU need not spend

        reverse_mode_only("projection", x, weight, *vectors)
        return triton_op.projection(x, weight, *vectors, silu_columns)
    return naive.projection(x, weight, *vectors, silu_columns)


def _fused(x: torch.Tensor) -> bool:
    """Whether the Triton kernels are the faster ones."""
    # IEEE float32 products have no tensor cores: cuBLAS is left to do them.
    return x.shape[1] <= _WIDEST and (x.dtype != torch.float32 or tf32_allowed())
