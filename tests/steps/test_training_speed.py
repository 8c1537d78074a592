"""The profile of a training step: kernels find their part, and the floor counts what the mathematics needs."""

import pytest
import torch

from steps.studies.training_speed import by_part, full_sequences, least, longest, part_of


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("forward_kernel", "attention, forward"),
        ("projection_forward_kernel", "projection"),
        ("norm_gate_backward_kernel", "norms and gate"),
        ("layer_norm_forward_kernel", "norms and gate"),
        ("softmax_forward_kernel", "loss"),
        ("bias_gradient_kernel", "attention, bias gradients"),
        ("bwd_dkdv_kernel", "attention, backward"),
        ("hopper_backward_kernel", "attention, backward"),
        ("position_gradient_kernel", "attention, bias gradients"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "matrix products"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>", "element-wise and other"),
    ],
)
def test_kernels_find_their_part(kernel: str, part: str) -> None:
    assert part_of(kernel) == part


def test_parts_are_the_sums_of_their_kernels() -> None:
    kernels = {"bwd_dkdv_kernel": 2.0, "bwd_dq_kernel": 1.0, "add": 4.0}
    assert list(by_part(kernels).items()) == [("element-wise and other", 4.0), ("attention, backward", 3.0)]


def test_kernels_of_one_template_are_listed_as_their_sum() -> None:
    template = "void cutlass::Kernel<" + 90 * "x"
    kernels = {"gemm": 2.0, f"{template}float>": 1.5, f"{template}half>": 1.0} | {f"k{n}": 0.1 for n in range(40)}
    found = list(longest(kernels).values())
    assert found[:2] == [2.5, 2.0]
    assert len(found) == 25


@pytest.mark.parametrize("held_out", [1, 2])
def test_every_window_is_full(held_out: int) -> None:
    sequences = full_sequences(50, 6, 20, torch.device("cpu"))
    users = torch.arange(6)
    assert sequences.window_lengths(users, torch.full((6,), held_out), 20).tolist() == [20] * 6
    assert int(sequences.item.min()) >= 1
    assert int(sequences.item.max()) <= 50


def test_the_floor_of_one_layer_by_hand() -> None:
    config = {
        "model": {"heads": 2, "dqk": 3, "dv": 5, "dim": 7, "blocks": 1},
        "training": {"batch": 4, "max_len": 10, "negatives": 6},
    }
    found = least(config, items=8)
    # 40 tokens; uvqk has 2 (2 x 3 + 2 x 5) = 32 columns, attention's result 10; scores of 4 x 10 x 10 / 2 = 200 pairs.
    products = 3 * 2 * 40 * 7 * (32 + 10)
    attention = 3.5 * 2 * 2 * (3 + 5) * 200
    assert found["flops"] == products + attention + 3 * 2 * 40 * 7 * 7
    assert found["bytes"] == 40 * (2 * (8 * 32 + 4 * 10) + 24 * 7) + 28 * (9 * 7 + 7 * 42)
