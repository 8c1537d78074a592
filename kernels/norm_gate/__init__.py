"""What HSTU does with attention's output: normalise it, gate it with U, drop."""

import torch

from ..common import fits_triton, reverse_mode_only
from . import naive

_WIDEST = 8192  # a row is one tile of the Triton kernels


def norm_gate(u: torch.Tensor, attended: torch.Tensor, dropout: float, training: bool) -> torch.Tensor:
    """dropout(U * LN(A V)), the input of W_o (equation 3 of arXiv 2402.17152).

    The layer norm is over the last dimension, without affine terms; its eps is 1e-6.

    Args:
        u: (T, D), which may be a view with longer rows, as a split of the UVQK product is.
        attended: (T, D), the heads concatenated.
        dropout: the probability that an element becomes 0; the others are divided by 1 - dropout.
        training: otherwise nothing is dropped.

    Returns:
        (T, D). Nothing random is drawn unless something may be dropped; torch.manual_seed determines the draw.

    Raises:
        ValueError: for shapes that are not the same (T, D), or a dropout outside [0, 1).
    """
    if u.ndim != 2 or u.shape != attended.shape:
        raise ValueError(f"u and attended must have one shape (T, D), not {tuple(u.shape)} and {tuple(attended.shape)}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), not {dropout}")
    if fits_triton(u, attended) and u.shape[1] <= _WIDEST:
        from . import triton_op  # late: importing Triton takes time that runs on a CPU need not spend

        reverse_mode_only("norm_gate", u, attended)
        return triton_op.norm_gate(u, attended, dropout, training)
    return naive.norm_gate(u, attended, dropout, training)
