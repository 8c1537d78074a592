"""BERT4Rec (arXiv 1904.06690): a bidirectional Transformer trained by filling in masked items.

Post-norm blocks with GELU and width 4 d; the output is softmax(E LN(GELU(W h)) + bias) over all items.
Training masks each item of the window with probability `mask_share`, or, for one sequence in eleven (the
authors make ten random copies and one of this kind), the last item alone. At test the mask token stands
behind the history.
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
from steps.models.base import SequenceModel, look_up

_SHARE_LAST_ONLY = 1 / 11


class LayerNorm(nn.LayerNorm):
    """torch's, of tokens (T, d), by this project's kernel where there is a GPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, self.eps, self.weight, self.bias)


class BERTBlock(nn.Module):
    """x = LN(x + attention(x)); x = LN(x + FF(x)): every item sees every other."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout_share = dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.output = nn.Linear(dim, dim)
        self.attention_norm = LayerNorm(dim)
        self.inner = nn.Linear(dim, 4 * dim)
        self.outer = nn.Linear(4 * dim, dim)
        self.feed_forward_norm = LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, offsets: torch.Tensor, max_len: int, index: torch.Tensor) -> torch.Tensor:
        """Tokens (T, d), with their places (T,) in a padded batch laid out row by row, to tokens (T, d)."""
        # Of other widths torch makes all N x N scores where there is a mask, in float32: no fused kernel takes them.
        width = x.shape[-1] // self.heads
        qkv = F.pad(self.qkv(x).unflatten(-1, (3, self.heads, width)), (0, -width % 8))
        attended = self.attend(qkv, width**-0.5, offsets, max_len, index)[..., :width].flatten(1)
        x = self.attention_norm(x + self.dropout(self.output(attended)))
        return self.feed_forward_norm(x + self.dropout(self.outer(F.gelu(self.inner(x)))))

    def attend(
        self, qkv: torch.Tensor, scale: float, offsets: torch.Tensor, max_len: int, index: torch.Tensor
    ) -> torch.Tensor:
        """Queries, keys and values (T, 3, heads, width) to what each token attends to (T, heads, width)."""
        padded = jagged.to_padded(qkv.flatten(1), offsets, max_len, index).unflatten(-1, qkv.shape[1:])
        q, k, v = (part.transpose(1, 2) for part in padded.unbind(2))
        real = torch.arange(max_len, device=qkv.device) < offsets.diff()[:, None]  # (B, N)
        attended = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=real[:, None, None, :],
            dropout_p=self.dropout_share if self.training else 0.0,
            scale=scale,
        )
        return attended.transpose(1, 2).flatten(0, 1).index_select(0, index)


class Output(nn.Module):
    """softmax(E LN(GELU(W h)) + bias) over all items, of states (R, d)."""

    def __init__(self, dim: int, num_items: int) -> None:
        super().__init__()
        self.transform = nn.Linear(dim, dim)
        self.norm = LayerNorm(dim)
        self.bias = nn.Parameter(torch.zeros(num_items + 1))

    def logits(self, states: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """(R, V + 1), given the item vectors (V + 1, d), of which row 0 is padding."""
        bias = self.bias.index_fill(0, torch.zeros(1, dtype=torch.int64, device=states.device), -1e9)
        return F.linear(self.norm(F.gelu(self.transform(states))), items, bias)

    def forward(self, states: torch.Tensor, items: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy of the targets (R,) that are not 0."""
        return F.cross_entropy(self.logits(states, items), targets, ignore_index=0)


class BERT4Rec(SequenceModel):
    """Item and position vectors, BERT blocks, and the output layer tied to the item vectors."""

    def __init__(self, config: dict[str, Any], training: dict[str, Any], num_items: int) -> None:
        super().__init__(config, training, num_items)
        self.mask_share: float = config["mask_share"]
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
    def fusible(self) -> list[nn.Module]:
        return [*self.blocks, self.output]

    def compile_blocks(self) -> None:
        _compile_without_attention()
        super().compile_blocks()

    def states(self, vectors: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Nothing masked."""
        return self._states(vectors, batch.offsets, batch.max_len)

    def loss(self, batch: Batch) -> torch.Tensor:
        """Full cross-entropy of the masked items, over windows of the history and its next item."""
        item, offsets = with_next(batch)
        masked = self._choose(offsets, len(item))
        states = self._encode(item, masked, offsets, batch.max_len + 1)
        if batch.real is None:
            return self.output(states[masked], self.items.weight, item[masked])
        count = masked.cumsum(0)
        wanted = torch.arange(1, self._most_masked(len(item), len(offsets) - 1) + 1, device=item.device)
        places = torch.searchsorted(count, wanted).clamp(max=len(item) - 1)  # of the first, second, ... masked item
        targets = item[places] * (wanted <= count[-1])  # 0 behind the masked ones, and for masked padding
        return self.output(states.index_select(0, places), self.items.weight, targets)

    def score(self, batch: Batch) -> torch.Tensor:
        item, offsets = with_next(batch)
        last = offsets[1:] - 1
        masked = torch.zeros_like(item, dtype=torch.bool).index_fill(0, last, True)  # the next item itself is hidden
        return self.output.logits(self._encode(item, masked, offsets, batch.max_len + 1)[last], self.items.weight)

    def _choose(self, offsets: torch.Tensor, total: int) -> torch.Tensor:
        """Which items (T,) to mask: at least one of every sequence."""
        row, place = sequence_and_position(offsets, total)
        last = place == (offsets.diff() - 1)[row]
        last_only = torch.rand(len(offsets) - 1, device=offsets.device) < _SHARE_LAST_ONLY
        drawn = (torch.rand(total, device=offsets.device) < self.mask_share) & ~last_only[row]
        none_drawn = torch.zeros(len(offsets) - 1, device=offsets.device).index_add_(0, row, drawn.float()) == 0
        return drawn | (last & none_drawn[row])

    def _most_masked(self, total: int, rows: int) -> int:
        """A bound, known beforehand, of how many of `total` items in so many rows are masked: six deviations over.

        If it were passed, one step's loss would miss a few of its terms.
        """
        drawn = total * self.mask_share
        return min(total, rows + int(drawn + 6 * (drawn * (1 - self.mask_share)) ** 0.5) + 1)

    def _encode(self, item: torch.Tensor, masked: torch.Tensor, offsets: torch.Tensor, max_len: int) -> torch.Tensor:
        return self._states(torch.where(masked[:, None], self.mask, look_up(self.items, item)), offsets, max_len)

    def _states(self, vectors: torch.Tensor, offsets: torch.Tensor, max_len: int) -> torch.Tensor:
        row, place = sequence_and_position(offsets, len(vectors))
        x = self.input_dropout(self.input_norm(vectors + look_up(self.position, place)))
        with self.low_precision():
            for block in self.blocks:
                x = block(x, offsets, max_len, row * max_len + place)
        return x


@functools.cache
def _compile_without_attention() -> None:
    # torch 2.11 fails at the mask where sizes are dynamic. Not a decorator, since its import takes a second.
    BERTBlock.attend = torch.compiler.disable(BERTBlock.attend)  # type: ignore[method-assign]


def with_next(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The windows with the item each predicts behind its last token: values (T + R,), offsets (R + 1,).

    Rows of padding get one more token of padding.
    """
    rows = len(batch.offsets) - 1
    offsets = batch.offsets + torch.arange(rows + 1, device=batch.offsets.device)
    item = batch.item.new_zeros(len(batch.item) + rows)
    item[offsets[batch.row] + batch.place] = batch.item
    item[offsets[1 : len(batch.user) + 1] - 1] = batch.next_item[batch.last]
    return item, offsets
