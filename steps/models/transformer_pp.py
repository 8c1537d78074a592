"""Transformer++: the ablation baseline of the HSTU paper, a decoder with RoPE, SwiGLU and RMSNorm (as in LLaMA).

Per block: x = x + attention(RMSNorm(x)); x = x + W_3 (silu(W_1 n) * W_2 n), n = RMSNorm(x). No biases.
Rotary embeddings carry the position: there are no learned position embeddings. No time enters.
"""

import torch
import torch.nn.functional as F
from torch import nn

from steps.data.sequences import Batch
from steps.models.attention import CausalAttention, Layout, compile_without
from steps.models.base import Encoder, HeadsConfig

_ROTARY_BASE = 10_000.0
_ALIGNED = 8


class TransformerPPBlock(nn.Module):
    """Causal attention with rotary positions, and a gated feed-forward network of width 8/3 d."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.attention = heads, CausalAttention(0.0)
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

    def forward(self, x: torch.Tensor, layout: Layout, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Tokens (T, d) to tokens (T, d). angles: the `cos_and_sin` of their positions."""
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k = rotate(qkv[:, :2], *angles).unbind(1)
        x = x + self.dropout(self.output(self.attention(q, k, qkv[:, 2], layout)))
        return x + self.dropout(self._feed_forward(self.feed_forward_norm(x)))

    def _feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        # Width 8/3 d is rarely a multiple of 8 numbers, which fast products of 16 bits need. Zeros fill it up: they
        # give features of 0, which add nothing and have no gradient.
        extra = -self.gate.out_features % _ALIGNED
        gate, inner = (F.linear(x, F.pad(one.weight, (0, 0, 0, extra))) for one in (self.gate, self.inner))
        return F.linear(F.silu(gate) * inner, F.pad(self.outer.weight, (0, extra)))


class TransformerPP(Encoder):
    """Item embeddings x sqrt(d) through Transformer++ blocks and a last RMSNorm."""

    def __init__(self, config: HeadsConfig, max_len: int, dropout: float) -> None:
        super().__init__()
        self.dim, self.width = config.dim, config.dim // config.heads
        self.input_dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(TransformerPPBlock(self.dim, config.heads, dropout) for _ in range(config.blocks))
        self.norm = nn.RMSNorm(self.dim)

    def before_compiling(self) -> None:
        compile_without(CausalAttention, "forward")

    def forward(self, embeddings: torch.Tensor, batch: Batch) -> torch.Tensor:
        x, layout = self.input_dropout(embeddings * self.dim**0.5), Layout.of_batch(batch)
        angles = cos_and_sin(batch.position, self.width, torch.promote_types(x.dtype, torch.float32))
        with self.autocast(x.device):
            for block in self.blocks:
                x = block(x, layout, angles)
        return self.norm(x)


def cos_and_sin(position: torch.Tensor, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (T, width // 2) of the angles by which pair a of a head's features turns at positions (T,).

    The angle is position x base^(-2a/width) (arXiv 2104.09864). dtype: at least float32, as bfloat16 cannot tell
    position 257 from 256.
    """
    half = width // 2
    frequency = _ROTARY_BASE ** (-torch.arange(half, device=position.device, dtype=dtype) / half)
    angle = position.to(dtype)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (arXiv 2104.09864) of x (T, n, h, d) by cosines and sines (T, d // 2) of its tokens' angles.

    Features a and a + d // 2 turn together. An odd last feature is left as it is.
    """
    half = x.shape[-1] // 2
    cos, sin = cos[:, None, None], sin[:, None, None]
    first, second, rest = x.tensor_split([half, 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos, rest], dim=-1).to(x.dtype)
