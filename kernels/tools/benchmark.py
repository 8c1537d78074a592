"""Time the kernels on the GPU at hand, beside what one would use without them, and write the figures as data.

    HSTU_COMMIT=$(git rev-parse --short HEAD) python -m kernels.tools.benchmark --output reports/kernels

Medians of device time with cold caches. Bytes are the fewest that must pass through device memory, inputs once and
outputs once. `python -m steps.kernel_report` makes tables and a roofline of them.
"""

import argparse
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
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
#: (tokens a row, rows) of the long shapes, and (heads, head dimension) of MovieLens'.
LONG = ((1024, 64), (2048, 32), (4096, 16), (8192, 8))
MOVIELENS = ((2, 25), (8, 32))


def milliseconds(function: Callable[[], Any], captured: bool = True) -> float:
    """Median device time of a call with cold caches: of replays of a CUDA graph, so that launches cost nothing, or,
    where it cannot be captured, of the call itself.

    `do_bench` clears the L2 cache between calls, which also keeps them apart: in unbroken replays of long kernels the
    GPU lowers its clock.
    """
    if captured:
        for _ in range(3):
            function()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        function = graph.replay
    return float(triton.testing.do_bench(function, warmup=10, rep=40, return_mode="median"))


def peak_of(function: Callable[[], Any]) -> int:
    """Bytes allocated at the peak of a call, beyond what was there before."""
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


def attention_rows(n: int, batch: int, heads: int, dim: int, bias: str, ragged: bool = False) -> list[Row]:
    """Ours, forward and backward; the deterministic backward; with ragged rows also the sum and dense torch."""
    torch.manual_seed(0)
    lengths = lengths_of(batch, n, ragged, "cuda")
    inputs = attention_inputs(lengths, heads, dim, dim, torch.bfloat16, bias)
    arguments = list(inputs.values())
    outputs = attention(*arguments)
    output = outputs[0]
    grad = torch.randn_like(output)

    def forward() -> Any:
        return attention(*arguments)

    def backward(deterministic: bool) -> Any:
        return attention_gradients(grad, outputs, arguments, deterministic)

    flops = attention_flops(lengths, heads, dim, dim)
    size = output.numel() * output.element_size()
    shape = {
        "dtype": "bfloat16", "batch": batch, "heads": heads, "n": n, "dqk": dim, "dv": dim,
        "lengths": "ragged" if ragged else "full", "bias": bias,
    }  # fmt: skip

    def row(implementation: str, which: str, ms: float, flop: float, tensors: int, peak: int | None) -> Row:
        rate = flop / ms * 1e-9
        return {
            "implementation": implementation, "pass": which, **shape, "ms": ms, "tflops": rate, "flops": flop,
            "bytes": tensors * size, "peak_bytes": peak,
        }  # fmt: skip

    rows = [
        row("ours", "fwd", milliseconds(forward), flops[0], 4, peak_of(forward)),
        row("ours", "bwd", milliseconds(lambda: backward(False)), flops[1], 7, peak_of(lambda: backward(False))),
        row("ours, deterministic", "bwd", milliseconds(lambda: backward(True)), flops[1], 7, None),
    ]
    if ragged:
        names: list[str] = [name for name in ("q", "k", "v", "position_bias", "time_bias") if inputs[name] is not None]
        others: dict[str, Any] = {key: value for key, value in inputs.items() if key not in (*names, "softmax")}

        def dense(*tensors: torch.Tensor) -> torch.Tensor:
            return naive.hstu_attention(**(others | dict(zip(names, tensors, strict=True))))

        both = gradients(dense, *(inputs[name] for name in names))
        flop = sum(flops)
        rows.append(row("dense torch", "fwd+bwd", milliseconds(both, captured=False), flop, 11, peak_of(both)))

        def ours() -> Any:
            return forward(), backward(False)

        rows.append(row("ours", "fwd+bwd", milliseconds(ours), flop, 11, peak_of(ours)))
    return rows


def flash_rows(n: int, batch: int, heads: int, dim: int) -> list[Row]:
    """FlashAttention-2 through torch's scaled_dot_product_attention: causal, rows of one length."""
    q, k, v = (
        torch.randn(batch, heads, n, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    )
    forward, backward = attention_flops(torch.full((batch,), n), heads, dim, dim)
    shape = {
        "dtype": "bfloat16", "batch": batch, "heads": heads, "n": n, "dqk": dim, "dv": dim, "lengths": "full",
        "bias": "none", "peak_bytes": None,
    }  # fmt: skip
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
            ms = milliseconds(function, captured=False)
            rows.append(
                {"implementation": "FlashAttention-2 (sdpa)", "pass": which, **shape, "ms": ms}
                | {"tflops": flop / ms * 1e-9, "flops": flop, "bytes": tensors * size}
            )
    return rows


def softmax_rows(dim: int, dtype: torch.dtype, items: int, tokens: int = 16_000, negatives: int = 128) -> list[Row]:
    states = torch.randn(tokens, dim, device="cuda", dtype=dtype)
    table = torch.randn(items, dim, device="cuda", dtype=dtype)
    positives = torch.randint(1, items, (tokens,), device="cuda")
    drawn = torch.randint(1, items, (tokens, negatives), device="cuda")
    shape = {"dtype": str(dtype)[6:], "tokens": tokens, "negatives": negatives, "items": items, "dim": dim}
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
        ms = milliseconds(both)
        rows.append(
            {"implementation": name, "pass": "fwd+bwd", **shape, "ms": ms, "tflops": flop / ms * 1e-9, "flops": flop}
            | {"bytes": least, "peak_bytes": peak_of(both)}
        )
    return rows


def elementwise_rows(tokens: int, dim: int, dtype: torch.dtype) -> list[Row]:
    """norm_gate with dropout 0.2 against torch's layer_norm, product and dropout."""
    u, attended = torch.randn(2, tokens, dim, device="cuda", dtype=dtype)
    return _against_torch(
        lambda a, b: norm_gate(a, b, 0.2, True), lambda a, b: norm_gate_naive.norm_gate(a, b, 0.2, True), u, attended
    )


def layer_norm_rows(tokens: int, dim: int, dtype: torch.dtype) -> list[Row]:
    """Affine layer norm against torch's."""
    x = torch.randn(tokens, dim, device="cuda", dtype=dtype)
    weight, bias = torch.randn(2, dim, device="cuda", dtype=dtype)
    return _against_torch(
        lambda *tensors: layer_norm(tensors[0], 1e-6, *tensors[1:]),
        lambda *tensors: layer_norm_naive.layer_norm(tensors[0], 1e-6, *tensors[1:]),
        x, weight, bias,
    )  # fmt: skip


def _against_torch(ours: Callable[..., Any], theirs: Callable[..., Any], *inputs: torch.Tensor) -> list[Row]:
    """Rows of an operation without products; bytes: every (T, D) input read twice, every gradient and the output's
    written or read once."""
    (tokens, dim), dtype = inputs[0].shape, inputs[0].dtype
    size = inputs[0].numel() * inputs[0].element_size()
    large = sum(tensor.ndim == 2 for tensor in inputs)
    rows = []
    for name, function in (("ours", ours), ("torch", theirs)):
        both = gradients(function, *inputs)
        rows.append(
            {"implementation": name, "pass": "fwd+bwd", "dtype": str(dtype)[6:], "tokens": tokens, "dim": dim}
            | {"ms": milliseconds(both), "tflops": None, "flops": None, "bytes": (3 * large + 2) * size}
            | {"peak_bytes": peak_of(both)}
        )
    return rows


def projection_rows(tokens: int, dim: int, columns: int, dtype: torch.dtype) -> list[Row]:
    """silu(layer_norm(x) W), fused, against torch."""
    x = torch.randn(tokens, dim, device="cuda", dtype=dtype)
    weight = torch.randn(dim, columns, device="cuda", dtype=dtype) * dim**-0.5
    flop = 6.0 * tokens * dim * columns
    least = (3 * x.numel() + 2 * tokens * columns + 2 * weight.numel()) * x.element_size()
    rows = []
    for name, function in (("ours", projection_op.projection), ("torch", projection_naive.projection)):
        both = gradients(function, x, weight)
        ms = milliseconds(both)
        rows.append(
            {"implementation": name, "pass": "fwd+bwd", "dtype": str(dtype)[6:], "tokens": tokens, "dim": dim}
            | {"columns": columns, "ms": ms, "tflops": flop / ms * 1e-9, "flops": flop, "bytes": least}
            | {"peak_bytes": peak_of(both)}
        )
    return rows


OPERATIONS = ["ceilings", "sampled_softmax", "norm_gate", "layer_norm", "projection", "hstu_attention"]


def ceilings() -> Row:
    """What this GPU reaches: a device-to-device copy of 4 GB, bytes read and written, and a bf16 product of 8,192."""
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.numel() * 4 / (milliseconds(lambda: target.copy_(source)) * 1e-3)
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = 2 * 8192**3 / (milliseconds(lambda: a @ b) * 1e-3)
    return {"copy_bytes_per_second": copy, "matmul_flops_per_second": product}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for one json an operation")
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=OPERATIONS)
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = True
    args.output.mkdir(parents=True, exist_ok=True)
    origin = {"device": torch.cuda.get_device_name(), "commit": os.environ.get("HSTU_COMMIT", "unknown")}

    def write(name: str, rows: list[Row] | Row) -> None:
        marked = rows | origin if isinstance(rows, dict) else [row | origin for row in rows]
        args.output.joinpath(f"{name}.json").write_text(json.dumps(marked, indent=1) + "\n")
        print(f"{name}: written", flush=True)

    if "ceilings" in args.operations:
        write("ceilings", ceilings())
        torch.cuda.empty_cache()
    small = ((50, torch.float32), (256, torch.bfloat16))
    if "sampled_softmax" in args.operations:
        catalogues = (3_884, 27_279)
        write(
            "sampled_softmax", [row for dim, dtype in small for v in catalogues for row in softmax_rows(dim, dtype, v)]
        )
    widths = ((50, torch.float32), (50, torch.bfloat16), (64, torch.bfloat16), (256, torch.bfloat16))
    if "norm_gate" in args.operations:
        write("norm_gate", [row for dim, dtype in widths for row in elementwise_rows(21_000, dim, dtype)])
    if "layer_norm" in args.operations:
        write("layer_norm", [row for dim, dtype in widths for row in layer_norm_rows(21_000, dim, dtype)])
    if "projection" in args.operations:
        write("projection", [row for dim, dtype in widths for row in projection_rows(21_000, dim, 4 * dim, dtype)])
    if "hstu_attention" in args.operations:
        rows = [row for heads, dim in MOVIELENS for bias in ("none", "both")
                for row in attention_rows(211, 128, heads, dim, bias, ragged=True)]  # fmt: skip
        for dim, biases in ((64, ("none", "both", "position", "time")), (128, ("none", "both"))):
            rows += [row for n, batch in LONG for bias in biases for row in attention_rows(n, batch, 4, dim, bias)]
            rows += [row for n, batch in LONG for row in flash_rows(n, batch, 4, dim)]
            write("hstu_attention", rows)


if __name__ == "__main__":
    main()
