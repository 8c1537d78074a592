"""Time the kernels on a device, beside what one would use without them.

Each operation has a function that measures one case of it: sizes and types as keywords, a row per implementation and
pass. Medians of device time with cold caches. Bytes are the fewest that must pass through device memory, inputs once
and outputs once. Shapes to measure, and what becomes of the rows, are others' business. On a CPU, where torch does the
work or Triton's interpreter, the times say nothing of the kernels.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import triton.testing

from ..hstu_attention import naive
from ..hstu_attention.op import attention
from ..hstu_attention.op import gradients as attention_gradients
from ..layer_norm import layer_norm
from ..layer_norm import naive as layer_norm_naive
from ..norm_gate import naive as norm_gate_naive
from ..norm_gate import norm_gate
from ..projection import naive as projection_naive
from ..projection import triton_op as projection_op
from ..sampled_softmax import dense as dense_softmax
from ..sampled_softmax import naive as gather_softmax
from ..sampled_softmax import triton_op as softmax_op
from .cases import attention_flops, attention_inputs, lengths_of

Row = dict[str, Any]
_ON_CPU = 3  # calls, of which the median counts


def milliseconds(function: Callable[[], Any], device: str, captured: bool = True) -> float:
    """Median device time of a call with cold caches: of replays of a CUDA graph, so that launches cost nothing, or,
    where it cannot be captured, of the call itself. On a CPU the median time of a few calls.

    `do_bench` clears the L2 cache between calls, which also keeps them apart: in unbroken replays of long kernels the
    GPU lowers its clock.
    """
    if device == "cpu":
        times = []
        for _ in range(_ON_CPU):
            start = time.perf_counter()
            function()
            times.append(1000 * (time.perf_counter() - start))
        return statistics.median(times)
    if captured:
        for _ in range(3):
            function()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        function = graph.replay
    return float(triton.testing.do_bench(function, warmup=10, rep=40, return_mode="median"))


def peak_of(function: Callable[[], Any], device: str) -> int | None:
    """Bytes allocated at the peak of a call, beyond what was there before; None on a CPU, which does not say."""
    if device == "cpu":
        return None
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def gradients(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> Callable[[], Any]:
    """Forward and backward of a function of tensors, through autograd."""
    inputs = [tensor.detach().requires_grad_() for tensor in tensors]
    grad = torch.randn_like(function(*inputs))
    return lambda: torch.autograd.grad(function(*inputs), inputs, grad)


def attention_rows(
    device: str, n: int, batch: int, heads: int, dim: int, bias: str, lengths: str, dtype: str
) -> list[Row]:
    """Ours, forward and backward, and the deterministic backward. Beside them, of ragged rows: both passes in one, and
    dense torch; of full rows without bias: FlashAttention-2, on CUDA.

    `lengths` is full, every row of n tokens, or ragged, as MovieLens' are.
    """
    torch.manual_seed(0)
    ragged = lengths == "ragged"
    sizes = lengths_of(batch, n, ragged, device)
    inputs = attention_inputs(sizes, heads, dim, dim, getattr(torch, dtype), bias)
    arguments = list(inputs.values())
    outputs = attention(*arguments)
    output = outputs[0]
    grad = torch.randn_like(output)

    def forward() -> Any:
        return attention(*arguments)

    def backward(deterministic: bool) -> Any:
        return attention_gradients(grad, outputs, arguments, deterministic)

    timed = functools.partial(milliseconds, device=device)
    flops = attention_flops(sizes, heads, dim, dim)
    size = output.numel() * output.element_size()
    shape = {
        "dtype": dtype, "batch": batch, "heads": heads, "n": n, "dqk": dim, "dv": dim, "lengths": lengths, "bias": bias,
    }  # fmt: skip

    def row(implementation: str, which: str, ms: float, flop: float, tensors: int, peak: int | None) -> Row:
        measured = {"ms": ms, "flops": flop, "bytes": tensors * size, "peak_bytes": peak}
        return {"implementation": implementation, "pass": which, **shape, **measured}

    def peak(function: Callable[[], Any]) -> int | None:
        return peak_of(function, device)

    rows = [
        row("ours", "fwd", timed(forward), flops[0], 4, peak(forward)),
        row("ours", "bwd", timed(lambda: backward(False)), flops[1], 7, peak(lambda: backward(False))),
        row("ours, deterministic", "bwd", timed(lambda: backward(True)), flops[1], 7, None),
    ]
    if ragged:
        names: list[str] = [name for name in ("q", "k", "v", "position_bias", "time_bias") if inputs[name] is not None]
        others: dict[str, Any] = {key: value for key, value in inputs.items() if key not in (*names, "softmax")}

        def dense(*tensors: torch.Tensor) -> torch.Tensor:
            return naive.hstu_attention(**(others | dict(zip(names, tensors, strict=True))))

        both = gradients(dense, *(inputs[name] for name in names))
        flop = sum(flops)
        rows.append(row("dense torch", "fwd+bwd", timed(both, captured=False), flop, 11, peak(both)))

        def ours() -> Any:
            return forward(), backward(False)

        rows.append(row("ours", "fwd+bwd", timed(ours), flop, 11, peak(ours)))
    elif bias == "none" and device != "cpu":
        rows += _flash_rows(n, batch, heads, dim, shape)
    return rows


def _flash_rows(n: int, batch: int, heads: int, dim: int, shape: Row) -> list[Row]:
    """FlashAttention-2 through torch's scaled_dot_product_attention: causal, rows of one length."""
    dtype = getattr(torch, shape["dtype"])
    q, k, v = (torch.randn(batch, heads, n, dim, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3))
    forward, backward = attention_flops(torch.full((batch,), n), heads, dim, dim)
    size = q.numel() * q.element_size()
    rows = []
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True)
        output = attend(q, k, v)
        grad = torch.randn_like(output)
        for which, flop, tensors, function in (
            ("fwd", forward, 4, lambda: attend(q, k, v)),
            ("bwd", backward, 7, lambda: torch.autograd.grad(output, (q, k, v), grad, retain_graph=True)),
        ):
            ms = milliseconds(function, "cuda", captured=False)
            rows.append(
                {"implementation": "FlashAttention-2 (sdpa)", "pass": which, **shape}
                | {"ms": ms, "flops": flop, "bytes": tensors * size, "peak_bytes": None}
            )
    return rows


def softmax_rows(device: str, dim: int, dtype: str, items: int, tokens: int, negatives: int) -> list[Row]:
    """The loss over `negatives` drawn for each token; against all items where a product with them is no waste."""
    states = torch.randn(tokens, dim, device=device, dtype=getattr(torch, dtype))
    table = torch.randn(items, dim, device=device, dtype=getattr(torch, dtype))
    positives = torch.randint(1, items, (tokens,), device=device)
    drawn = torch.randint(1, items, (tokens, negatives), device=device)
    shape = {"dtype": dtype, "tokens": tokens, "negatives": negatives, "items": items, "dim": dim}
    size = states.element_size()
    least = 2 * (tokens + items) * dim * size + 8 * tokens * (negatives + 1)
    flop = 6.0 * tokens * (negatives + 1) * dim
    rows = []
    for name, module in (
        ("ours", softmax_op),
        ("gather + einsum", gather_softmax),
        ("all items by one product", dense_softmax),
    ):
        if module is dense_softmax and items > 64 * negatives:
            continue

        def loss(x: torch.Tensor, vectors: torch.Tensor, module: Any = module) -> torch.Tensor:
            return module.sampled_softmax(x, vectors, positives, drawn, 0.05, None)

        both = gradients(loss, states, table)
        rows.append(
            {"implementation": name, "pass": "fwd+bwd", **shape, "ms": milliseconds(both, device), "flops": flop}
            | {"bytes": least, "peak_bytes": peak_of(both, device)}
        )
    return rows


def norm_gate_rows(device: str, tokens: int, dim: int, dtype: str) -> list[Row]:
    """norm_gate with dropout 0.2 against torch's layer_norm, product and dropout."""
    u, attended = torch.randn(2, tokens, dim, device=device, dtype=getattr(torch, dtype))
    return _against_torch(
        lambda a, b: norm_gate(a, b, 0.2, True), lambda a, b: norm_gate_naive.norm_gate(a, b, 0.2, True), u, attended
    )


def layer_norm_rows(device: str, tokens: int, dim: int, dtype: str) -> list[Row]:
    """Affine layer norm against torch's."""
    x = torch.randn(tokens, dim, device=device, dtype=getattr(torch, dtype))
    weight, bias = torch.randn(2, dim, device=device, dtype=getattr(torch, dtype))
    return _against_torch(
        lambda *tensors: layer_norm(tensors[0], 1e-6, *tensors[1:]),
        lambda *tensors: layer_norm_naive.layer_norm(tensors[0], 1e-6, *tensors[1:]),
        x, weight, bias,
    )  # fmt: skip


def _against_torch(ours: Callable[..., Any], theirs: Callable[..., Any], *inputs: torch.Tensor) -> list[Row]:
    """Rows of an operation without products; bytes: every (T, D) input read twice, every gradient and the output's
    written or read once."""
    (tokens, dim), dtype, device = inputs[0].shape, inputs[0].dtype, inputs[0].device.type
    size = inputs[0].numel() * inputs[0].element_size()
    large = sum(tensor.ndim == 2 for tensor in inputs)
    rows = []
    for name, function in (("ours", ours), ("torch", theirs)):
        both = gradients(function, *inputs)
        rows.append(
            {"implementation": name, "pass": "fwd+bwd", "dtype": str(dtype)[6:], "tokens": tokens, "dim": dim}
            | {"ms": milliseconds(both, device), "flops": None, "bytes": (3 * large + 2) * size}
            | {"peak_bytes": peak_of(both, device)}
        )
    return rows


def projection_rows(device: str, tokens: int, dim: int, columns: int, dtype: str) -> list[Row]:
    """silu(layer_norm(x) W), fused, against torch."""
    x = torch.randn(tokens, dim, device=device, dtype=getattr(torch, dtype))
    weight = torch.randn(dim, columns, device=device, dtype=getattr(torch, dtype)) * dim**-0.5
    flop = 6.0 * tokens * dim * columns
    least = (3 * x.numel() + 2 * tokens * columns + 2 * weight.numel()) * x.element_size()
    rows = []
    for name, function in (("ours", projection_op.projection), ("torch", projection_naive.projection)):
        both = gradients(function, x, weight)
        rows.append(
            {"implementation": name, "pass": "fwd+bwd", "dtype": dtype, "tokens": tokens, "dim": dim}
            | {"columns": columns, "ms": milliseconds(both, device), "flops": flop, "bytes": least}
            | {"peak_bytes": peak_of(both, device)}
        )
    return rows


#: What measures a case of each operation: f(device, **sizes) -> rows with `ms`, `flops`, `bytes` and `peak_bytes`.
OPERATIONS: dict[str, Callable[..., list[Row]]] = {
    "sampled_softmax": softmax_rows,
    "norm_gate": norm_gate_rows,
    "layer_norm": layer_norm_rows,
    "projection": projection_rows,
    "hstu_attention": attention_rows,
}


def ceilings(device: str, copied: int, product: int) -> tuple[float, float]:
    """What the device reaches: bytes a second, read and written, of a copy of so many bytes; and operations a second of
    a bfloat16 product of `product` x `product` matrices."""
    source = torch.randn(copied // 4, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.numel() * 4 / (milliseconds(lambda: target.copy_(source), device) * 1e-3)
    a, b = torch.randn(2, product, product, device=device, dtype=torch.bfloat16)
    return copy, 2 * product**3 / (milliseconds(lambda: a @ b, device) * 1e-3)
