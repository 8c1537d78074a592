"""BERT4Rec (arXiv 1904.06690): a bidirectional Transformer trained by filling in masked items.

Post-norm blocks with GELU and width 4 d; the output is softmax(E LN(GELU(W h)) + bias) over all items.
Training masks each item of the window with probability `mask_prob`. For one sequence in eleven it masks the last item
alone, since the authors make ten copies of each sequence with random masks and one of this kind. At test the mask
token follows the history.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from kernels import jagged
from kernels.jagged.naive import sequence_and_position
from kernels.layer_norm import layer_norm
from steps.data.sequences import Batch
from steps.models.base import SequenceModel, embedding_lookup

_LAST_ONLY_PROB = 1 / 11


class LayerNorm(nn.LayerNorm):
    """torch's layer norm of tokens (T, d), computed by this project's kernel on a GPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, self.eps, self.weight, self.bias)


class BERTBlock(nn.Module):
    """x = LN(x + attention(x)); x = LN(x + FF(x)): every item sees every other."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout_prob = dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.output = nn.Linear(dim, dim)
        self.attention_norm = LayerNorm(dim)
        self.inner = nn.Linear(dim, 4 * dim)
        self.outer = nn.Linear(4 * dim, dim)
        self.feed_forward_norm = LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, offsets: torch.Tensor, max_len: int, index: torch.Tensor) -> torch.Tensor:
        """Tokens (T, d) to tokens (T, d). index: (T,) int64, where each token is in the flattened padded batch."""
        # Padded to a multiple of 8: for other widths torch has no fused kernel that takes a mask, and makes all N x N
        # scores in float32.
        width = x.shape[-1] // self.heads
        qkv = F.pad(self.qkv(x).unflatten(-1, (3, self.heads, width)), (0, -width % 8))
        attention_output = self.attention(qkv, width**-0.5, offsets, max_len, index)[..., :width].flatten(1)
        x = self.attention_norm(x + self.dropout(self.output(attention_output)))
        return self.feed_forward_norm(x + self.dropout(self.outer(F.gelu(self.inner(x)))))

    def attention(
        self, qkv: torch.Tensor, scale: float, offsets: torch.Tensor, max_len: int, index: torch.Tensor
    ) -> torch.Tensor:
        """Queries, keys and values (T, 3, heads, width) to the attention output (T, heads, width)."""
        padded = jagged.to_padded(qkv.flatten(1), offsets, max_len, index).unflatten(-1, qkv.shape[1:])
        q, k, v = (part.transpose(1, 2) for part in padded.unbind(2))
        token_mask = torch.arange(max_len, device=qkv.device) < offsets.diff()[:, None]  # (S, N)
        attention_output = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=token_mask[:, None, None, :],
            dropout_p=self.dropout_prob if self.training else 0.0,
            scale=scale,
        )
        return attention_output.transpose(1, 2).flatten(0, 1).index_select(0, index)


class Output(nn.Module):
    """softmax(E LN(GELU(W h)) + bias) over all items, of states (M, d)."""

    def __init__(self, dim: int, num_items: int) -> None:
        super().__init__()
        self.transform = nn.Linear(dim, dim)
        self.norm = LayerNorm(dim)
        self.bias = nn.Parameter(torch.zeros(num_items + 1))

    def logits(self, states: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """(M, V + 1), given the item embeddings (V + 1, d), of which row 0 is padding."""
        bias = self.bias.index_fill(0, torch.zeros(1, dtype=torch.int64, device=states.device), -1e9)
        return F.linear(self.norm(F.gelu(self.transform(states))), items, bias)

    def forward(self, states: torch.Tensor, items: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy of the targets (M,) that are not 0."""
        return F.cross_entropy(self.logits(states, items), targets, ignore_index=0)


class BERT4Rec(SequenceModel):
    """Item and position embeddings, BERT blocks, and the output layer tied to the item embeddings."""

    def __init__(self, config: dict[str, Any], training: dict[str, Any], num_items: int) -> None:
        super().__init__(config, training, num_items)
        self.mask_prob: float = config["mask_prob"]
        self.mask = nn.Parameter(torch.empty(self.dim))
        self.position = nn.Embedding(training["max_len"] + 1, self.dim)
        self.input_norm = LayerNorm(self.dim)
        self.input_dropout = nn.Dropout(training["dropout"])
        self.blocks = nn.ModuleList(
            BERTBlock(self.dim, config["heads"], training["dropout"]) for _ in range(config["blocks"])
        )
        self.output = Output(self.dim, num_items)
        for name, parameter in self.named_parameters():
            if name == "mask" or (name.endswith("weight") and parameter.dim() > 1):
                nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @property
    def compiled_modules(self) -> list[nn.Module]:
        return [*self.blocks, self.output]

    def compile_blocks(self) -> None:
        _compile_without_attention()
        super().compile_blocks()

    def states(self, embeddings: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Without any mask."""
        return self._states(embeddings, batch.offsets, batch.max_len)

    def loss(self, batch: Batch) -> torch.Tensor:
        """Full cross-entropy of the masked items, over windows of the history and its next item."""
        item, offsets = append_next_item(batch)
        masked = self._sample_mask(offsets, len(item))
        states = self._encode(item, masked, offsets, batch.max_len + 1)
        if batch.token_mask is None:
            return self.output(states[masked], self.items.weight, item[masked])
        count = masked.cumsum(0)
        number = torch.arange(1, self._max_masked(len(item), len(offsets) - 1) + 1, device=item.device)
        index = torch.searchsorted(count, number).clamp(max=len(item) - 1)  # of the first, second, ... masked item
        targets = item[index] * (number <= count[-1])  # 0 behind the masked ones, and for masked padding
        return self.output(states.index_select(0, index), self.items.weight, targets)

    def score(self, batch: Batch) -> torch.Tensor:
        item, offsets = append_next_item(batch)
        last = offsets[1:] - 1
        masked = torch.zeros_like(item, dtype=torch.bool).index_fill(
            0, last, True
        )  # hides the next item from the model
        return self.output.logits(self._encode(item, masked, offsets, batch.max_len + 1)[last], self.items.weight)

    def _sample_mask(self, offsets: torch.Tensor, total: int) -> torch.Tensor:
        """The mask (T,) bool of items to predict: at least one of every sequence."""
        sequence_id, position = sequence_and_position(offsets, total)
        last = position == (offsets.diff() - 1)[sequence_id]
        last_only = torch.rand(len(offsets) - 1, device=offsets.device) < _LAST_ONLY_PROB
        drawn = (torch.rand(total, device=offsets.device) < self.mask_prob) & ~last_only[sequence_id]
        none_drawn = torch.zeros(len(offsets) - 1, device=offsets.device).index_add_(0, sequence_id, drawn.float()) == 0
        return drawn | (last & none_drawn[sequence_id])

    def _max_masked(self, total: int, num_sequences: int) -> int:
        """An upper bound, known beforehand, of how many of `total` items are masked.

        It is the expectation plus six standard deviations, plus one item per sequence. If it were exceeded, the loss of
        that step would lack a few of its terms.
        """
        expected = total * self.mask_prob
        return min(total, num_sequences + int(expected + 6 * (expected * (1 - self.mask_prob)) ** 0.5) + 1)

    def _encode(self, item: torch.Tensor, masked: torch.Tensor, offsets: torch.Tensor, max_len: int) -> torch.Tensor:
        embeddings = torch.where(masked[:, None], self.mask, embedding_lookup(self.items, item))
        return self._states(embeddings, offsets, max_len)

    def _states(self, embeddings: torch.Tensor, offsets: torch.Tensor, max_len: int) -> torch.Tensor:
        sequence_id, position = sequence_and_position(offsets, len(embeddings))
        x = self.input_dropout(self.input_norm(embeddings + embedding_lookup(self.position, position)))
        with self.autocast():
            for block in self.blocks:
                x = block(x, offsets, max_len, sequence_id * max_len + position)
        return x


@functools.cache
def _compile_without_attention() -> None:
    # torch 2.11 fails at the mask where sizes are dynamic. Not a decorator, since its import takes a second.
    BERTBlock.attention = torch.compiler.disable(BERTBlock.attention)  # type: ignore[method-assign]


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
