"""HSTU (arXiv 2402.17152, equations 1 to 3), as the public experiments run it."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels.hstu_attention import TIME_BUCKETS, hstu_attention, softmax_attention
from kernels.norm_gate import norm_gate
from kernels.projection import projection
from steps.common.typed import Count, EntryError, Whole, number_or
from steps.data.sequences import Batch
from steps.models.base import PositionalEncoder


@dataclass(frozen=True)
class BiasConfig:
    """Which biases the scores have. time: from which time the key's is subtracted, the next item's or the token's."""

    position: bool
    time: Literal["next", "self", "none"]


@dataclass(frozen=True)
class HSTUConfig:
    """The sizes of the encoder, and its choices. alpha: the factor on q.k. attention_scale: N in silu(.) / N.

    max_attn_len and num_sink_tokens make attention semi-local (arXiv 2602.16986): a token sees so many before it, and
    the sequence's first ones. 0 and 0: all before it.

    recompute_projection: keep of the projection its input alone, and compute it again in the backward pass. Up to 64
    channels, where it is one kernel, it is computed so anyway.
    """

    dim: Count
    blocks: Count
    heads: Count
    dqk: Count
    dv: Count
    output_slots: Whole
    attention: Literal["silu", "softmax"]
    alpha: Annotated[float | str, number_or("1/dqk", "1/sqrt(dqk)")]
    attention_scale: Literal["max_len", "true_len"]
    bias: BiasConfig
    max_attn_len: Whole = 0
    num_sink_tokens: Whole = 0
    recompute_projection: bool = False


class HSTULayer(nn.Module):
    """One block: y = x + W_o dropout(U * LN(attention(Q, K, V))), with U, V, Q, K = split(silu(LN(x) W_uvqk))."""

    def __init__(self, config: HSTUConfig, num_positions: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dqk, self.dv = config.heads, config.dqk, config.dv
        named = {"1/dqk": 1 / self.dqk, "1/sqrt(dqk)": self.dqk**-0.5}
        self.alpha = named[config.alpha] if isinstance(config.alpha, str) else config.alpha
        self.softmax = config.attention == "softmax"
        self.attention_scale = float(num_positions) if config.attention_scale == "max_len" else None
        self.time = config.bias.time
        self.recompute_projection = config.recompute_projection
        self.window = {"max_attn_len": config.max_attn_len, "num_sink_tokens": config.num_sink_tokens}
        dim, inner = config.dim, self.heads * self.dv
        self.uvqk = nn.Parameter(torch.empty(dim, self.heads * 2 * (self.dv + self.dqk)))
        self.output = nn.Linear(inner, dim)
        self.dropout = dropout
        nn.init.normal_(self.uvqk, std=0.02)
        nn.init.xavier_uniform_(self.output.weight)
        self.position_bias: nn.Parameter | None = None
        self.time_bias: nn.Parameter | None = None
        if config.bias.position:
            self.position_bias = nn.Parameter(torch.empty(2 * num_positions - 1).normal_(std=0.02))
        if self.time != "none":
            self.time_bias = nn.Parameter(torch.empty(TIME_BUCKETS).normal_(std=0.02))

    def forward(self, x: torch.Tensor, batch: Batch, compute_dtype: torch.dtype) -> torch.Tensor:
        """Tokens (T, d) to tokens (T, d) of the same type. Everything between is computed in `compute_dtype`."""
        u, q, k, v = self.project(x, compute_dtype)
        query_time = batch.next_timestamp if self.time == "next" else batch.timestamp
        attention_output = self.attend(q, k, v, batch.offsets, batch.max_len, query_time, batch.timestamp)
        return self.finish(x, u, attention_output, compute_dtype)

    def project(self, x: torch.Tensor, compute_dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """U (T, h dv), Q and K (T, h, dqk), and V (T, h, dv) of tokens (T, d), in `compute_dtype`."""
        if self.recompute_projection:
            # Without the state of random numbers, which it draws none of and a CUDA graph cannot hand out.
            uvqk = checkpoint(self._uvqk, x, compute_dtype, use_reentrant=False, preserve_rng_state=False)
        else:
            uvqk = self._uvqk(x, compute_dtype)
        inner, inner_qk = self.heads * self.dv, self.heads * self.dqk
        u, v, q, k = uvqk.split([inner, inner, inner_qk, inner_qk], dim=-1)
        return (
            u,
            q.view(-1, self.heads, self.dqk),
            k.view(-1, self.heads, self.dqk),
            v.view(-1, self.heads, self.dv),
        )

    def _uvqk(self, x: torch.Tensor, compute_dtype: torch.dtype) -> torch.Tensor:
        return projection(x.to(compute_dtype), self.uvqk.to(compute_dtype))

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        offsets: torch.Tensor,
        max_len: int,
        query_time: torch.Tensor,
        key_time: torch.Tensor,
        num_targets: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The causal attention (T, h, dv) of this layer's kind, with its biases, over sequences of `offsets`.

        num_targets (candidates at the end): as in `hstu_attention`.
        """
        bias: dict[str, Any] = {
            "position_bias": self.position_bias,
            "time_bias": self.time_bias,
            "query_time": query_time,
            "key_time": key_time,
            "num_targets": num_targets,
            **self.window,
        }
        if self.softmax:
            return softmax_attention(q, k, v, offsets, max_len, alpha=self.alpha, **bias)
        return hstu_attention(q, k, v, offsets, max_len, alpha=self.alpha, attention_scale=self.attention_scale, **bias)

    def finish(
        self, x: torch.Tensor, u: torch.Tensor, attention_output: torch.Tensor, compute_dtype: torch.dtype
    ) -> torch.Tensor:
        """y = x + W_o dropout(U * LN(attention)), (T, d) of the type of x."""
        gated = norm_gate(u, attention_output.flatten(1), self.dropout, self.training)
        return x + F.linear(gated, self.output.weight.to(compute_dtype), self.output.bias.to(compute_dtype)).to(x.dtype)


class HSTU(PositionalEncoder):
    """Item and position embeddings through HSTU layers."""

    def __init__(self, config: HSTUConfig, max_len: int, dropout: float) -> None:
        if config.num_sink_tokens and not config.max_attn_len:
            raise EntryError("key model.max_attn_len: must be 1 or more, as num_sink_tokens lifts a window")
        super().__init__(config.dim, max_len, config.output_slots, dropout)
        nn.init.xavier_normal_(self.position.weight)
        self.blocks = nn.ModuleList(HSTULayer(config, self.num_positions, dropout) for _ in range(config.blocks))

    def forward(self, embeddings: torch.Tensor, batch: Batch) -> torch.Tensor:
        x = self.embed(embeddings, batch.position)
        for block in self.blocks:
            x = block(x, batch, self.compute_dtype or x.dtype)
        return x
