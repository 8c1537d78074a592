"""The Transformer that encoders of HSTU are measured beside: the layer of arXiv 2402.17152, section 3.3, in torch.

x = x + dropout(attention(LN(x)) W_o); x = x + dropout(gelu(LN(x) W_1) W_2), with W_1 four times as wide as x, causal
softmax attention, and weights and biases everywhere. No model of the project is so: SASRec's feed-forward network is as
wide as x, Transformer++ has gates.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

#: What computes the attention: backends of torch's scaled_dot_product_attention.
BACKENDS = {"FlashAttention-2": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
_WIDER = 4  # times the feed-forward network's inner width


class TransformerLayer(nn.Module):
    """One layer. attention: a key of BACKENDS, which raises RuntimeError where it does not run."""

    def __init__(self, dim: int, heads: int, dropout: float, attention: str) -> None:
        super().__init__()
        self.heads, self.dropout, self.backend = heads, dropout, BACKENDS[attention]
        self.attention_norm, self.inner_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.output = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.inner, self.outer = nn.Linear(dim, _WIDER * dim), nn.Linear(_WIDER * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, d) to (B, N, d), of the type of the weights."""
        x = x + self._drop(self.output(self._attention(self.attention_norm(x))))
        return x + self._drop(self.outer(F.gelu(self.inner(self.inner_norm(x)))))

    def _attention(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        with sdpa_kernel(self.backend):
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return attended.transpose(1, 2).flatten(2)

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.dropout == 0:
            return x
        # As F.dropout on CUDA; on a CPU that would keep a mask of the type of x, not of a byte.
        dropped: torch.Tensor = torch.native_dropout(x, self.dropout, True)[0]
        return dropped
