"""BERT4Rec's attention by FlashAttention is its attention of padded sequences."""

import itertools
from typing import Any

import pytest
import torch

from steps.models import bert4rec
from steps.models.bert4rec import BERT4Rec, flash_attention, padded_attention
from steps.training.stream import RunStream
from tests.kernels.tolerance import assert_no_worse
from tests.steps.test_models import make

LENGTHS, LONGEST, SCALE = [5, 0, 130, 1, 0, 64, 33, 0], 140, 0.3
HALF = 0.5  # a dropout that 8 bits have exactly


def offsets_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)])


def index_of(lengths: list[int], max_len: int) -> torch.Tensor:
    """Where each token is in the flattened padded batch."""
    return torch.cat([sequence * max_len + torch.arange(length) for sequence, length in enumerate(lengths)])


def inputs(dtype: torch.dtype, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """On the GPU: qkv with gradients, the offsets, the index, the output's gradient."""
    tokens = sum(LENGTHS)
    qkv = torch.randn(tokens, 3, 2, width).to("cuda", dtype).requires_grad_()
    gradient = torch.randn(tokens, 2, width).to("cuda", dtype)
    return qkv, offsets_of(LENGTHS).cuda(), index_of(LENGTHS, LONGEST).cuda(), gradient


def same_dropout(qkv: torch.Tensor, output: torch.Tensor, dqkv: torch.Tensor, gradient: torch.Tensor) -> bool:
    """Whether both passes dropped the same weights W: then output = W v, dv = W^T gradient and v.dv = output.gradient.

    Up to rounding. With other weights the two differ by about the root of the sum of squares.
    """
    terms = (output.double() * gradient).detach()
    difference = (qkv[:, 2].detach().double() * dqkv[:, 2]).sum() - terms.sum()
    return bool(difference.abs() < 0.03 * terms.square().sum().sqrt())


def test_flash_attention_is_called_as_its_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a loop in the place of torch's operation, which has no CPU version."""
    calls = []

    def loop(q: Any, k: Any, v: Any, offsets: Any, offsets_k: Any, *others: Any, scale: float) -> tuple[torch.Tensor]:
        assert offsets.dtype == offsets_k.dtype == torch.int32
        assert torch.equal(offsets, offsets_k)
        calls.append(others)
        parts = []
        for start, end in itertools.pairwise(offsets.tolist()):
            scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) * scale
            parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[start:end]))
        return (torch.cat(parts),)

    encoder, offsets = make("bert4rec").encoder, offsets_of(LENGTHS)
    assert isinstance(encoder, BERT4Rec)
    embeddings = torch.randn(sum(LENGTHS), 6, dtype=torch.float64, requires_grad=True)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", loop)
    found = []
    for fits in (False, True):
        monkeypatch.setattr(bert4rec, "_flash_fits", lambda *_, fits=fits: fits)
        states = encoder.states(embeddings, offsets, LONGEST)
        (gradient,) = torch.autograd.grad(states.square().sum(), embeddings)
        found.append((states, gradient))
    for padded, flash in zip(*found, strict=True):
        torch.testing.assert_close(flash, padded, rtol=0, atol=1e-9)
    encoder.train().states(embeddings, offsets, LONGEST)
    #                                 longest query and key, dropout, causal, debug mask
    assert calls == [(LONGEST, LONGEST, dropout, False, False) for dropout in (0.0, 0.0, 0.2, 0.2)]


def test_torch_has_flash_attention_with_these_arguments_and_its_gradient() -> None:
    """On the meta device, which knows sizes alone."""
    qkv = torch.zeros(sum(LENGTHS), 3, 2, 8, dtype=torch.bfloat16, device="meta", requires_grad=True)
    output = flash_attention(qkv, SCALE, HALF, offsets_of(LENGTHS).to("meta"), LONGEST)
    assert (output.shape, output.dtype) == ((sum(LENGTHS), 2, 8), torch.bfloat16)
    assert torch.autograd.grad(output.sum(), qkv)[0].shape == qkv.shape


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_flash_attention_is_taken_in_half_precision_on_a_gpu(device: str) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        qkv = torch.zeros(4, 3, 2, 8, dtype=dtype, device=device, requires_grad=True)
        assert bert4rec._flash_fits(qkv, 0.2) is (device == "cuda" and dtype.itemsize == 2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 16, 56, 64])
def test_flash_attention_is_attention_of_padded_sequences(dtype: torch.dtype, width: int) -> None:
    qkv, offsets, index, gradient = inputs(dtype, width)
    exact_qkv = qkv.detach().double().requires_grad_()
    results = []
    for output, x in (
        (flash_attention(qkv, SCALE, 0.0, offsets, LONGEST), qkv),
        (padded_attention(qkv, SCALE, 0.0, offsets, LONGEST, index), qkv),
        (padded_attention(exact_qkv, SCALE, 0.0, offsets, LONGEST, index), exact_qkv),
    ):
        (dqkv,) = torch.autograd.grad(output, x, gradient.to(x.dtype))
        results.append([output.detach(), *dqkv.unbind(1)])
    assert_no_worse(*results, ["output", "dq", "dk", "dv"])


@pytest.mark.gpu
def test_dropout_of_flash_attention_keeps_the_mean_and_is_that_of_its_gradient() -> None:
    qkv, offsets, index, gradient = inputs(torch.bfloat16, 32)
    exact = padded_attention(qkv.detach().double(), SCALE, 0.0, offsets, LONGEST, index)
    draws = []
    for _ in range(1000):
        output = flash_attention(qkv, SCALE, HALF, offsets, LONGEST)
        draws.append(output.detach())
    assert same_dropout(qkv, output, torch.autograd.grad(output, qkv, gradient)[0], gradient)
    deviation, mean = torch.std_mean(torch.stack(draws).double(), dim=0)
    assert ((mean - exact).abs() <= 6 * deviation / 1000**0.5).all()


@pytest.mark.gpu
def test_a_graph_of_flash_attention_draws_another_dropout_at_every_replay() -> None:
    qkv, offsets, _, gradient = inputs(torch.bfloat16, 32)
    stream = RunStream(torch.device("cuda"))

    def work() -> tuple[torch.Tensor, torch.Tensor]:
        output = flash_attention(qkv, SCALE, HALF, offsets, LONGEST)
        return output.detach(), torch.autograd.grad(output, qkv, gradient)[0]

    replays = []
    with stream.active():
        work()  # what only a first call does, and no capture allows
        graph, results = stream.capture(work)
        for seed in (1, None, 1):
            if seed is not None:
                torch.manual_seed(seed)
            graph.replay()
            replays.append([result.clone() for result in results])
    stream.wait()
    first, second, again = (output for output, _ in replays)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    for output, dqkv in replays:
        assert same_dropout(qkv, output, dqkv, gradient)
