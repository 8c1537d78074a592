"""Sampled softmax over L2-normalised states and item vectors."""

import torch

from ..common import fits_triton, reverse_mode_only
from . import dense, naive

_DENSE_ITEMS_PER_NEGATIVE = 64


def sampled_softmax(
    states: torch.Tensor,
    table: torch.Tensor,
    positives: torch.Tensor,
    negatives: torch.Tensor,
    temperature: float,
    log_frequency: torch.Tensor | None = None,
) -> torch.Tensor:
    """-log softmax of the positive among itself and its sampled negatives, per token.

    The score of an item is the cosine of its vector and the state, over the temperature. A negative
    that equals the positive gets the logit -5e4, which leaves it out.

    Args:
        states: (T, d), not normalised.
        table: (V, d) item vectors, not normalised.
        positives: (T,) int64, rows of the table.
        negatives: (T, R) int64, rows of the table.
        temperature: what cosines are divided by.
        log_frequency: (V,), subtracted from the logits of positives and negatives; the correction for
            negatives that are not drawn uniformly, a constant. The masked logit is not corrected.

    Returns:
        (T,) losses, from the Triton version in float32; that one has first derivatives only.

    Raises:
        ValueError: for shapes other than these.

    On CUDA, float32, bfloat16 and float16 always go to Triton, which needs no T x R x d memory. Whether the matrix
    product (`dense`) is faster there for small catalogues is still to be measured. Everywhere else small
    catalogues go through `dense`: on 2 CPU cores at T = 13,000, V = 3,884, R = 128, d = 50, forward and
    backward take 0.23 s, gathering T x R vectors (`naive`) 1.6 s.
    """
    _check_shapes(states, table, positives, negatives, log_frequency)
    if fits_triton(states, table):
        from . import triton_op  # here, since importing triton takes time

        reverse_mode_only("sampled_softmax", states, table, log_frequency)
        return triton_op.sampled_softmax(states, table, positives, negatives, temperature, log_frequency)
    small = len(table) <= _DENSE_ITEMS_PER_NEGATIVE * negatives.shape[1]
    return (dense if small else naive).sampled_softmax(states, table, positives, negatives, temperature, log_frequency)


def _check_shapes(
    states: torch.Tensor,
    table: torch.Tensor,
    positives: torch.Tensor,
    negatives: torch.Tensor,
    log_frequency: torch.Tensor | None,
) -> None:
    if states.ndim != 2 or table.ndim != 2 or states.shape[1] != table.shape[1]:
        raise ValueError(
            f"states and table must be (T, d) and (V, d), not {tuple(states.shape)} and {tuple(table.shape)}"
        )
    tokens = len(states)
    if positives.shape != (tokens,) or negatives.ndim != 2 or len(negatives) != tokens:
        raise ValueError(
            f"positives and negatives must be ({tokens},) and ({tokens}, R), "
            f"not {tuple(positives.shape)} and {tuple(negatives.shape)}"
        )
    if log_frequency is not None and log_frequency.shape != (len(table),):
        raise ValueError(f"log_frequency must be ({len(table)},), not {tuple(log_frequency.shape)}")
