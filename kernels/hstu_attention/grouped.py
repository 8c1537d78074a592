"""The torch version on sequences grouped by length, for a CPU: a group is padded to its own longest."""

from collections.abc import Callable
from typing import Any

import torch

from ..jagged.naive import offsets_from_lengths, sequence_and_position

_GROUPS = 4
#: Grouping copies every token once; less than this share of padded scores must be left for it to pay.
_WORTH = 0.75


def by_length(
    attend: Callable[..., torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    max_len: int,
    *,
    attention_scale: float | torch.Tensor | None = None,
    query_time: torch.Tensor | None = None,
    key_time: torch.Tensor | None = None,
    num_targets: torch.Tensor | None = None,
    key_offsets: torch.Tensor | None = None,
    **others: Any,
) -> torch.Tensor:
    """`attend`, one of the functions of `naive`, with the same arguments and result.

    On MovieLens-1M windows 4 groups of 32 have half of the padded scores that 128 together have.
    """
    if attention_scale is not None:  # softmax takes none
        others["attention_scale"] = attention_scale
    lengths = offsets.diff()
    longer = lengths if key_offsets is None else torch.maximum(lengths, key_offsets.diff())
    groups = [members for members in longer.argsort(stable=True).tensor_split(_GROUPS) if len(members)]
    longest = [int(longer[members].max()) for members in groups]
    padded = sum(len(members) * n * n for members, n in zip(groups, longest, strict=True))
    if padded >= _WORTH * len(lengths) * max_len**2:
        times = {"query_time": query_time, "key_time": key_time, "num_targets": num_targets}
        return attend(q, k, v, offsets, max_len, **times, key_offsets=key_offsets, **others)
    tokens, outputs = [], []
    for members, n in zip(groups, longest, strict=True):
        mine, group = _tokens(offsets, members)
        tokens.append(mine)
        of_keys, key_group = (mine, None) if key_offsets is None else _tokens(key_offsets, members)
        parts = {
            "query_time": None if query_time is None else query_time[mine],
            "key_time": None if key_time is None else key_time[of_keys],
            "num_targets": None if num_targets is None else num_targets[members],
            "key_offsets": key_group,
        }
        if isinstance(attention_scale, torch.Tensor):
            parts["attention_scale"] = attention_scale[mine]
        outputs.append(attend(q[mine], k[of_keys], v[of_keys], group, max(n, 1), **(others | parts)))
    return torch.cat(outputs)[torch.cat(tokens).argsort()]


def _tokens(offsets: torch.Tensor, members: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of some of the sequences, and their offsets there."""
    group = offsets_from_lengths(offsets.diff()[members])
    index, position = sequence_and_position(group, int(group[-1]))
    return offsets[members[index]] + position, group
