"""GRU4Rec's encoder (arXiv 1511.06939): one GRU layer.

`steps.tasks.sessions` trains GRU4Rec, as its author does. GRU is the same layer as arXiv 2309.07602 has it, for losses
of every token's next item.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from steps.common.typed import Count
from steps.data.sequences import Batch
from steps.models.base import Encoder


@dataclass(frozen=True)
class GRU4RecConfig:
    """The size of the encoder."""

    dim: Count


class GRU(Encoder):
    """One GRU layer over item embeddings, with torch's initial weights."""

    supports_low_precision = False  # its authors train it in float32, and GRU4Rec's steps are too small to gain

    def __init__(self, config: GRU4RecConfig, max_len: int, dropout: float) -> None:
        del max_len, dropout  # it has no positions, and torch drops out between layers alone
        super().__init__()
        self.gru = nn.GRU(config.dim, config.dim, batch_first=True)

    @property
    def compiled_modules(self) -> list[nn.Module]:
        """None: the recurrence is one kernel of cuDNN, and torch.compile takes an event of GRU4Rec as a whole."""
        return []

    def forward(self, embeddings: torch.Tensor, batch: Batch) -> torch.Tensor:
        states, _ = self.gru(batch.to_padded(embeddings))
        return batch.to_jagged(states)


class GRU4Rec(GRU):
    """The same with its author's initial weights, and with dropout of the states, which `Sessions` applies."""

    def __init__(self, config: GRU4RecConfig, max_len: int, dropout: float) -> None:
        super().__init__(config, max_len, dropout)
        self.hidden_dropout = nn.Dropout(dropout)
        bound = (6 / (2 * config.dim)) ** 0.5  # Glorot, per gate
        for name, parameter in self.gru.named_parameters():
            if name.startswith("weight"):
                nn.init.uniform_(parameter, -bound, bound)
            else:
                nn.init.zeros_(parameter)

    @property
    def weights(self) -> list[torch.Tensor]:
        """The weights of `gru_cell`."""
        return list(self.gru.all_weights[0])


def gru_cell(
    x: torch.Tensor,
    state: torch.Tensor,
    weight_x: torch.Tensor,
    weight_state: torch.Tensor,
    bias_x: torch.Tensor,
    bias_state: torch.Tensor,
) -> torch.Tensor:
    """torch.gru_cell on (lanes, d), in operations that torch.compile can fuse."""
    reset_x, update_x, new_x = F.linear(x, weight_x, bias_x).chunk(3, dim=1)
    reset_state, update_state, new_state = F.linear(state, weight_state, bias_state).chunk(3, dim=1)
    update = torch.sigmoid(update_x + update_state)
    new = torch.tanh(new_x + torch.sigmoid(reset_x + reset_state) * new_state)
    return (1 - update) * new + update * state
