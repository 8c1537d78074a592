"""Rotary position embeddings (arXiv 2104.09864) of queries and keys that one product has made with the values."""

import torch

from ..common import fits_triton, reverse_mode_only
from . import naive

_WIDEST = 8192  # the pairs of a token's queries are one row of the Triton kernels' tile


def rotary(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Turn feature a of each query and key together with feature a + D // 2, by the token's a-th angle.

    Args:
        qkv: (T, 3, H, D): queries, keys and values of H heads.
        cos, sin: (T, D // 2), of the angles; of float32, or of the type of qkv where that is wider.

    Returns:
        Queries and keys, turned, and the values, each (T, H, D) of the type of qkv: parts of tensors whose last
        dimension is contiguous, the values of qkv itself. An odd last feature is left as it is.

    Raises:
        ValueError: for shapes other than these.
    """
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv must be (T, 3, H, D), not {tuple(qkv.shape)}")
    tokens, _, heads, width = qkv.shape
    for name, tensor in (("cos", cos), ("sin", sin)):
        if tensor.shape != (tokens, width // 2):
            raise ValueError(f"{name} must be ({tokens}, {width // 2}), not {tuple(tensor.shape)}")
    suits = width % 2 == 0 and heads * width // 2 <= _WIDEST
    # A kernel of its own would keep torch.compile from fusing the turn with what stands around it.
    if suits and fits_triton(qkv, cos, sin) and not torch.compiler.is_compiling():
        from . import triton_op  # late: importing Triton takes time that runs on a CPU need not spend

        reverse_mode_only("rotary", qkv, cos, sin)
        return triton_op.rotary(qkv, cos, sin)
    return naive.rotary(qkv, cos, sin)
