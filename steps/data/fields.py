"""How many values each field of an interaction has: what embedding tables are made for."""

from dataclasses import dataclass

import torch

from steps.data.sequences import Sequences


@dataclass(frozen=True)
class FieldSizes:
    """users, items: how many there are. user_features, item_features: by name, how many values a feature has."""

    users: int
    items: int
    user_features: dict[str, int]
    item_features: dict[str, int]

    @classmethod
    def of(cls, sequences: Sequences) -> "FieldSizes":
        """The sizes of sequences' fields. Waits for the device."""
        return cls(
            sequences.num_users,
            sequences.num_items,
            {name: _num_values(values) for name, values in sequences.user_features.items()},
            {name: _num_values(values) for name, values in sequences.item_features.items()},
        )


def _num_values(values: torch.Tensor) -> int:
    """Of a category from 1, (rows,), or of several, (rows, K)."""
    return int(values.max()) if values.dim() == 1 else values.shape[1]
