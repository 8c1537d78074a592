"""SASRec (arXiv 1808.09781), as the HSTU paper's public experiments run it.

Per block: q = LN(x); x = LN(q + attention(q, x, x)); x = x + FF(x), where FF is two linear maps with a
ReLU between. LayerNorm has no affine terms; keys and values are not normalised. No time enters. With `learned_norms` it
has them, and one stands behind the last block, as in the code of arXiv 2309.07602, whose initial weights it then has.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from steps.common.typed import Whole
from steps.data.sequences import Batch
from steps.models.attention import CausalAttention, Layout, compile_without
from steps.models.base import HeadsConfig, LayerNorm, PositionalEncoder

_LAYER_NORM_EPS = 1e-8
_LEARNED_STD = 0.02  # of initial weights where norms are learned


@dataclass(frozen=True)
class SASRecConfig(HeadsConfig):
    """The sizes of the encoder. output_slots: positions beyond max_len. learned_norms: whether layer norms have affine
    terms, and one stands behind the last block."""

    output_slots: Whole
    learned_norms: bool = False


class SASRecBlock(nn.Module):
    """Causal softmax attention and a position-wise feed-forward network."""

    def __init__(self, dim: int, heads: int, dropout: float, learned_norms: bool) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = LayerNorm(dim, _LAYER_NORM_EPS, elementwise_affine=learned_norms)
        self.feed_forward_norm = LayerNorm(dim, _LAYER_NORM_EPS, elementwise_affine=learned_norms)
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)
        self.inner = nn.Linear(dim, dim)
        self.outer = nn.Linear(dim, dim)
        self.attention = CausalAttention(dropout)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.query, self.key, self.value):
            # The authors' is one (3 d, d) matrix, whose Xavier std is sqrt(2 / (d + 3 d)).
            nn.init.xavier_normal_(layer.weight, gain=0.5**0.5)
            nn.init.zeros_(layer.bias)
        for layer in (self.output, self.inner, self.outer):
            nn.init.xavier_normal_(layer.weight)
        nn.init.zeros_(self.output.bias)
        for layer in (self.output, self.inner, self.outer) if learned_norms else ():
            nn.init.normal_(layer.weight, std=_LEARNED_STD)
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Tokens (T, d) to tokens (T, d)."""
        normed = self.attention_norm(x)
        projected = (self.query(normed), self.key(x), self.value(x))
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in projected)
        attention_output = self.attention(q, k, v, layout)
        x = self.feed_forward_norm(normed + self.output(attention_output))
        return x + self.dropout(self.outer(self.dropout(F.relu(self.inner(x)))))


class SASRec(PositionalEncoder):
    """Item and position embeddings through SASRec blocks."""

    def __init__(self, config: SASRecConfig, max_len: int, dropout: float) -> None:
        super().__init__(config.dim, max_len, config.output_slots, dropout)
        std = self.dim**-0.5
        if config.learned_norms:
            nn.init.normal_(self.position.weight, std=_LEARNED_STD)
        else:
            nn.init.trunc_normal_(self.position.weight, std=std, a=-2 * std, b=2 * std)
        self.blocks = nn.ModuleList(
            SASRecBlock(self.dim, config.heads, dropout, config.learned_norms) for _ in range(config.blocks)
        )
        self.last_norm = LayerNorm(self.dim, _LAYER_NORM_EPS) if config.learned_norms else nn.Identity()

    def before_compiling(self) -> None:
        compile_without(CausalAttention, "forward")

    def forward(self, embeddings: torch.Tensor, batch: Batch) -> torch.Tensor:
        x, layout = self.embed(embeddings, batch.position), Layout.of_batch(batch)
        with self.autocast(x.device):
            for block in self.blocks:
                x = block(x, layout)
        states: torch.Tensor = self.last_norm(x)
        return states
