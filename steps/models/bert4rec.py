"""BERT4Rec (arXiv 1904.06690): a bidirectional Transformer. `steps.tasks.masked_items` trains it.

Post-norm blocks with GELU and width 4 d.
"""

import torch
import torch.nn.functional as F
from torch import nn

from steps.data.sequences import Batch
from steps.models.attention import ALIGNED, Layout, compile_without, flash_attention, flash_fits, padded_attention
from steps.models.base import Encoder, HeadsConfig, LayerNorm, embedding_lookup


class BERTBlock(nn.Module):
    """x = LN(x + attention(x)); x = LN(x + FF(x)): every item sees every other."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.width = heads, dim // heads
        self.dropout_prob = dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.output = nn.Linear(dim, dim)
        self.attention_norm = LayerNorm(dim)
        self.inner = nn.Linear(dim, 4 * dim)
        self.outer = nn.Linear(4 * dim, dim)
        self.feed_forward_norm = LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Tokens (T, d) to the layout's queries (M, d)."""
        weight = _pad_heads(self.qkv.weight.T, self.width).T.unflatten(0, (3, -1))
        bias = _pad_heads(self.qkv.bias, self.width).unflatten(0, (3, -1))
        if layout.wanted is None:
            q, k, v = self._project(x, weight, bias)
        else:
            k, v = self._project(x, weight[1:], bias[1:])
            x = x.index_select(0, layout.wanted)
            (q,) = self._project(x, weight[:1], bias[:1])
        attention_output = self.attention(q, k, v, self.width**-0.5, layout).flatten(1)
        output = F.linear(attention_output, _pad_heads(self.output.weight, self.width), self.output.bias)
        x = self.attention_norm(x + self.dropout(output))
        return self.feed_forward_norm(x + self.dropout(self.outer(F.gelu(self.inner(x)))))

    def _project(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Tokens (T, d) to n tensors (T, heads, width), by weights (n, heads width, d) and biases (n, heads width)."""
        projected = F.linear(x, weight.flatten(0, 1), bias.flatten())
        return projected.unflatten(-1, (len(weight), self.heads, -1)).unbind(1)

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, layout: Layout
    ) -> torch.Tensor:
        """Queries (M, heads, width), keys and values (T, heads, width) to the attention output (M, heads, width)."""
        dropout = self.dropout_prob if self.training else 0.0
        if flash_fits(q, k, v, dropout):
            return flash_attention(q, k, v, scale, dropout, layout)
        return padded_attention(q, k, v, scale, dropout, layout)


def _pad_heads(parameter: torch.Tensor, width: int) -> torch.Tensor:
    """A parameter (..., n width) with zeros behind every head: (..., n width'), width' the next multiple of 8.

    FlashAttention needs such widths; for others torch has no fused kernel that takes a mask either, and makes all N x N
    scores in float32. To pad queries, keys and values themselves would copy them.
    """
    if width % ALIGNED == 0:
        return parameter
    return F.pad(parameter.unflatten(-1, (-1, width)), (0, -width % ALIGNED)).flatten(-2)


class BERT4Rec(Encoder):
    """Position embeddings, which are added to the items', and BERT blocks."""

    def __init__(self, config: HeadsConfig, max_len: int, dropout: float) -> None:
        super().__init__()
        self.position = nn.Embedding(max_len + 1, config.dim)
        self.input_norm = LayerNorm(config.dim)
        self.input_dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(BERTBlock(config.dim, config.heads, dropout) for _ in range(config.blocks))

    def before_compiling(self) -> None:
        compile_without(BERTBlock, "attention")

    def forward(self, embeddings: torch.Tensor, batch: Batch) -> torch.Tensor:
        return self.states(embeddings, Layout.of(batch.offsets, len(embeddings), batch.max_len))

    def states(self, embeddings: torch.Tensor, layout: Layout) -> torch.Tensor:
        """The hidden states (M, d) of the layout's queries, of the embeddings (T, d) of its tokens.

        The last block alone has no more than keys and values of the other tokens.
        """
        x = self.input_dropout(self.input_norm(embeddings + embedding_lookup(self.position, layout.position)))
        *blocks, last = self.blocks
        with self.autocast(x.device):
            for block in blocks:
                x = block(x, layout.whole)
            states: torch.Tensor = last(x, layout)
        return states
