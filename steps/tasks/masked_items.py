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

from kernels.linear_cross_entropy import linear_cross_entropy
from steps.common.config import TrainingConfig
from steps.common.typed import Inside01, read
from steps.data.sequences import Batch
from steps.models.attention import Layout
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


class Masking(nn.Module):
    """Chooses the items to mask. It has no weights: as a module it is compiled, being many small operations."""

    def __init__(self, mask_prob: float, last_only_prob: float) -> None:
        super().__init__()
        self.mask_prob, self.last_only_prob = mask_prob, last_only_prob

    def forward(
        self, batch: Batch, draws: tuple[torch.Tensor, torch.Tensor], num_wanted: int
    ) -> tuple[torch.Tensor, torch.Tensor, Layout, torch.Tensor]:
        """The windows with their next items (T,), of which some are masked (T,) bool, and the targets (M,).

        The layout's queries, `num_wanted` M, are where the targets are. draws: uniform from 0 to 1, of every sequence
        and of every item.
        """
        item, last, layout = append_next_item(batch)
        masked = self.sample(last, layout, *draws)
        wanted = masked_places(masked, num_wanted)
        return item, masked, layout.of_queries(wanted), item[wanted] * masked[wanted]

    def sample(
        self, last: torch.Tensor, layout: Layout, of_sequence: torch.Tensor, of_item: torch.Tensor
    ) -> torch.Tensor:
        """The mask (T,) bool of items to predict: at least one of every sequence, by its draw (S,) and its items' (T,).

        last: (T,) bool, the last item of every sequence.
        """
        sequence_id = layout.sequence_id
        drawn = (of_item < self.mask_prob) & (of_sequence >= self.last_only_prob)[sequence_id]
        count = F.pad(drawn.cumsum(0), (1, 0))
        none_drawn = count[layout.offsets].diff() == 0
        return drawn | (last & none_drawn[sequence_id])

    def max_masked(self, total: int, num_sequences: int) -> int:
        """An upper bound, known beforehand, of how many of `total` items are masked.

        It is the expectation plus six standard deviations, plus one item per sequence. If it were exceeded, the loss of
        that step would lack a few of its terms.
        """
        expected = total * self.mask_prob
        return min(total, num_sequences + int(expected + 6 * (expected * (1 - self.mask_prob)) ** 0.5) + 1)


class MaskedItems(Task, Recommender):
    """An encoder that sees both ways, with a mask token and an output layer that is tied to the item embeddings."""

    configs = (*Task.configs, WithLoss, _MaskConfig)
    encoder: BERT4Rec

    def __init__(self, settings: dict[str, Any], training: TrainingConfig, num_items: int) -> None:
        super().__init__(settings, training, num_items)
        read_cross_entropy(settings)
        config = read(_MaskConfig, settings, "model.", others=True)
        self.masking = Masking(config.mask_prob, _LAST_ONLY_PROB if config.last_only else 0.0)
        self.mask = nn.Parameter(torch.empty(self.dim))
        self.output = Output(self.dim, num_items) if config.output_layer else TiedOutput()
        for name, parameter in self.named_parameters():
            if name == "mask" or (name.endswith("weight") and parameter.dim() > 1):
                nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @property
    def compiled_modules(self) -> list[nn.Module]:
        return [*super().compiled_modules, self.masking, self.output]

    def loss(self, batch: Batch) -> torch.Tensor:
        """Full cross-entropy of the masked items, over windows of the history and its next item."""
        num_sequences, device = len(batch.offsets) - 1, batch.offsets.device
        total = len(batch.item) + num_sequences
        draws = torch.rand(num_sequences, device=device), torch.rand(total, device=device)
        num_wanted = self.masking.max_masked(total, num_sequences)
        item, masked, layout, targets = self.masking(batch, draws, num_wanted)
        return self.output(self._encode(item, masked, layout), self.items.weight, targets)

    def score(self, batch: Batch) -> torch.Tensor:
        """The output at a mask behind each window."""
        item, last, layout = append_next_item(batch)
        layout = layout.of_queries(layout.offsets[1:].long() - 1)
        states = self._encode(item, last, layout)  # the next item is hidden from the model
        return self.output.logits(states, self.items.weight)

    def _encode(self, item: torch.Tensor, masked: torch.Tensor, layout: Layout) -> torch.Tensor:
        embeddings = torch.where(masked[:, None], self.mask, embedding_lookup(self.items, item))
        return self.encoder.states(embeddings, layout)


def append_next_item(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, Layout]:
    """The windows, each with the next item appended: items (T + S,), which of them are appended (T + S,) bool, and
    their layout.

    Padding sequences get one more token of padding.
    """
    num_sequences, device = len(batch.offsets) - 1, batch.offsets.device
    total = len(batch.item) + num_sequences
    offsets = batch.offsets + torch.arange(num_sequences + 1, device=device)
    layout = Layout.of(offsets, total, batch.max_len + 1)
    last = layout.position == batch.offsets.diff()[layout.sequence_id]
    token = torch.arange(total, device=device) - layout.sequence_id - last.long()  # the last one before a next item
    next_item = batch.next_item[token] * (layout.sequence_id < len(batch.user))
    return torch.where(last, next_item, batch.item[token]), last, layout


def masked_places(masked: torch.Tensor, number: int) -> torch.Tensor:
    """Where the masked items (T,) are: (number,) int64, ascending, none twice.

    If they are fewer, then items that are not masked, from the first on, are among them.
    """
    count = masked.cumsum(0)
    others = torch.arange(1, len(masked) + 1, device=masked.device) - count
    wanted = count + torch.minimum(others, (number - count[-1]).clamp(min=0))
    return torch.bucketize(torch.arange(1, number + 1, device=masked.device), wanted)  # the first, second, ...
