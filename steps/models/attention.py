"""Softmax attention within sequences: on jagged rows where torch has a kernel, else on padded ones."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from kernels import jagged
from kernels.jagged.naive import sequence_and_position
from steps.data.sequences import Batch

ALIGNED = 8  # FlashAttention's heads are a multiple of it wide


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

    @classmethod
    def of_batch(cls, batch: Batch) -> "Layout":
        """Of a batch's tokens, all of which are queries."""
        offsets = batch.offsets.int()
        return cls(offsets, batch.sequence_id, batch.position, batch.max_len, offsets)

    def of_queries(self, wanted: torch.Tensor) -> "Layout":
        """With the tokens `wanted` (M,) alone as queries: int64, ascending, none twice."""
        return replace(self, wanted=wanted, query_offsets=torch.bucketize(self.offsets, wanted, out_int32=True))

    @property
    def whole(self) -> "Layout":
        """With all tokens as queries."""
        return replace(self, wanted=None, query_offsets=self.offsets)


class CausalAttention(nn.Module):
    """Softmax attention of tokens to those before them and themselves. dropout: of attention weights."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Queries, keys and values (T, heads, width) of all tokens to the attention output (T, heads width).

        They may be parts of one tensor: they are not copied where FlashAttention fits and the width is a multiple of 8.
        """
        dropout, width = self.dropout if self.training else 0.0, q.shape[-1]
        if not flash_fits(q, k, v, dropout):
            return padded_attention(q, k, v, None, dropout, layout, is_causal=True).flatten(1)
        if width % ALIGNED:  # zeros change no score, and give features of 0
            q, k, v = (F.pad(part, (0, -width % ALIGNED)) for part in (q, k, v))
        output = flash_attention(q, k, v, width**-0.5, dropout, layout, is_causal=True)
        return output[..., :width].flatten(1)


def padded_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None,
    dropout: float,
    layout: Layout,
    is_causal: bool = False,
) -> torch.Tensor:
    """Softmax attention within each sequence: the twin of `flash_attention`, for any device and type.

    q: (M, heads, width) of the layout's queries; k, v: (T, heads, width) of all tokens. scale: None is 1 / sqrt(width).
    dropout: of attention weights. is_causal: all tokens must be queries. Returns (M, heads, width).
    """
    offsets, max_len = layout.offsets.long(), layout.max_len
    place = layout.sequence_id * max_len + layout.position
    query_place = place if layout.wanted is None else place.index_select(0, layout.wanted)
    padded = (
        jagged.to_padded(k.flatten(1), offsets, max_len, place),
        jagged.to_padded(v.flatten(1), offsets, max_len, place),
        jagged.naive.to_padded(q.flatten(1), offsets, max_len, query_place),  # each where its token is
    )
    k, v, q = (part.unflatten(-1, k.shape[1:]).transpose(1, 2) for part in padded)  # (S, heads, N, width)
    mask = None  # padding is behind every token of a sequence, so that a causal mask hides it
    if not is_causal:
        mask = (torch.arange(max_len, device=q.device) < offsets.diff()[:, None])[:, None, None, :]
    attention_output = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, scale=scale
    )
    return attention_output.transpose(1, 2).flatten(0, 1).index_select(0, query_place)


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    dropout: float,
    layout: Layout,
    is_causal: bool = False,
) -> torch.Tensor:
    """Softmax attention within each sequence, without padding: torch's FlashAttention-2 (arXiv 2307.08691).

    q: (M, heads, width); k, v: (T, heads, width); in half precision on a GPU, width a multiple of 8, each row of a head
    without gaps. is_causal: all tokens must be queries. Returns (M, heads, width). Weights are dropped by 8 bits of a
    random number: of dropout 0.2 it keeps 205/256.
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
        is_causal,
        False,
        scale=scale,
    )[0]
    return attention_output


def flash_fits(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float) -> bool:
    """Whether torch has FlashAttention for these types, widths and this device.

    q: (M, heads, width); k, v: (T, heads, width), of any width up to 256, also those that the caller has yet to fill up
    to a multiple of 8.
    """
    q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))  # (1, heads, T, width)
    return can_use_flash_attention(SDPAParams(q, k, v, None, dropout, False, False))


@functools.cache
def compile_without(owner: type[Any], method: str) -> None:
    """Have torch.compile leave `method` of a class as it is: one that computes attention by this module."""
    # torch 2.11 fails at the mask where sizes are dynamic. Not a decorator, since its import takes a second.
    setattr(owner, method, torch.compiler.disable(getattr(owner, method)))
