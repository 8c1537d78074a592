"""HSTU whose bias is looked up for every pair of tokens, in plain torch: what FuXi's authors time their models beside.

So does the public PyTorch code of HSTU's authors, which FuXi's code is built on: every layer makes an N x N matrix of
bias for each sequence, and one of scores for each head. A bucket is found by a logarithm in float32, so that seconds at
the edge of a bucket may fall into the one beside it. What is not in plain torch is what lies around it in `HSTULayer`:
on a GPU projection and gate are this project's kernels, as of all kinds of HSTU here. Tokens are padded and taken out
again by an index that the batch has at hand. The bias is made in float32; there in the type of its weights.
"""

import torch
import torch.nn.functional as F

from kernels.hstu_attention import TIME_BUCKETS
from steps.data.sequences import Batch
from steps.models.fuxi import by_distance
from steps.models.hstu import HSTULayer

_BUCKET_WIDTH = 0.301  # of the logarithm of seconds


class DenseHSTULayer(HSTULayer):
    """An `HSTULayer` with both biases, silu attention and no window."""

    def forward(self, x: torch.Tensor, batch: Batch, compute_dtype: torch.dtype) -> torch.Tensor:
        """Tokens (T, d) to tokens (T, d) of the same type. Everything between is computed in `compute_dtype`."""
        u, q, k, v = self.project(x, compute_dtype)
        return self.finish(x, u, self.attend_densely(q, k, v, batch), compute_dtype)

    def attend_densely(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch) -> torch.Tensor:
        """What `attend` gives, (T, h, dv), of q, k (T, h, dqk) and v (T, h, dv). ValueError where a bias is missing."""
        if self.position_bias is None or self.time_bias is None or self.attention_scale is None:
            raise ValueError("a dense lookup has both biases, and divides by the number of positions")
        padded = (batch.to_padded(part.flatten(1)) for part in (self.alpha * q, k, v))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in padded)  # (S, h, N, .)
        bias = position_map(self.position_bias, batch.max_len) + time_map(self.time_bias, batch, self.time)
        scores = q @ k.transpose(-1, -2) + bias[:, None].to(q.dtype)
        weights = (F.silu(scores) / self.attention_scale).tril()  # (S, h, N, N)
        return batch.to_jagged((weights @ v).transpose(1, 2).flatten(2)).unflatten(-1, (self.heads, -1))


def position_map(table: torch.Tensor, n: int) -> torch.Tensor:
    """p[j - i] in row i and column j, (N, N), of a table (2P - 1,) whose middle is p[0], P >= N."""
    most = (len(table) + 1) // 2
    return by_distance(F.pad(table[most - n : most + n - 1], (1, 0)).roll(-n), n)


def time_map(table: torch.Tensor, batch: Batch, time: str) -> torch.Tensor:
    """The entry (S, N, N) of a table (129,) for every pair's bucket of seconds. time: next or self, the query's."""
    query_time = batch.next_timestamp if time == "next" else batch.timestamp
    queries, keys = batch.to_padded(torch.stack([query_time, batch.timestamp], dim=1)).unbind(-1)
    seconds = (queries[:, :, None] - keys[:, None, :]).abs().clamp(min=1)
    bucket = (seconds.log() / _BUCKET_WIDTH).long().clamp(0, TIME_BUCKETS - 1)
    return table.index_select(0, bucket.flatten()).view_as(bucket)
