"""What HSTU does with attention's output: normalise it, gate it with U, drop."""

import torch

from ..common import fits_triton, reverse_mode_only
from . import naive

_WIDEST = 8192  # what is normalised together is a row of a tile of the Triton kernels


def norm_gate(
    u: torch.Tensor,
    attended: torch.Tensor,
    dropout: float,
    training: bool,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    heads: int | None = None,
    concat_ux: bool = False,
) -> torch.Tensor:
    """dropout(U * norm(A V)), the input of W_o (equation 3 of arXiv 2402.17152).

    As it stands, it is the gate of the authors' retrieval experiments: one layer norm over all D channels, without
    weight and bias. Their ranking model has weight and bias, may normalise each head by itself, and hands U, A V and
    the gate to W_o, one beside the other. The norm's eps is 1e-6.

    Args:
        u: (T, D), which may be a view with longer rows, as a split of the UVQK product is.
        attended: (T, D), the heads concatenated.
        dropout: the probability that an element of the result becomes 0; the others are divided by 1 - dropout.
        training: otherwise nothing is dropped.
        weight, bias: what the norm is multiplied with, and what is added then, both or neither: (D,), or (heads,) with
            `heads`.
        heads: how many groups of D / heads neighbouring channels are normalised, each by itself; None: all as one.
        concat_ux: the result is dropout([U, A V, U * norm(A V)]), along the channels.

    Returns:
        (T, D); (T, 3 D) with `concat_ux`. Nothing random is drawn unless something may be dropped; torch.manual_seed
        determines the draw.

    Raises:
        ValueError: for u and attended that are not the same (T, D), heads that do not divide D, one of weight and bias
            alone or of another shape, or a dropout outside [0, 1).
    """
    if u.ndim != 2 or u.shape != attended.shape:
        raise ValueError(f"u and attended must have one shape (T, D), not {tuple(u.shape)} and {tuple(attended.shape)}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), not {dropout}")
    if heads is not None and (heads < 1 or u.shape[1] % heads):
        raise ValueError(f"heads must divide the {u.shape[1]} channels, not be {heads}")
    if (weight is None) != (bias is None):
        raise ValueError("weight and bias must both be given, or neither")
    entries = u.shape[1] if heads is None else heads
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.shape != (entries,):
            raise ValueError(f"{name} must be ({entries},), not {tuple(tensor.shape)}")
    if fits_triton(u, attended, weight, bias) and u.shape[1] // (heads or 1) <= _WIDEST:
        from . import triton_op  # late: importing Triton takes time that runs on a CPU need not spend

        reverse_mode_only("norm_gate", u, attended, weight, bias)
        return triton_op.norm_gate(u, attended, dropout, training, weight, bias, heads, concat_ux)
    return naive.norm_gate(u, attended, dropout, training, weight, bias, heads, concat_ux)
