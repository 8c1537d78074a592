"""FuXi-alpha (arXiv 2502.03036) and FuXi-gamma (arXiv 2512.12740): position and time as attention of their own.

A block sums the values v_j of a token's past once per channel, with weights that no other channel changes. c_i has
the channels' sums side by side, [u, v, q, k] = silu(W RMSNorm(x)), and RMSNorm has no weights:

    h_i = x_i + W_o (u_i * RMSNorm(c_i)) + b_o
    y_i = h_i + W_3 (silu(W_1 n) * W_2 n),  n = RMSNorm(h_i)

    channel    weight of v_j                               in
    position   p_(i - j), a table                          both; all heads share it
    time       a table's entry for the bucket of T_ij      alpha; all heads share it
    time       a g^(T_ij^b), of three learnt numbers       gamma; likewise
    meaning    silu(q_i . k_j) / N                         alpha

T_ij is |t_i - t_j| in seconds. Of FuXi-alpha this follows the public code: t_i is the time of the item that is to be
predicted (`time: next`), the time has HSTU's buckets, and N is the number of positions. Of FuXi-gamma neither code nor
the whole paper was at hand: this follows its formula, as others quote it, where t_i is the token's own time
(`time: self`). All else is as in the code of FuXi-beta, on which it builds: heads of values, dropout, initial weights,
and the range that a is drawn from. `decay` and `power` are where g and b start. The pruning of positions after training
is left out.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn

from kernels.hstu_attention import TIME_BUCKETS, time_bucket
from steps.common.typed import Count, Inside01, Positive, Whole
from steps.data.sequences import Batch
from steps.models.base import PositionalEncoder

_EPS = 1e-6
_AMPLITUDE = 0.2  # a is drawn uniformly from -0.2 to 0.2
_MOST_POWER = 4.0  # of a century, in seconds, a power of 4.1 overflows, and its gradient is not a number


@dataclass(frozen=True)
class FuXiConfig:
    """The sizes of either encoder, and its choices.

    output_slots: positions beyond max_len. ff_multiplier: the width of the feed-forward network, in dims. time: from
    which time the key's is subtracted, the next item's or the token's.
    """

    dim: Count
    blocks: Count
    heads: Count
    dv: Count
    output_slots: Whole
    ff_multiplier: Count
    time: Literal["next", "self"]


@dataclass(frozen=True)
class FuXiAlphaConfig(FuXiConfig):
    """As `FuXiConfig`. dqk: the width of a head's queries and keys."""

    dqk: Count


@dataclass(frozen=True)
class FuXiGammaConfig(FuXiConfig):
    """As `FuXiConfig`. decay, power: where g and b of the time's weight start."""

    decay: Inside01
    power: Positive


def toeplitz(table: torch.Tensor, n: int) -> torch.Tensor:
    """The lower triangular (n, n) with table[i - j] in row i and column j, of a table (P,), P >= n."""
    return by_distance(F.pad(table[:n].flip(0), (n, 0)).roll(1), n)


def by_distance(entries: torch.Tensor, n: int) -> torch.Tensor:
    """The (n, n) with entries[(j - i) mod 2 n] in row i and column j, of entries (2 n,).

    Copies behind each other, cut into rows one shorter than a copy: the backward pass is a sum over copies. That of
    `Tensor.unfold`, which needs no copies, has on a GPU one thread add up the n gradients of an entry.
    """
    return entries.repeat(n)[: n * (2 * n - 1)].view(n, 2 * n - 1)[:, :n]


class FuXiBlock(nn.Module, ABC):
    """A block of either model. A subclass has its channels besides that of positions.

    channels: how many there are. dqk: the width of queries and keys, 0 where no channel has them.
    """

    def __init__(self, config: FuXiConfig, num_positions: int, dropout: float, channels: int, dqk: int) -> None:
        super().__init__()
        dim, inner, width = config.dim, config.heads * config.dv, config.ff_multiplier * config.dim
        self.heads, self.num_positions = config.heads, num_positions
        self.parts = [channels * inner, inner + 2 * config.heads * dqk]
        self.uvqk = nn.Parameter(torch.empty(dim, sum(self.parts)).normal_(std=0.02))
        self.values = [inner, config.heads * dqk, config.heads * dqk]
        self.position_bias = nn.Parameter(torch.empty(num_positions).normal_(std=0.02))
        self.output = nn.Linear(channels * inner, dim)
        self.gate = nn.Linear(dim, width, bias=False)
        self.inner = nn.Linear(dim, width, bias=False)
        self.outer = nn.Linear(width, dim, bias=False)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.output, self.gate, self.inner, self.outer):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, x: torch.Tensor, batch: Batch, time: torch.Tensor) -> torch.Tensor:
        """Tokens (T, d) to tokens (T, d). time: (S, N, N), the encoder's `time_of_pairs`."""
        u, vqk = F.silu(rms_norm(x) @ self.uvqk).split(self.parts, dim=-1)
        x = x + self.output(self.dropout(u * rms_norm(self.attend(vqk, batch, time))))
        normed = self.dropout(rms_norm(x))
        return x + self.outer(F.silu(self.gate(normed)) * self.inner(normed))

    def attend(self, vqk: torch.Tensor, batch: Batch, time: torch.Tensor) -> torch.Tensor:
        """All channels (T, channels h dv), of values, queries and keys side by side (T, h (dv + 2 dqk))."""
        v, q, k = batch.to_padded(vqk).split(self.values, dim=-1)
        position = toeplitz(self.position_bias, batch.max_len) @ v
        return batch.to_jagged(torch.cat([position, *self.channels(v, q, k, time)], dim=-1))

    @abstractmethod
    def channels(self, v: torch.Tensor, q: torch.Tensor, k: torch.Tensor, time: torch.Tensor) -> list[torch.Tensor]:
        """The other channels, each (S, N, h dv), of v (S, N, h dv), q and k (S, N, h dqk), and time (S, N, N)."""


class FuXiAlphaBlock(FuXiBlock):
    """Three channels. time: the bucket of each pair, int64."""

    def __init__(self, config: FuXiAlphaConfig, num_positions: int, dropout: float) -> None:
        super().__init__(config, num_positions, dropout, 3, config.dqk)
        self.time_bias = nn.Parameter(torch.empty(TIME_BUCKETS).normal_(std=0.02))

    def channels(self, v: torch.Tensor, q: torch.Tensor, k: torch.Tensor, time: torch.Tensor) -> list[torch.Tensor]:
        # A row of the table for each query: one for all would get the gradients of all pairs at 129 addresses.
        table = self.time_bias.expand(time.shape[0] * time.shape[1], -1)
        of_time = table.gather(1, time.flatten(0, 1)).view_as(time).tril() @ v
        q, k, values = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        weights = (F.silu(q @ k.transpose(-1, -2)) / self.num_positions).tril()  # (S, h, N, N)
        return [of_time, (weights @ values).transpose(1, 2).flatten(2)]


class FuXiGammaBlock(FuXiBlock):
    """Two channels. time: the seconds of each pair, in floating point."""

    def __init__(self, config: FuXiGammaConfig, num_positions: int, dropout: float) -> None:
        super().__init__(config, num_positions, dropout, 2, 0)
        self.amplitude = nn.Parameter(torch.empty(()).uniform_(-_AMPLITUDE, _AMPLITUDE))
        # Whatever the optimiser does, the decay is between 0 and 1, and the power above 0. What is learnt is the
        # difference from their start: weight decay would draw to 0.5 ^ seconds, which ends a channel within a minute.
        self.start = math.log(config.decay / (1 - config.decay)), math.log(config.power)
        self.decay = nn.Parameter(torch.zeros(()))
        self.power = nn.Parameter(torch.zeros(()))

    def channels(self, v: torch.Tensor, q: torch.Tensor, k: torch.Tensor, time: torch.Tensor) -> list[torch.Tensor]:
        decay, power = self.start[0] + self.decay, self.start[1] + self.power
        return [exponential_power(time, self.amplitude, decay, power).tril() @ v]


def exponential_power(
    seconds: torch.Tensor, amplitude: torch.Tensor, decay: torch.Tensor, power: torch.Tensor
) -> torch.Tensor:
    """a g^(s^b) of seconds s >= 0, of any shape: a = amplitude, g = sigmoid(decay), b = exp(power); all three ().

    b is 4 at most, so that values and gradients are finite for a century.
    """
    return amplitude * torch.exp(F.logsigmoid(decay) * seconds.pow(power.exp().clamp(max=_MOST_POWER)))


def rms_norm(x: torch.Tensor) -> torch.Tensor:
    """x / sqrt(mean square + eps) over the last dimension."""
    return F.rms_norm(x, x.shape[-1:], eps=_EPS)


class FuXi(PositionalEncoder):
    """Item and position embeddings through FuXi blocks."""

    block: ClassVar[type[Any]]  # made of the config, the number of positions, and dropout

    def __init__(self, config: FuXiConfig, max_len: int, dropout: float) -> None:
        super().__init__(config.dim, max_len, config.output_slots, dropout)
        nn.init.xavier_normal_(self.position.weight)
        self.time = config.time
        self.blocks = nn.ModuleList(self.block(config, self.num_positions, dropout) for _ in range(config.blocks))

    @abstractmethod
    def between(self, seconds: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What the blocks read of the seconds (S, N, N) int64 between queries and keys, made once for all of them."""

    def forward(self, embeddings: torch.Tensor, batch: Batch) -> torch.Tensor:
        x = self.embed(embeddings, batch.position)
        time = self.time_of_pairs(batch, x.dtype)
        with self.autocast(x.device):
            for block in self.blocks:
                x = block(x, batch, time)
        return x

    def time_of_pairs(self, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
        """What the blocks read of the times of queries and keys: (S, N, N), `between` of the seconds."""
        query_time = batch.next_timestamp if self.time == "next" else batch.timestamp
        queries, keys = batch.to_padded(torch.stack([query_time, batch.timestamp], dim=1)).unbind(-1)
        return self.between((queries[:, :, None] - keys[:, None, :]).abs(), dtype)


class FuXiAlpha(FuXi):
    """The encoder of FuXi-alpha."""

    block = FuXiAlphaBlock

    def between(self, seconds: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return time_bucket(seconds)


class FuXiGamma(FuXi):
    """The encoder of FuXi-gamma."""

    block = FuXiGammaBlock

    def between(self, seconds: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return seconds.to(dtype)
