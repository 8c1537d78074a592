"""Cross-entropy of targets among all items, whose logits are a product of states and item vectors."""

import torch

from ..common import do_without, fits_triton, reverse_mode_only, tf32_allowed
from . import naive

_WIDEST = 256
#: The widest float32 vectors with which the kernels are faster than torch: measured on an H200, they take 0.4 times as
#: long at 50 and 64 dimensions, 1.4 times at 128 and 2.3 times at 256.
_WIDEST_SINGLE = 64


def linear_cross_entropy(
    states: torch.Tensor, items: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The mean of -log softmax(E h + bias)[target] over the targets that are not 0.

    Row 0 of the items is padding: it has no part in the softmax, and no gradient. On CUDA logits are calculated in
    tiles and never stored, products are accumulated in float32, and those of float32 are TF32. Where torch does not
    allow TF32, vectors are wider than 256, those of float32 than 64, or the type is another one, torch does the work.

    Args:
        states: (M, d), h.
        items: (V, d), E, of the type of the states.
        targets: (M,) int64, rows of the items; 0 is left out.
        bias: (V,), of the type of the states; None: zeros.

    Returns:
        A number; NaN if all targets are 0, with gradients of 0. From the Triton version it is float32, has first
        derivatives only, and is NaN for a target that is no row of the items, which torch refuses.

    Raises:
        ValueError: for shapes that do not match, or more than one type.
    """
    _check(states, items, targets, bias)
    if fits_triton(states, items, bias) and _fused(states):
        from . import triton_op  # here, since importing triton takes time

        reverse_mode_only("linear_cross_entropy", states, items, bias)
        return triton_op.linear_cross_entropy(states, items, targets, bias)
    return naive.linear_cross_entropy(states, items, targets, bias)


def _fused(states: torch.Tensor) -> bool:
    """Whether the kernels take such states, and are the faster ones."""
    if states.shape[1] > _WIDEST:
        do_without(f"linear_cross_entropy in Triton takes vectors of at most {_WIDEST} dimensions")
        return False
    # IEEE float32 products have no tensor cores: cuBLAS is left to do them.
    return states.dtype != torch.float32 or (states.shape[1] <= _WIDEST_SINGLE and tf32_allowed())


def _check(states: torch.Tensor, items: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None) -> None:
    if states.ndim != 2 or items.ndim != 2 or states.shape[1] != items.shape[1]:
        raise ValueError(
            f"states and items must be (M, d) and (V, d), not {tuple(states.shape)} and {tuple(items.shape)}"
        )
    if targets.shape != states.shape[:1]:
        raise ValueError(f"targets must be ({len(states)},), not {tuple(targets.shape)}")
    if bias is not None and bias.shape != items.shape[:1]:
        raise ValueError(f"bias must be ({len(items)},), not {tuple(bias.shape)}")
    types = {tensor.dtype for tensor in (states, items, bias) if tensor is not None}
    if len(types) > 1:
        raise ValueError(f"states, items and bias must have one type, not {', '.join(sorted(map(str, types)))}")
