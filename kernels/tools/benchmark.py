"""Time the kernels on a device, beside what one would use without them.

Each operation has a function that measures one case of it: sizes and types as keywords, a row per implementation and
pass, which has the case's sizes in it. `timing` says how. Bytes are the fewest that must pass through device memory,
inputs once and outputs once. Shapes to measure, and what becomes of the rows, are others' business. On a CPU, where
torch does the work or Triton's interpreter, the times say nothing of the kernels.
"""

from collections.abc import Callable
from typing import Any

import torch

from ..layer_norm import layer_norm
from ..layer_norm import naive as layer_norm_naive
from ..linear_cross_entropy import naive as cross_entropy_naive
from ..linear_cross_entropy import triton_op as cross_entropy_op
from ..norm_gate import naive as norm_gate_naive
from ..norm_gate import norm_gate
from ..projection import naive as projection_naive
from ..projection import triton_op as projection_op
from ..sampled_softmax import dense as dense_softmax
from ..sampled_softmax import naive as gather_softmax
from ..sampled_softmax import triton_op as softmax_op
from .attention import attention_rows
from .timing import gradients, peak_of, timed

Row = dict[str, Any]


def _forward_backward(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> Row:
    """Time and memory of both passes of a function of tensors, through autograd."""
    device = tensors[0].device.type
    both, inputs = gradients(function, *tensors)
    timing = timed(both, inputs, device)
    return {"ms": timing.ms, "captured": timing.captured, "peak_bytes": peak_of(both, device)}


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

        found = _forward_backward(loss, states, table)
        rows.append({"implementation": name, "pass": "fwd+bwd", **shape, **found, "flops": flop, "bytes": least})
    return rows


def cross_entropy_rows(device: str, dim: int, dtype: str, items: int, tokens: int) -> list[Row]:
    """The loss of `tokens` states against all items, with a bias of items: in Triton, in torch, and in torch compiled.
    Operations are those of three products, of which the kernels do one twice."""
    states = torch.randn(tokens, dim, device=device, dtype=getattr(torch, dtype))
    table = torch.randn(items, dim, device=device, dtype=getattr(torch, dtype)) * dim**-0.5
    bias = torch.zeros(items, device=device, dtype=getattr(torch, dtype))
    targets = torch.randint(1, items, (tokens,), device=device)
    shape = {"dtype": dtype, "tokens": tokens, "items": items, "dim": dim}
    least = 2 * ((tokens + items) * dim + items) * states.element_size() + 8 * tokens
    torch.compiler.reset()
    functions: dict[str, Callable[..., torch.Tensor]] = {
        "ours": cross_entropy_op.linear_cross_entropy,
        "torch": cross_entropy_naive.linear_cross_entropy,
    }
    if device != "cpu":
        functions["torch, compiled"] = torch.compile(cross_entropy_naive.linear_cross_entropy, dynamic=False)
    rows = []
    for name, function in functions.items():

        def loss(
            x: torch.Tensor, vectors: torch.Tensor, offsets: torch.Tensor, f: Callable[..., torch.Tensor] = function
        ) -> torch.Tensor:
            return f(x, vectors, targets, offsets)

        found = _forward_backward(loss, states, table, bias)
        flop = 6.0 * tokens * items * dim
        rows.append({"implementation": name, "pass": "fwd+bwd", **shape, **found, "flops": flop, "bytes": least})
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
    (tokens, dim), dtype = inputs[0].shape, inputs[0].dtype
    size = inputs[0].numel() * inputs[0].element_size()
    large = sum(tensor.ndim == 2 for tensor in inputs)
    rows = []
    for name, function in (("ours", ours), ("torch", theirs)):
        rows.append(
            {"implementation": name, "pass": "fwd+bwd", "dtype": str(dtype)[6:], "tokens": tokens, "dim": dim}
            | _forward_backward(function, *inputs)
            | {"flops": None, "bytes": (3 * large + 2) * size}
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
        rows.append(
            {"implementation": name, "pass": "fwd+bwd", "dtype": dtype, "tokens": tokens, "dim": dim}
            | {"columns": columns, **_forward_backward(function, x, weight), "flops": flop, "bytes": least}
        )
    return rows


#: What measures a case of each operation: f(device, **sizes) -> rows with `ms`, `captured` (whether as a CUDA graph),
#: `flops`, `bytes` and `peak_bytes`, each of which may be None; or, where nothing could be measured, with `seen`.
OPERATIONS: dict[str, Callable[..., list[Row]]] = {
    "sampled_softmax": softmax_rows,
    "linear_cross_entropy": cross_entropy_rows,
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
    copy = 2 * source.numel() * 4 / (timed(lambda: target.copy_(source), [source], device).ms * 1e-3)
    a, b = torch.randn(2, product, product, device=device, dtype=torch.bfloat16)
    return copy, 2 * product**3 / (timed(lambda: a @ b, [a, b], device).ms * 1e-3)
