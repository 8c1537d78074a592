"""BERT4Rec (arXiv 1904.06690): a bidirectional Transformer. `steps.tasks.masked_items` trains it.

Post-norm blocks with GELU and width 4 d.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from kernels import jagged
from kernels.jagged.naive import sequence_and_position
from steps.data.sequences import Batch
from steps.models.base import Encoder, HeadsConfig, LayerNorm, embedding_lookup


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
        # Padded to a multiple of 8, as FlashAttention needs it; for other widths torch has no fused kernel that takes a
        # mask either, and makes all N x N scores in float32.
        width = x.shape[-1] // self.heads
        qkv = F.pad(self.qkv(x).unflatten(-1, (3, self.heads, width)), (0, -width % 8))
        attention_output = self.attention(qkv, width**-0.5, offsets, max_len, index)[..., :width].flatten(1)
        x = self.attention_norm(x + self.dropout(self.output(attention_output)))
        return self.feed_forward_norm(x + self.dropout(self.outer(F.gelu(self.inner(x)))))

    def attention(
        self, qkv: torch.Tensor, scale: float, offsets: torch.Tensor, max_len: int, index: torch.Tensor
    ) -> torch.Tensor:
        """Queries, keys and values (T, 3, heads, width) to the attention output (T, heads, width)."""
        dropout = self.dropout_prob if self.training else 0.0
        if _flash_fits(qkv, dropout):
            return flash_attention(qkv, scale, dropout, offsets, max_len)
        return padded_attention(qkv, scale, dropout, offsets, max_len, index)


def padded_attention(
    qkv: torch.Tensor, scale: float, dropout: float, offsets: torch.Tensor, max_len: int, index: torch.Tensor
) -> torch.Tensor:
    """Softmax attention within each sequence: the twin of `flash_attention`, for any device and type.

    index: (T,) int64, where each token is in the flattened padded batch.
    """
    padded = jagged.to_padded(qkv.flatten(1), offsets, max_len, index).unflatten(-1, qkv.shape[1:])
    q, k, v = (part.transpose(1, 2) for part in padded.unbind(2))
    token_mask = torch.arange(max_len, device=qkv.device) < offsets.diff()[:, None]  # (S, N)
    attention_output = F.scaled_dot_product_attention(
        q, k, v, attn_mask=token_mask[:, None, None, :], dropout_p=dropout, scale=scale
    )
    return attention_output.transpose(1, 2).flatten(0, 1).index_select(0, index)


def flash_attention(
    qkv: torch.Tensor, scale: float, dropout: float, offsets: torch.Tensor, max_len: int
) -> torch.Tensor:
    """Softmax attention within each sequence, without padding: torch's FlashAttention-2 (arXiv 2307.08691).

    qkv: queries, keys and values (T, 3, heads, width) in half precision on a GPU, width a multiple of 8. offsets:
    (S + 1,) int64 of sequences of at most `max_len` tokens, or none. Returns (T, heads, width). Weights are dropped by
    8 bits of a random number: of dropout 0.2 it keeps 205/256.
    """
    cumulative = offsets.int()
    # Not torch.nn.attention.varlen, which has no dropout.
    attention_output: torch.Tensor = torch.ops.aten._flash_attention_forward(
        *qkv.unbind(1), cumulative, cumulative, max_len, max_len, dropout, False, False, scale=scale
    )[0]
    return attention_output


def _flash_fits(qkv: torch.Tensor, dropout: float) -> bool:
    """Whether torch has FlashAttention for these types, widths and this device."""
    q, k, v = (part.transpose(0, 1)[None] for part in qkv.unbind(1))  # (1, heads, T, width)
    return can_use_flash_attention(SDPAParams(q, k, v, None, dropout, False, False))


class BERT4Rec(Encoder):
    """Position embeddings, which are added to the items', and BERT blocks."""

    def __init__(self, config: HeadsConfig, max_len: int, dropout: float) -> None:
        super().__init__()
        self.position = nn.Embedding(max_len + 1, config.dim)
        self.input_norm = LayerNorm(config.dim)
        self.input_dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(BERTBlock(config.dim, config.heads, dropout) for _ in range(config.blocks))

    def before_compiling(self) -> None:
        _compile_without_attention()

    def forward(self, embeddings: torch.Tensor, batch: Batch) -> torch.Tensor:
        return self.states(embeddings, batch.offsets, batch.max_len)

    def states(self, embeddings: torch.Tensor, offsets: torch.Tensor, max_len: int) -> torch.Tensor:
        """The hidden states (T, d) of jagged sequences (S + 1 offsets) of at most `max_len` tokens."""
        sequence_id, position = sequence_and_position(offsets, len(embeddings))
        index = sequence_id * max_len + position
        x = self.input_dropout(self.input_norm(embeddings + embedding_lookup(self.position, position)))
        with self.autocast(x.device):
            for block in self.blocks:
                x = block(x, offsets, max_len, index)
        return x


@functools.cache
def _compile_without_attention() -> None:
    # torch 2.11 fails at the mask where sizes are dynamic. Not a decorator, since its import takes a second.
    BERTBlock.attention = torch.compiler.disable(BERTBlock.attention)  # type: ignore[method-assign]
