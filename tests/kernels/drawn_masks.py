"""Masks drawn at random, and offsets, for tests that hold two versions of a mask together."""

import random

import torch

from kernels.hstu_attention.mask import Mask


def offsets_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])


def random_mask(draw: random.Random, targets: bool, most: int = 5) -> Mask:
    """Half of the options at a time."""

    def number(low: int = 1) -> int:
        return draw.randint(low, most)

    def some() -> bool:
        return draw.random() < 0.5

    window = number() if some() else 0
    return Mask(
        max_attn_len=window,
        contextual_seq_len=number() if some() else 0,
        min_full_attn_seq_len=number() if window and some() else 0,
        num_sink_tokens=number() if window and some() else 0,
        causal=some(),
        target_group_size=number() if targets and some() else 1,
    )
