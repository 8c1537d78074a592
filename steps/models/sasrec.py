"""SASRec (arXiv 1808.09781), as the HSTU paper's public experiments run it.

Per block: q = LN(x); x = LN(q + attention(q, x, x)); x = x + FF(x), where FF is two linear maps with a
ReLU between. LayerNorm has no affine terms; keys and values are not normalised. No time enters.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from kernels.layer_norm import layer_norm
from steps.common.typed import Whole
from steps.data.sequences import Batch
from steps.models.base import HeadsConfig, PositionalEncoder, causal_attention

_LAYER_NORM_EPS = 1e-8


@dataclass(frozen=True)
class SASRecConfig(HeadsConfig):
    """The sizes of the encoder. output_slots: positions beyond max_len."""

    output_slots: Whole


class SASRecBlock(nn.Module):
    """Causal softmax attention and a position-wise feed-forward network."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)
        self.inner = nn.Linear(dim, dim)
        self.outer = nn.Linear(dim, dim)
        self.attention_dropout = dropout
        self.dropout = nn.Dropout(dropout)
        for layer in (self.query, self.key, self.value):
            # The authors' is one (3 d, d) matrix, whose Xavier std is sqrt(2 / (d + 3 d)).
            nn.init.xavier_normal_(layer.weight, gain=0.5**0.5)
            nn.init.zeros_(layer.bias)
        for layer in (self.output, self.inner, self.outer):
            nn.init.xavier_normal_(layer.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Tokens (T, d) to tokens (T, d)."""
        normed = layer_norm(x, _LAYER_NORM_EPS)
        x = layer_norm(normed + self._attention(normed, x, batch), _LAYER_NORM_EPS)
        return x + self.dropout(self.outer(self.dropout(F.relu(self.inner(x)))))

    def _attention(self, normed: torch.Tensor, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        qkv = torch.cat([self.query(normed), self.key(x), self.value(x)], dim=-1)
        dropout = self.attention_dropout if self.training else 0.0
        return self.output(causal_attention(qkv, self.heads, dropout, batch))


class SASRec(PositionalEncoder):
    """Item and position embeddings through SASRec blocks."""

    def __init__(self, config: SASRecConfig, max_len: int, dropout: float) -> None:
        super().__init__(config.dim, max_len, config.output_slots, dropout)
        std = self.dim**-0.5
        nn.init.trunc_normal_(self.position.weight, std=std, a=-2 * std, b=2 * std)
        self.blocks = nn.ModuleList(SASRecBlock(self.dim, config.heads, dropout) for _ in range(config.blocks))

    def forward(self, embeddings: torch.Tensor, batch: Batch) -> torch.Tensor:
        x = self.embed(embeddings, batch.position)
        with self.autocast(x.device):
            for block in self.blocks:
                x = block(x, batch)
        return x
