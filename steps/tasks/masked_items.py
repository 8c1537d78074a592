"""Retrieval learned by filling in masked items, as BERT4Rec is trained (arXiv 1904.06690).

The output is softmax(E LN(GELU(W h)) + bias) over all items. Training masks each item of the window with probability
`mask_prob`. For one sequence in eleven it masks the last item alone, since the authors make ten copies of each sequence
with random masks and one of this kind. At test the mask token follows the history.

The BERT4Rec of arXiv 2309.07602 has neither: without `output_layer` the output is softmax(E h), and without `last_only`
no sequence is masked at its last item alone, but where none is drawn.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from kernels.jagged.naive import sequence_and_position
from kernels.linear_cross_entropy import linear_cross_entropy
from steps.common.config import TrainingConfig
from steps.common.typed import Inside01, read
from steps.data.sequences import Batch
from steps.models.base import LayerNorm, Recommender, embedding_lookup
from steps.models.bert4rec import BERT4Rec
from steps.tasks.base import Task
from steps.tasks.losses import WithLoss, read_cross_entropy

_LAST_ONLY_PROB = 1 / 11


@dataclass(frozen=True)
class _MaskConfig:
    mask_prob: Inside01
    last_only: bool = True  # whether one sequence in eleven has its last item masked alone
    output_layer: bool = True  # whether LN(GELU(W h)) and a bias stand before the softmax


class TiedOutput(nn.Module):
    """softmax(E h) over all items, of states h (M, d)."""

    bias: nn.Parameter | None

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("bias", None)

    def logits(self, states: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """(M, V + 1), given the item embeddings (V + 1, d), of which row 0 is padding."""
        bias = items.new_zeros(len(items)) if self.bias is None else self.bias
        bias = bias.index_fill(0, torch.zeros(1, dtype=torch.int64, device=states.device), -1e9)
        return F.linear(self._transformed(states), items, bias)

    def forward(self, states: torch.Tensor, items: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy of the targets (M,) that are not 0."""
        return linear_cross_entropy(self._transformed(states), items, targets, self.bias)

    def _transformed(self, states: torch.Tensor) -> torch.Tensor:
        return states


class Output(TiedOutput):
    """softmax(E LN(GELU(W h)) + bias) over all items, of states h (M, d)."""

    def __init__(self, dim: int, num_items: int) -> None:
        super().__init__()
        self.transform = nn.Linear(dim, dim)
        self.norm = LayerNorm(dim)
        self.bias = nn.Parameter(torch.zeros(num_items + 1))

    def _transformed(self, states: torch.Tensor) -> torch.Tensor:
        return self.norm(F.gelu(self.transform(states)))


class MaskedItems(Task, Recommender):
    """An encoder that sees both ways, with a mask token and an output layer that is tied to the item embeddings."""

    configs = (*Task.configs, WithLoss, _MaskConfig)
    encoder: BERT4Rec

    def __init__(self, settings: dict[str, Any], training: TrainingConfig, num_items: int) -> None:
        super().__init__(settings, training, num_items)
        read_cross_entropy(settings)
        config = read(_MaskConfig, settings, "model.", others=True)
        self.mask_prob = config.mask_prob
        self.last_only_prob = _LAST_ONLY_PROB if config.last_only else 0.0
        self.mask = nn.Parameter(torch.empty(self.dim))
        self.output = Output(self.dim, num_items) if config.output_layer else TiedOutput()
        for name, parameter in self.named_parameters():
            if name == "mask" or (name.endswith("weight") and parameter.dim() > 1):
                nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @property
    def compiled_modules(self) -> list[nn.Module]:
        return [*super().compiled_modules, self.output]

    def loss(self, batch: Batch) -> torch.Tensor:
        """Full cross-entropy of the masked items, over windows of the history and its next item."""
        item, offsets = append_next_item(batch)
        masked = self._sample_mask(offsets, len(item))
        index, targets = self._masked_items(item, masked, len(offsets) - 1)
        states = self._encode(item, masked, offsets, batch.max_len + 1, index)
        return self.output(states, self.items.weight, targets)

    def score(self, batch: Batch) -> torch.Tensor:
        """The output at a mask behind each window."""
        item, offsets = append_next_item(batch)
        last = offsets[1:] - 1
        none = torch.zeros_like(item, dtype=torch.bool)
        masked = none.index_fill(0, last, True)  # hides the next item from the model
        states = self._encode(item, masked, offsets, batch.max_len + 1, last)
        return self.output.logits(states, self.items.weight)

    def _sample_mask(self, offsets: torch.Tensor, total: int) -> torch.Tensor:
        """The mask (T,) bool of items to predict: at least one of every sequence."""
        sequence_id, position = sequence_and_position(offsets, total)
        last = position == (offsets.diff() - 1)[sequence_id]
        last_only = torch.rand(len(offsets) - 1, device=offsets.device) < self.last_only_prob
        drawn = (torch.rand(total, device=offsets.device) < self.mask_prob) & ~last_only[sequence_id]
        none_drawn = torch.zeros(len(offsets) - 1, device=offsets.device).index_add_(0, sequence_id, drawn.float()) == 0
        return drawn | (last & none_drawn[sequence_id])

    def _masked_items(
        self, item: torch.Tensor, masked: torch.Tensor, num_sequences: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the masked items (T,): where they are, and which items, both (M,) int64; M is known beforehand.

        Items that are not masked, from the first on, make them M. Of these and of padding the target is 0. Every index
        is another one, so that no sequence has more than it has items.
        """
        num_wanted = self._max_masked(len(item), num_sequences)
        count = masked.cumsum(0)
        others = torch.arange(1, len(item) + 1, device=item.device) - count
        wanted = count + torch.minimum(others, (num_wanted - count[-1]).clamp(min=0))
        number = torch.arange(1, num_wanted + 1, device=item.device)
        index = torch.searchsorted(wanted, number)  # of the first, second, ... wanted item
        return index, item[index] * masked[index]

    def _max_masked(self, total: int, num_sequences: int) -> int:
        """An upper bound, known beforehand, of how many of `total` items are masked.

        It is the expectation plus six standard deviations, plus one item per sequence. If it were exceeded, the loss of
        that step would lack a few of its terms.
        """
        expected = total * self.mask_prob
        return min(total, num_sequences + int(expected + 6 * (expected * (1 - self.mask_prob)) ** 0.5) + 1)

    def _encode(
        self,
        item: torch.Tensor,
        masked: torch.Tensor,
        offsets: torch.Tensor,
        max_len: int,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        embeddings = torch.where(masked[:, None], self.mask, embedding_lookup(self.items, item))
        return self.encoder.states(embeddings, offsets, max_len, wanted)


def append_next_item(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The windows, each with the next item appended: items (T + S,), offsets (S + 1,).

    Padding sequences get one more token of padding.
    """
    num_sequences = len(batch.offsets) - 1
    offsets = batch.offsets + torch.arange(num_sequences + 1, device=batch.offsets.device)
    item = batch.item.new_zeros(len(batch.item) + num_sequences)
    item[offsets[batch.sequence_id] + batch.position] = batch.item
    item[offsets[1 : len(batch.user) + 1] - 1] = batch.next_item[batch.last]
    return item, offsets
