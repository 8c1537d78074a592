"""Time our attention kernels, beside dense torch and what torch has for causal softmax."""

from typing import Any

import torch

from ..hstu_attention import naive
from ..hstu_attention.op import attention
from ..hstu_attention.op import gradients as attention_gradients
from .cases import attention_flops, attention_inputs, lengths_of
from .softmax import passes_of_others
from .timing import Call, gradients, peak_of, timed

Row = dict[str, Any]
_TENSORS = {"fwd": 4, "bwd": 7, "fwd+bwd": 11}  # of an output's size, that a pass reads or writes


def attention_rows(
    device: str, n: int, batch: int, heads: int, dqk: int, dv: int, bias: str, lengths: str, dtype: str
) -> list[Row]:
    """Ours, forward and backward, and the deterministic backward. Beside them, of ragged rows: both passes in one, and
    dense torch; of full rows without bias or with both: causal softmax, as `softmax` has it.

    `lengths` is full, every row of n tokens, or ragged, as MovieLens' are. Another mask is a further key of a case:
    its arguments belong into `attention_inputs`, its operations into `attention_flops`.
    """
    torch.manual_seed(0)
    sizes = lengths_of(batch, n, lengths == "ragged", device)
    inputs = attention_inputs(sizes, heads, dqk, dv, getattr(torch, dtype), bias)
    arguments = list(inputs.values())
    outputs = attention(*arguments)
    output = outputs[0]
    grad = torch.randn_like(output)
    forward_flops, backward_flops = attention_flops(sizes, heads, dqk, dv)
    flops = {"fwd": forward_flops, "bwd": backward_flops, "fwd+bwd": forward_flops + backward_flops}
    size = output.numel() * output.element_size()
    shape = {
        "dtype": dtype, "batch": batch, "heads": heads, "n": n, "dqk": dqk, "dv": dv, "lengths": lengths, "bias": bias,
    }  # fmt: skip
    rows: list[Row] = []

    def add(implementation: str, which: str, **measured: Any) -> None:
        counted = {} if "seen" in measured else {"flops": flops[which], "bytes": _TENSORS[which] * size}
        rows.append({"implementation": implementation, "pass": which, **shape, **counted, **measured})

    def measure(implementation: str, which: str, call: Call, depends_on: list[Any], captured: bool = True) -> None:
        timing = timed(call, depends_on, device, captured)
        add(implementation, which, **timing._asdict(), peak_bytes=peak_of(call, device))

    def forward() -> Any:
        return attention(*arguments)[0]

    def backward(deterministic: bool) -> Any:
        return attention_gradients(grad, outputs, arguments, deterministic)

    measure("ours", "fwd", forward, arguments)
    measure("ours", "bwd", lambda: backward(False), [*arguments, grad])
    measure("ours, deterministic", "bwd", lambda: backward(True), [*arguments, grad])
    if lengths == "ragged":
        names: list[str] = [name for name in ("q", "k", "v", "position_bias", "time_bias") if inputs[name] is not None]
        others: dict[str, Any] = {key: value for key, value in inputs.items() if key not in (*names, "softmax")}

        def dense(*tensors: torch.Tensor) -> torch.Tensor:
            return naive.hstu_attention(**(others | dict(zip(names, tensors, strict=True))))

        both, depends_on = gradients(dense, *(inputs[name] for name in names))
        measure("dense torch", "fwd+bwd", both, depends_on, captured=False)
        measure("ours", "fwd+bwd", lambda: (forward(), backward(False)), [*arguments, grad])
    elif dqk == dv and bias in ("none", "both"):
        for implementation, which, found in passes_of_others(inputs, batch, device):
            add(implementation, which, **found)
    return rows
