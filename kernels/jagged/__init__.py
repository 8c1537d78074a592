"""Jagged tensors: sequences of different lengths, stored one after the other.

A jagged tensor is `values` (T, ...) with `offsets` (B + 1,) int64: sequence b is values[offsets[b]:offsets[b + 1]].
fbgemm_gpu does the work where it is installed and takes the type; the torch twin in `naive` elsewhere.
"""

import torch

from . import fbgemm, naive


def offsets_from_lengths(lengths: torch.Tensor) -> torch.Tensor:
    """Offsets (B + 1,) of sequences of the given lengths (B,) int64: zero, then their running sum."""
    return (fbgemm if fbgemm.fits(lengths) else naive).offsets_from_lengths(lengths)


def to_padded(
    values: torch.Tensor, offsets: torch.Tensor, max_len: int, index: torch.Tensor | None = None
) -> torch.Tensor:
    """Values (T, D) to a padded tensor (B, max_len, D), zeros behind each sequence; differentiable.

    No sequence may be longer than `max_len`: what is beyond it would be lost. index (T,) int64: each value's sequence
    x max_len + its position there, for those who have it at hand; torch, unlike fbgemm, would have to find it.
    """
    if fbgemm.fits(values):
        return fbgemm.to_padded(values, offsets, max_len)
    return naive.to_padded(values, offsets, max_len, index)


def to_jagged(padded: torch.Tensor, offsets: torch.Tensor, total: int | None = None) -> torch.Tensor:
    """The inverse of `to_padded`: (B, N, D) to values (T, D); differentiable.

    total: T, for those who have it at hand: else the offsets are asked, which waits for the device.
    """
    return (fbgemm if fbgemm.fits(padded) else naive).to_jagged(padded, offsets, total)


def select_rows(values: torch.Tensor, offsets: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequences `rows` (B',) int64 of a jagged tensor (T, D), in that order: (values (T', D), offsets (B' + 1,)).

    Differentiable in the values; one may be given more than once.
    """
    by_fbgemm = fbgemm.fits(values) and fbgemm.selects(values)
    return (fbgemm if by_fbgemm else naive).select_rows(values, offsets, rows)
