"""What a ranker reads of an interaction, and the interface of all rankers."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from steps.common.config import TrainingConfig
from steps.data.sequences import Batch
from steps.models.base import Encoder


@dataclass(frozen=True)
class RankerShape:
    """num_fields F, of width dim d; num_dense C; num_logits L; max_len: the longest window."""

    num_fields: int
    dim: int
    num_dense: int
    num_logits: int
    max_len: int


@dataclass(frozen=True)
class Inputs:
    """What is known of each token's next interaction, without how it was rated.

    fields: (T, F, d), embeddings of the user, the item, the user's features, and the item's. dense: (T, C), numbers of
    mean 0 and variance 1 on what is trained on.

    For rankers that read it, first_order: (T, L), the sum of the fields' own weights. For those that read the history,
    item: (T, d), the next item with its features; and history: (T, d), the same of what each token itself was, with its
    rating, which has happened before the next interaction.
    """

    fields: torch.Tensor
    dense: torch.Tensor
    first_order: Any = None
    item: Any = None
    history: Any = None

    @property
    def flat(self) -> torch.Tensor:
        """All fields and numbers side by side: (T, F d + C)."""
        return torch.cat([self.fields.flatten(1), self.dense], dim=1)


class Ranker(Encoder):
    """Says of each token how likely its next interaction reaches each level, from features and the history before."""

    supports_low_precision = False
    reads_history: ClassVar[bool] = False
    reads_first_order: ClassVar[bool] = False
    weighs_fields: ClassVar[bool] = False  # fields are weights themselves, one for each logit

    def __init__(self, config: Any, shape: RankerShape, training: TrainingConfig) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, inputs: Inputs, batch: Batch) -> torch.Tensor:  # type: ignore[override]  # more than embeddings
        """Logits (T, L)."""

    @property
    def compiled_modules(self) -> list[nn.Module]:
        return []
