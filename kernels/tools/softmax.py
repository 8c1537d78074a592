"""Causal softmax attention by what torch has, on rows of one length: scaled_dot_product_attention by its backends, and
FlexAttention, which takes our bias too.

Where one of them does not run, what was seen stands in place of its time.
"""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._functorch.config
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from ..hstu_attention.naive import TIME_BUCKETS
from .timing import timed

Tensors = tuple[torch.Tensor, ...]
Attend = Callable[[], torch.Tensor]
BACKENDS = {"cuDNN (sdpa)": SDPBackend.CUDNN_ATTENTION, "FlashAttention-2 (sdpa)": SDPBackend.FLASH_ATTENTION}
FLEX = "FlexAttention"
_LETTERS = 200  # of an error


def passes_of_others(inputs: dict[str, Any], batch: int, device: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Implementation, pass, and its `ms` and `captured`, or `seen`. Inputs are those of `attention_inputs`, of full
    rows; without bias all are measured, with bias FlexAttention alone."""
    q, k, v = (_rows(inputs[name], batch).requires_grad_() for name in ("q", "k", "v"))
    if inputs["position_bias"] is None:
        for name, backend in BACKENDS.items():
            for which in ("fwd", "bwd"):
                yield name, which, attempt(functools.partial(sdpa, q, k, v, inputs["alpha"], backend), which, device)
    tables = [inputs[name] for name in ("position_bias", "time_bias") if inputs[name] is not None]
    torch.compiler.reset()  # which else compiles for a few shapes, and then no more

    @functools.cache  # without bias one compilation serves both passes
    def make(learn: bool) -> tuple[Attend, Tensors]:
        learned = [table.detach().requires_grad_(learn) for table in tables]
        return flex(q, k, v, *learned, inputs=inputs, batch=batch, compiled=device != "cpu")

    for which in ("fwd", "bwd"):
        # The tables learn in the backward pass alone: their gradients are what may not compile.
        yield FLEX, which, attempt(functools.partial(make, which == "bwd" and bool(tables)), which, device)


def sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, alpha: float, backend: SDPBackend
) -> tuple[Attend, Tensors]:
    """Causal softmax attention of (B, h, N, d) by a backend; and what it depends on."""

    def attend() -> torch.Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=alpha)

    return attend, (q, k, v)


def flex(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    position_bias: torch.Tensor | None = None,
    time_bias: torch.Tensor | None = None,
    *,
    inputs: dict[str, Any],
    batch: int,
    compiled: bool,
) -> tuple[Attend, Tensors]:
    """Causal softmax attention of (B, h, N, d) by FlexAttention, with p[j - i] + w[bucket(time_i - time_j)] or without;
    and what it depends on."""
    mask = _causal(q.shape[2], q.device)
    bias = None
    depends_on: Tensors = (q, k, v)
    if position_bias is not None and time_bias is not None:
        depends_on = (q, k, v, position_bias, time_bias)
        times = (inputs[name].view(batch, -1) for name in ("query_time", "key_time"))
        bias = _relative(position_bias, time_bias, *times)
    function = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
    return lambda: function(q, k, v, score_mod=bias, block_mask=mask, scale=inputs["alpha"]), depends_on


def _relative(
    position_bias: torch.Tensor, time_bias: torch.Tensor, query_time: torch.Tensor, key_time: torch.Tensor
) -> Callable[..., torch.Tensor]:
    """Score of b, h, i, j with both biases; times are (B, N) seconds."""
    zero = (len(position_bias) - 1) // 2

    def score(score: torch.Tensor, b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        seconds = (query_time[b, i] - key_time[b, j]).abs().clamp(min=1)
        bucket = (torch.log(seconds.float()) / 0.301).to(torch.int32).clamp(max=TIME_BUCKETS - 1)
        return score + position_bias[j - i + zero] + time_bias[bucket]

    return score


def _causal(n: int, device: torch.device) -> BlockMask:
    return create_block_mask(lambda b, h, i, j: i >= j, None, None, n, n, device=str(device))


def _rows(tensor: torch.Tensor, batch: int) -> torch.Tensor:
    """(T, h, d) of rows of one length as (B, h, N, d)."""
    return tensor.view(batch, -1, *tensor.shape[1:]).transpose(1, 2).contiguous()


def attempt(make: Callable[[], tuple[Attend, Tensors]], which: str, device: str) -> dict[str, Any]:
    """`ms` and `captured` of a pass, fwd or bwd, of what is made: a call, and what it depends on, which is to learn.
    Where that fails: what was `seen`."""
    try:
        # One forward pass must leave to many backward passes what they read.
        with torch._functorch.config.patch(donated_buffer=False):
            attend, depends_on = make()
            if which == "fwd":
                return timed(attend, depends_on, device)._asdict()
            output = attend()
            grad = torch.randn_like(output)

            def backward() -> Any:
                return torch.autograd.grad(output, depends_on, grad, retain_graph=True)

            return timed(backward, (*depends_on, grad), device)._asdict()
    except Exception as error:  # of a compiler, or of a backend that refuses
        text = f"{type(error).__name__}: {error}"
        # A compiler in a process of its own hands on the whole trace: its first error is why.
        causes = [line.strip() for line in text.splitlines()[1:] if re.match(r"\s*[\w.]+(Error|Exception): .", line)]
        text = " ".join((causes[0] if causes else text).split())[:_LETTERS]
        return {"seen": f"torch {torch.__version__}, triton {triton.__version__}: {text}"}
