"""What stands beside our attention computes causal softmax attention with the same bias."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from kernels.hstu_attention import naive
from kernels.tools.cases import attention_inputs, lengths_of
from kernels.tools.softmax import FLEX, attempt, flex, passes_of_others, sdpa

BATCH, N, HEADS, DIM = 2, 160, 3, 16


def full(bias: str) -> dict[str, Any]:
    torch.manual_seed(0)
    return attention_inputs(lengths_of(BATCH, N, False, "cpu"), HEADS, DIM, DIM, torch.float64, bias)


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """(T, h, d) as (B, h, N, d)."""
    return torch.stack([tensor[N * b : N * (b + 1)].transpose(0, 1) for b in range(BATCH)])


def expected(inputs: dict[str, Any]) -> torch.Tensor:
    others = {key: value for key, value in inputs.items() if key not in ("softmax", "attention_scale")}
    return rows(naive.softmax_attention(**others))


def test_scaled_dot_product_attention_is_causal_softmax() -> None:
    inputs = full("none")
    q, k, v = (rows(inputs[name]) for name in "qkv")
    attend, depends_on = sdpa(q, k, v, inputs["alpha"], SDPBackend.FLASH_ATTENTION)
    assert len(depends_on) == 3
    torch.testing.assert_close(attend(), expected(inputs))


@pytest.mark.parametrize("bias", ["none", "both"])
def test_flex_attention_is_causal_softmax_with_our_bias(bias: str) -> None:
    inputs = full(bias)
    q, k, v = (rows(inputs[name]) for name in "qkv")
    # Tables of another size than the bias has in a benchmark, so that a wrong entry shows.
    tables = [50 * inputs[name].double() for name in ("position_bias", "time_bias") if inputs[name] is not None]
    inputs |= dict(zip(("position_bias", "time_bias"), tables, strict=False))
    attend, depends_on = flex(q, k, v, *tables, inputs=inputs, batch=BATCH, compiled=False)
    assert len(depends_on) == 3 + len(tables)
    torch.testing.assert_close(attend(), expected(inputs))


def test_what_does_not_run_is_told_with_its_versions() -> None:
    found = {(name, which): told for name, which, told in passes_of_others(full("none"), BATCH, "cpu")}
    assert set(found) == {
        (name, which) for name in ("cuDNN (sdpa)", "FlashAttention-2 (sdpa)", FLEX) for which in ("fwd", "bwd")
    }
    assert {found["FlashAttention-2 (sdpa)", which]["captured"] for which in ("fwd", "bwd")} == {None}
    seen = found[FLEX, "bwd"]["seen"]
    assert seen.startswith(f"torch {torch.__version__}, triton ")
    assert "NotImplementedError: FlexAttention does not support backward on CPU" in seen
    assert "\n" not in seen
    biased = list(passes_of_others(full("both"), BATCH, "cpu"))
    assert [(name, which) for name, which, _ in biased] == [(FLEX, "fwd"), (FLEX, "bwd")]


def test_of_a_compilers_trace_its_cause_is_told() -> None:
    def make() -> Any:
        raise RuntimeError(
            "it failed in a process:\nTraceback:\n  File a\nAssertionError: one element only\n\nOther: no"
        )

    assert attempt(make, "fwd", "cpu")["seen"].endswith(": AssertionError: one element only")
