"""Transformer++: the ablation baseline of the HSTU paper, a decoder with RoPE, SwiGLU and RMSNorm (as in LLaMA).

Per block: x = x + attention(RMSNorm(x)); x = x + W_3 (silu(W_1 n) * W_2 n), n = RMSNorm(x). No biases.
Rotary embeddings carry the position: there are no learned position embeddings. No time enters.
"""

import torch
import torch.nn.functional as F
from torch import nn

from steps.data.sequences import Batch
from steps.models.base import Encoder, HeadsConfig

_ROTARY_BASE = 10_000.0
_ALIGNED = 8


class TransformerPPBlock(nn.Module):
    """Causal attention with rotary positions, and a gated feed-forward network of width 8/3 d."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        width = round(8 * dim / 3)
        self.attention_norm = nn.RMSNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)
        self.feed_forward_norm = nn.RMSNorm(dim)
        self.gate = nn.Linear(dim, width, bias=False)
        self.inner = nn.Linear(dim, width, bias=False)
        self.outer = nn.Linear(width, dim, bias=False)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.qkv, self.output, self.gate, self.inner, self.outer):
            nn.init.xavier_normal_(layer.weight)

    def forward(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Tokens (T, d) to tokens (T, d)."""
        x = x + self.dropout(self._attention(self.attention_norm(x), batch))
        return x + self.dropout(self._feed_forward(self.feed_forward_norm(x)))

    def _feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        # Width 8/3 d is rarely a multiple of 8 numbers, which fast products of 16 bits need. Zeros fill it up: they
        # give features of 0, which add nothing and have no gradient.
        extra = -self.gate.out_features % _ALIGNED
        gate, inner = (F.linear(x, F.pad(one.weight, (0, 0, 0, extra))) for one in (self.gate, self.inner))
        return F.linear(F.silu(gate) * inner, F.pad(self.outer.weight, (0, extra)))

    def _attention(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.qkv(x).chunk(3, dim=-1))
        qkv = torch.cat([rotate(q, batch.position), rotate(k, batch.position), v], dim=1)
        padded = batch.to_padded(qkv.flatten(1)).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2)
        q, k, v = padded.chunk(3, dim=1)
        # Padding is behind every token of a sequence, so the causal mask hides it.
        attention_output = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.output(batch.to_jagged(attention_output.transpose(1, 2).flatten(2)))


class TransformerPP(Encoder):
    """Item embeddings x sqrt(d) through Transformer++ blocks and a last RMSNorm."""

    def __init__(self, config: HeadsConfig, max_len: int, dropout: float) -> None:
        super().__init__()
        self.dim = config.dim
        self.input_dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(TransformerPPBlock(self.dim, config.heads, dropout) for _ in range(config.blocks))
        self.norm = nn.RMSNorm(self.dim)

    def forward(self, embeddings: torch.Tensor, batch: Batch) -> torch.Tensor:
        x = self.input_dropout(embeddings * self.dim**0.5)
        with self.autocast(x.device):
            for block in self.blocks:
                x = block(x, batch)
        return self.norm(x)


def rotate(x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (arXiv 2104.09864) of x (T, h, d) at positions (T,).

    Features a and a + d/2 turn together by position x base^(-2a/d). An odd last feature is left as it is.
    Angles are at least float32: bfloat16 cannot tell position 257 from 256.
    """
    half, dtype = x.shape[-1] // 2, torch.promote_types(x.dtype, torch.float32)
    frequency = _ROTARY_BASE ** (-torch.arange(half, device=x.device, dtype=dtype) / half)
    angle = position.to(dtype)[:, None, None] * frequency
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    rotated = [first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()]
    return torch.cat([*rotated, rest], dim=-1).to(x.dtype)
