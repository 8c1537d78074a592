"""Causal attention of jagged sequences: by a loop, by padding, and by FlashAttention."""

import itertools
import sys
from typing import Any

import pytest
import torch

from steps.data.sequences import Batch
from steps.models import attention
from steps.models.attention import CausalAttention, Layout, flash_attention, padded_attention
from steps.models.transformer_pp import cos_and_sin
from steps.tasks import Task
from steps.training.stream import RunStream
from tests.kernels.tolerance import assert_no_worse
from tests.steps.test_models import batch, make

RAGGED = [5, 0, 130, 1, 0, 64, 33, 0]
LENGTHS = {"ragged": RAGGED, "ones": [1] * 9, "full": [140] * 3, "one of many": [0, 0, 77, 0]}
LONGEST, HALF = 140, 0.5  # a dropout that 8 bits have exactly
ENCODERS = ["sasrec", "ligr", "transformer++"]


def layout_of(lengths: list[int], device: str = "cpu") -> Layout:
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], device=device)
    return Layout.of(offsets, sum(lengths), LONGEST)


def inputs(
    lengths: list[int], heads: int, width: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k and v, parts of one tensor as a product makes them, and the gradient of the output."""
    qkv = torch.randn(sum(lengths), 3, heads, width).to(device, dtype)
    gradient = torch.randn(sum(lengths), heads * width).to(device, dtype)
    return [part.requires_grad_() for part in qkv.unbind(1)], gradient


def by_loop(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, lengths: list[int]) -> torch.Tensor:
    """Token by token: (T, heads, width)."""
    rows = []
    for start, n in zip(itertools.accumulate([0, *lengths[:-1]]), lengths, strict=True):
        for token in range(start, start + n):
            scores = torch.einsum("hd,khd->hk", q[token], k[start : token + 1]) * scale
            rows.append(torch.einsum("hk,khd->hd", scores.softmax(-1), v[start : token + 1]))
    return torch.stack(rows)


def results(output: torch.Tensor, leaves: list[torch.Tensor], gradient: torch.Tensor) -> list[torch.Tensor]:
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient.to(output.dtype).view_as(output))]


def work_of(model: Task, data: Batch) -> list[torch.Tensor]:
    """The states of a batch, and the gradients of all that they are of."""
    states = model.encode(data)
    learned = [model.items.weight, *model.encoder.parameters()]
    return [states.detach(), *torch.autograd.grad(states.pow(3).mean(), learned)]


def moderate(name: str, dtype: torch.dtype, heads: int = 2, dim: int = 16) -> Task:
    """With weights as small as they start."""
    model = make(name, dtype, dim=dim, heads=heads)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.div_(3)
    return model


def assert_alike(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    """States, and gradients as they are to the largest: some are 0 but for rounding, such as that of keys' biases."""
    largest = max(float(gradient.abs().max()) for gradient in theirs[1:])
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-11 * float(theirs[0].abs().max()))
    for one, other in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11 * largest)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(("heads", "width"), [(1, 5), (2, 8)])
def test_on_padded_rows_it_is_a_loop_over_tokens(heads: int, width: int, lengths: list[int]) -> None:
    """So no token sees a later one, nor one of another sequence, nor padding."""
    qkv, gradient = inputs(lengths, heads, width, torch.float64)
    ours = CausalAttention(0.3).eval()(*qkv, layout_of(lengths))
    assert ours.shape == (sum(lengths), heads * width)
    expected = by_loop(*qkv, width**-0.5, lengths)
    for one, other in zip(results(ours, qkv, gradient), results(expected.flatten(1), qkv, gradient), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_a_token_changes_no_earlier_output_and_no_other_sequence() -> None:
    qkv, _ = inputs(RAGGED, 2, 8, torch.float64)
    before = CausalAttention(0.0)(*qkv, layout_of(RAGGED))
    changed = [part.detach().clone() for part in qkv]
    for part in changed:
        part[70] += 1  # of the third sequence, 5 to 134
    after = CausalAttention(0.0)(*changed, layout_of(RAGGED))
    assert torch.equal(before[:70], after[:70])
    assert torch.equal(before[135:], after[135:])
    assert not torch.isclose(before[70:135], after[70:135]).all(dim=1).any()


def test_weights_are_dropped_in_training_alone() -> None:
    (q, k, _), _ = inputs([140], 1, 8, torch.float64)
    ones, layout, causal = torch.ones_like(q), layout_of([140]), CausalAttention(0.25)
    torch.testing.assert_close(causal.eval()(q, k, ones, layout), ones.flatten(1))
    sums = causal.train()(q, k, ones, layout)[:, 0]
    assert set(sums[:1].detach().tolist()) <= {0.0, 1 / 0.75}  # of the first token, which has one weight
    assert 0.8 < sums.mean() < 1.2
    assert sums.std() > 0.02


@pytest.mark.parametrize("width", [5, 8, 50])
def test_flash_attention_is_called_as_its_twin(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a loop in the place of torch's operation, which has no CPU version."""
    calls = []

    def loop(q: Any, k: Any, v: Any, offsets: Any, offsets_k: Any, *others: Any, scale: float) -> tuple[torch.Tensor]:
        assert offsets.dtype == torch.int32
        assert offsets_k is offsets
        for part in (q, k, v):  # what it reads 16 bytes at a time
            assert part.shape[-1] % 8 == part.stride(0) % 8 == part.stride(1) % 8 == part.storage_offset() % 8 == 0
            assert part.stride(-1) == 1
        calls.append((q, *others))
        return (by_loop(q, k, v, scale, offsets.diff().tolist()),)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", loop)
    qkv, gradient = inputs(RAGGED, 2, width, torch.float64)
    found = []
    for fits in (False, True):
        monkeypatch.setattr(attention, "flash_fits", lambda *_, fits=fits: fits)
        found.append(results(CausalAttention(0.2).eval()(*qkv, layout_of(RAGGED)), qkv, gradient))
    for padded, flash in zip(*found, strict=True):
        torch.testing.assert_close(flash, padded, rtol=0, atol=1e-12)
    CausalAttention(0.2)(*qkv, layout_of(RAGGED))
    #                                     longest query and key, dropout, causal, debug mask
    assert [others for _, *others in calls] == [[LONGEST, LONGEST, dropout, True, False] for dropout in (0.0, 0.2)]
    assert (calls[0][0] is qkv[0]) == (width == 8)  # not copied


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_take_both_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def loop(q: Any, k: Any, v: Any, offsets: Any, _: Any, *__: Any, scale: float) -> tuple[torch.Tensor]:
        return (by_loop(q, k, v, scale, offsets.diff().tolist()),)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", loop)
    model, data = moderate(name, torch.float64), batch([5, 20, 2])
    padded = work_of(model, data)
    monkeypatch.setattr(attention, "flash_fits", lambda *_: True)
    assert_alike(work_of(model, data), padded)


@pytest.mark.parametrize(("dim", "heads"), [(64, 2), (50, 1), (50, 2)])
@pytest.mark.parametrize(("name", "dropout"), [("sasrec", 0.2), ("ligr", 0.2), ("transformer++", 0.0)])
def test_encoders_hand_flash_attention_half_precision(
    name: str, dropout: float, dim: int, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In rows that begin at 16 bytes, whichever product they come out of, in training."""
    calls, data = [], batch([5, 20, 2])

    def record(q: Any, k: Any, v: Any, offsets: Any, offsets_k: Any, *others: Any, scale: float) -> tuple[torch.Tensor]:
        assert offsets.dtype == offsets_k.dtype == torch.int32  # torch refuses those of a batch, which are int64
        assert offsets.tolist() == offsets_k.tolist() == data.offsets.tolist()
        for part in (q, k, v):
            assert part.dtype == torch.bfloat16
            assert part.shape[-1] % 8 == part.stride(0) % 8 == part.stride(1) % 8 == part.storage_offset() % 8 == 0
            assert part.stride(-1) == 1
        calls.append((scale, *others))
        return (q * 0.5 + k + v,)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", record)
    monkeypatch.setattr(attention, "flash_fits", lambda *_: True)
    model = moderate(name, torch.float32, heads, dim).train()
    model.encoder.compute_dtype = torch.bfloat16
    for tensor in work_of(model, data):
        assert tensor.isfinite().all()
        assert tensor.dtype == torch.float32
    #                                         longest query and key, dropout, causal, debug mask
    assert calls == [((dim // heads) ** -0.5, data.max_len, data.max_len, dropout, True, False)] * 2


def test_torch_is_asked_for_what_flash_attention_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer queries than keys, as of BERT4Rec's last block; as one sequence, in torch's order of dimensions."""
    asked = []
    monkeypatch.setattr(attention, "can_use_flash_attention", lambda params: bool(asked.append(params)) or True)
    q, k = torch.zeros(3, 2, 8), torch.zeros(7, 2, 8)
    assert attention.flash_fits(q, k, k, 0.2)
    (params,) = asked
    shapes = [tuple(part.shape) for part in (params.query, params.key, params.value)]
    assert shapes == [(1, 2, 3, 8), (1, 2, 7, 8), (1, 2, 7, 8)]  # (batch, heads, tokens, width)
    assert (params.attn_mask, params.dropout) == (None, 0.2)


def test_torch_has_causal_flash_attention_with_these_arguments_and_its_gradient() -> None:
    """On the meta device, which knows sizes alone; q, k and v are parts of one tensor."""
    qkv, gradient = inputs(RAGGED, 2, 16, torch.bfloat16, "meta")
    offsets = torch.zeros(len(RAGGED) + 1, dtype=torch.int32, device="meta")
    layout = Layout(offsets, offsets, offsets, LONGEST, offsets)
    output = flash_attention(*qkv, 0.25, HALF, layout, is_causal=True)
    assert (output.shape, output.dtype) == (qkv[0].shape, torch.bfloat16)
    for x, found in zip(qkv, results(output, qkv, gradient)[1:], strict=True):
        assert found.shape == x.shape


def test_angles_are_positions_times_frequencies_in_float32_at_least() -> None:
    position = torch.tensor([0, 1, 256, 257])
    for dtype, atol in ((torch.float32, 1e-4), (torch.float64, 1e-12)):
        cos, sin = cos_and_sin(position, 6, dtype)
        angle = position.double()[:, None] * 10_000 ** (-torch.arange(3).double() / 3)
        assert cos.dtype == sin.dtype == dtype
        torch.testing.assert_close(cos.double(), angle.cos(), rtol=0, atol=atol)
        torch.testing.assert_close(sin.double(), angle.sin(), rtol=0, atol=atol)


@pytest.mark.parametrize("name", ENCODERS)
def test_each_encoder_has_attention_left_out_of_what_is_compiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked of each, since in a process one encoder leaves it out for all: they share its class."""
    calls: list[Any] = []
    encoder = make(name).encoder
    monkeypatch.setattr(sys.modules[type(encoder).__module__], "compile_without", lambda *owner: calls.append(owner))
    encoder.before_compiling()
    assert calls == [(CausalAttention, "forward")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
def test_compiled_blocks_are_the_blocks(name: str) -> None:
    """Of batches of several sizes, by one compilation."""
    model = moderate(name, torch.float64)
    batches = [batch(lengths) for lengths in ([5, 20, 2], [9, 33], [40, 3, 4, 17])]
    plain = [work_of(model, data) for data in batches]
    torch.compiler.reset()
    model.compile_blocks()
    for data, expected in zip(batches, plain, strict=True):
        assert_alike(work_of(model, data), expected)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 50, 64, 256])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_flash_attention_is_attention_of_padded_sequences(lengths: list[int], width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    qkv, gradient = inputs(lengths, 2, width, dtype, "cuda")
    exact, layout = [x.detach().double().requires_grad_() for x in qkv], layout_of(lengths, "cuda")
    assert attention.flash_fits(*qkv, 0.0)
    found = [results(CausalAttention(0.0)(*qkv, layout), qkv, gradient)]
    for leaves in (qkv, exact):
        output = padded_attention(*leaves, None, 0.0, layout, is_causal=True).flatten(1)
        found.append(results(output, leaves, gradient))
    assert_no_worse(*found, ["output", "dq", "dk", "dv"])


@pytest.mark.gpu
def test_dropout_keeps_the_mean_and_a_graph_draws_another_at_every_replay() -> None:
    qkv, gradient = inputs(RAGGED, 2, 32, torch.bfloat16, "cuda")
    layout, causal = layout_of(RAGGED, "cuda"), CausalAttention(HALF)
    exact = CausalAttention(0.0)(*(x.detach().double() for x in qkv), layout)
    stream = RunStream(torch.device("cuda"))

    def work() -> list[torch.Tensor]:
        return results(causal(*qkv, layout), qkv, gradient)

    draws, replays = [], []
    with stream.active():
        work()  # what only a first call does, and no capture allows
        graph, captured = stream.capture(work)
        for seed in (1, None, 1):
            if seed is not None:
                torch.manual_seed(seed)
            graph.replay()
            replays.append([tensor.clone() for tensor in captured])
        for _ in range(1000):
            graph.replay()
            draws.append(captured[0].clone())
    stream.wait()
    assert torch.equal(replays[0][0], replays[2][0])
    assert not torch.equal(replays[0][0], replays[1][0])
    for output, _, _, dv in replays:  # both passes drop the same weights W: output = W v, dv = W^T gradient
        terms = output.double() * gradient
        difference = (qkv[2].detach().double() * dv).sum() - terms.sum()
        assert difference.abs() < 0.03 * terms.square().sum().sqrt()
    deviation, mean = torch.std_mean(torch.stack(draws).double(), dim=0)
    assert ((mean - exact).abs() <= 6 * deviation / 1000**0.5 + 1e-2).all()


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_in_half_precision_is_near_one_on_padded_rows(
    name: str, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With heads of 50 and of 25, which FlashAttention takes with zeros; in a graph, as training does."""
    model, data, calls = moderate(name, torch.float32, heads, 50).cuda(), batch([5, 150, 2, 33]), []
    tensors = {key: part.cuda() for key, part in vars(data).items() if isinstance(part, torch.Tensor)}
    data = Batch(**vars(data) | tensors)
    model.encoder.compute_dtype = torch.bfloat16
    flash, stream = flash_attention, RunStream(torch.device("cuda"))
    monkeypatch.setattr(attention, "flash_attention", lambda *args, **kw: calls.append(1) or flash(*args, **kw))

    with stream.active():
        work_of(model, data)
        graph, ours = stream.capture(lambda: work_of(model, data))
        graph.replay()
    stream.wait()
    assert len(calls) == 2 * 2  # blocks
    monkeypatch.setattr(attention, "flash_fits", lambda *_: False)
    low = work_of(model, data)
    model.encoder.compute_dtype = None
    exact = work_of(model, data)
    largest = max(float(gradient.abs().max()) for gradient in exact[1:])
    for one, padded, other in zip(ours, low, exact, strict=True):
        error, allowed = float((one - other).norm()), float((padded - other).norm())
        assert one.isfinite().all()
        assert error <= 2 * allowed + 0.01 * min(largest, float(other.abs().max())) * other.numel() ** 0.5
