"""LiGR (arXiv 2502.03417), the layers of eSASRec (arXiv 2508.06450): SASRec's two parts, each behind a gate.

Per block: x = x + sigmoid(W_1 x) * attention(LN(x)); x = x + sigmoid(W_2 x) * FF(LN(x)), where FF is SwiGLU:
W_o (silu(W_g n) * W_i n), without biases. No time enters.

Layers, dropout and initial weights are those of eSASRec's public code; the paper names its parts alone. There positions
count from the window's end, and item embeddings are not scaled; here positions and scale are as in the other rows.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from steps.common.typed import Count, Whole
from steps.data.sequences import Batch
from steps.models.attention import CausalAttention, Layout, compile_without
from steps.models.base import HeadsConfig, LayerNorm, PositionalEncoder


@dataclass(frozen=True)
class LiGRConfig(HeadsConfig):
    """The sizes of the encoder. output_slots: positions beyond max_len. ff_multiplier: the width of FF, in dims."""

    output_slots: Whole
    ff_multiplier: Count


class LiGRBlock(nn.Module):
    """Causal softmax attention and a SwiGLU feed-forward network, each multiplied by a gate of its input."""

    def __init__(self, config: LiGRConfig, dropout: float) -> None:
        super().__init__()
        dim, width = config.dim, config.ff_multiplier * config.dim
        self.heads = config.heads
        self.attention_norm = LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.output = nn.Linear(dim, dim)
        self.attention_gate = nn.Linear(dim, dim)
        self.feed_forward_norm = LayerNorm(dim)
        self.gate = nn.Linear(dim, width, bias=False)
        self.inner = nn.Linear(dim, width, bias=False)
        self.outer = nn.Linear(width, dim, bias=False)
        self.feed_forward_gate = nn.Linear(dim, dim)
        self.attention = CausalAttention(dropout)
        self.dropout = nn.Dropout(dropout)
        for layer in self.children():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.output.bias)

    def forward(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Tokens (T, d) to tokens (T, d)."""
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).unbind(1)
        attention_output = self.dropout(self.output(self.attention(q, k, v, layout)))
        x = x + torch.sigmoid(self.attention_gate(x)) * attention_output
        normed = self.feed_forward_norm(x)
        hidden = self.dropout(F.silu(self.gate(normed)) * self.inner(normed))
        return x + torch.sigmoid(self.feed_forward_gate(x)) * self.dropout(self.outer(hidden))


class LiGR(PositionalEncoder):
    """Item and position embeddings through LiGR blocks."""

    def __init__(self, config: LiGRConfig, max_len: int, dropout: float) -> None:
        super().__init__(config.dim, max_len, config.output_slots, dropout)
        nn.init.xavier_normal_(self.position.weight)
        self.blocks = nn.ModuleList(LiGRBlock(config, dropout) for _ in range(config.blocks))

    def before_compiling(self) -> None:
        compile_without(CausalAttention, "forward")

    def forward(self, embeddings: torch.Tensor, batch: Batch) -> torch.Tensor:
        x, layout = self.embed(embeddings, batch.position), Layout.of_batch(batch)
        with self.autocast(x.device):
            for block in self.blocks:
                x = block(x, layout)
        return x
