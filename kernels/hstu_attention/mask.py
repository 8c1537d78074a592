"""Which keys a query sees: the numbers that say it, and which of them make no sense together."""

from typing import NamedTuple


class Mask(NamedTuple):
    """The arguments of `hstu_attention` that have these names; as they stand here, the causal mask."""

    max_attn_len: int = 0
    contextual_seq_len: int = 0
    min_full_attn_seq_len: int = 0
    num_sink_tokens: int = 0
    causal: bool = True
    target_group_size: int = 1


CAUSAL = Mask()


def check_mask(mask: Mask, targets: bool) -> None:
    """ValueError for a mask without a meaning, of numbers that are not negative. `targets`: the rows have some."""
    if not mask.max_attn_len and (mask.min_full_attn_seq_len or mask.num_sink_tokens):
        name = "min_full_attn_seq_len" if mask.min_full_attn_seq_len else "num_sink_tokens"
        raise ValueError(f"{name} lifts the window, and there is none: give max_attn_len too")
    if mask.target_group_size < 1:
        raise ValueError(f"target_group_size must be at least 1, not {mask.target_group_size}")
    if mask.target_group_size > 1 and not targets:
        raise ValueError("target_group_size groups targets, and there are none: give num_targets too")


def cut_mask(mask: Mask, longest: int) -> Mask:
    """A mask that means the same in sequences of at most `longest` tokens, of numbers that 32 bits hold with one of
    them added."""
    numbers = {name: min(number, longest + 1) for name, number in mask._asdict().items() if name != "causal"}
    return mask._replace(**numbers)
