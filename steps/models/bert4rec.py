"""BERT4Rec (arXiv 1904.06690): a bidirectional Transformer. `steps.tasks.masked_items` trains it.

Post-norm blocks with GELU and width 4 d.
"""

import functools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from kernels import jagged
from kernels.jagged.naive import sequence_and_position
from steps.data.sequences import Batch
from steps.models.base import Encoder, HeadsConfig, LayerNorm, embedding_lookup


@dataclass(frozen=True)
class Layout:
    """Where tokens are in their sequences, and which of them are the queries of attention."""

    offsets: torch.Tensor  # (S + 1,) int32, as FlashAttention takes them
    sequence_id: torch.Tensor  # (T,) int64
    position: torch.Tensor  # (T,) int64, in the sequence
    max_len: int  # which no sequence exceeds
    query_offsets: torch.Tensor  # (S + 1,) int32
    wanted: torch.Tensor | None = None  # (M,) int64, the queries, ascending, none twice; None: all tokens

    @classmethod
    def of(cls, offsets: torch.Tensor, total: int, max_len: int) -> "Layout":
        """Of `total` tokens in sequences (S + 1 offsets, int64) of at most `max_len`; all are queries."""
        sequence_id, position = sequence_and_position(offsets, total)
        offsets = offsets.int()
        return cls(offsets, sequence_id, position, max_len, offsets)

    def of_queries(self, wanted: torch.Tensor) -> "Layout":
        """With the tokens `wanted` (M,) alone as queries: int64, ascending, none twice."""
        return replace(self, wanted=wanted, query_offsets=torch.bucketize(self.offsets, wanted, out_int32=True))

    @property
    def whole(self) -> "Layout":
        """With all tokens as queries."""
        return replace(self, wanted=None, query_offsets=self.offsets)


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

    def forward(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Tokens (T, d) to the layout's queries (M, d)."""
        width = x.shape[-1] // self.heads
        weight = _pad_heads(self.qkv.weight.T, width).T.unflatten(0, (3, -1))
        bias = _pad_heads(self.qkv.bias, width).unflatten(0, (3, -1))
        if layout.wanted is None:
            q, k, v = self._project(x, weight, bias)
        else:
            k, v = self._project(x, weight[1:], bias[1:])
            x = x.index_select(0, layout.wanted)
            (q,) = self._project(x, weight[:1], bias[:1])
        attention_output = self.attention(q, k, v, width**-0.5, layout).flatten(1)
        output = F.linear(attention_output, _pad_heads(self.output.weight, width), self.output.bias)
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
        if _flash_fits(q, k, v, dropout):
            return flash_attention(q, k, v, scale, dropout, layout)
        return padded_attention(q, k, v, scale, dropout, layout)


def _pad_heads(parameter: torch.Tensor, width: int) -> torch.Tensor:
    """A parameter (..., n width) with zeros behind every head: (..., n width'), width' the next multiple of 8.

    FlashAttention needs such widths; for others torch has no fused kernel that takes a mask either, and makes all N x N
    scores in float32. To pad queries, keys and values themselves would copy them.
    """
    if width % 8 == 0:
        return parameter
    return F.pad(parameter.unflatten(-1, (-1, width)), (0, -width % 8)).flatten(-2)


def padded_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, dropout: float, layout: Layout
) -> torch.Tensor:
    """Softmax attention within each sequence: the twin of `flash_attention`, for any device and type."""
    offsets, max_len = layout.offsets.long(), layout.max_len
    place = layout.sequence_id * max_len + layout.position
    query_place = place if layout.wanted is None else place.index_select(0, layout.wanted)
    padded = (
        jagged.to_padded(k.flatten(1), offsets, max_len, place),
        jagged.to_padded(v.flatten(1), offsets, max_len, place),
        jagged.naive.to_padded(q.flatten(1), offsets, max_len, query_place),  # each where its token is
    )
    k, v, q = (part.unflatten(-1, k.shape[1:]).transpose(1, 2) for part in padded)  # (S, heads, N, width)
    token_mask = torch.arange(max_len, device=q.device) < offsets.diff()[:, None]  # (S, N)
    attention_output = F.scaled_dot_product_attention(
        q, k, v, attn_mask=token_mask[:, None, None, :], dropout_p=dropout, scale=scale
    )
    return attention_output.transpose(1, 2).flatten(0, 1).index_select(0, query_place)


def flash_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, dropout: float, layout: Layout
) -> torch.Tensor:
    """Softmax attention within each sequence, without padding: torch's FlashAttention-2 (arXiv 2307.08691).

    q: (M, heads, width); k, v: (T, heads, width); in half precision on a GPU, width a multiple of 8. Returns
    (M, heads, width). Weights are dropped by 8 bits of a random number: of dropout 0.2 it keeps 205/256.
    """
    # Not torch.nn.attention.varlen, which has no dropout.
    attention_output: torch.Tensor = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        layout.query_offsets,
        layout.offsets,
        layout.max_len,
        layout.max_len,
        dropout,
        False,
        False,
        scale=scale,
    )[0]
    return attention_output


def _flash_fits(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float) -> bool:
    """Whether torch has FlashAttention for these types, widths and this device."""
    q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))  # (1, heads, T, width)
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


@functools.cache
def _compile_without_attention() -> None:
    # torch 2.11 fails at the mask where sizes are dynamic. Not a decorator, since its import takes a second.
    BERTBlock.attention = torch.compiler.disable(BERTBlock.attention)  # type: ignore[method-assign]
