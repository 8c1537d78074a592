"""BERT4Rec's attention by FlashAttention is its attention of padded sequences."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from steps.models import bert4rec
from steps.models.attention import Layout, flash_attention, padded_attention
from steps.models.bert4rec import BERT4Rec, BERTBlock
from steps.training.stream import RunStream
from tests.kernels.tolerance import assert_no_worse
from tests.steps.test_models import make

LENGTHS, LONGEST, SCALE = [5, 0, 130, 1, 0, 64, 33, 0], 140, 0.3
# Of the first sequence its last token, of the third all, of the fourth its only one, of the sixth every third, of the
# seventh none.
WANTED = [4, *range(5, 135), 135, *range(136, 200, 3)]
HALF = 0.5  # a dropout that 8 bits have exactly


def offsets_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)])


def layout_of(lengths: list[int], max_len: int, wanted: list[int] | None = None) -> Layout:
    layout = Layout.of(offsets_of(lengths), sum(lengths), max_len)
    return layout if wanted is None else layout.of_queries(torch.tensor(wanted))


def moved(layout: Layout, device: str) -> Layout:
    tensors = {key: part.to(device) for key, part in vars(layout).items() if isinstance(part, torch.Tensor)}
    return replace(layout, **tensors)


def inputs(
    dtype: torch.dtype, width: int, wanted: list[int] | None = None
) -> tuple[list[torch.Tensor], Layout, torch.Tensor]:
    """On the GPU: q, k and v with gradients, the layout, the output's gradient."""
    tokens = sum(LENGTHS)
    queries = tokens if wanted is None else len(wanted)
    qkv = [torch.randn(rows, 2, width).to("cuda", dtype).requires_grad_() for rows in (queries, tokens, tokens)]
    layout = layout_of(LENGTHS, LONGEST, wanted)
    return qkv, moved(layout, "cuda"), torch.randn(queries, 2, width).to("cuda", dtype)


def same_dropout(v: torch.Tensor, output: torch.Tensor, dv: torch.Tensor, gradient: torch.Tensor) -> bool:
    """Whether both passes dropped the same weights W: then output = W v, dv = W^T gradient and v.dv = output.gradient.

    Up to rounding. With other weights the two differ by about the root of the sum of squares.
    """
    terms = (output.double() * gradient).detach()
    difference = (v.detach().double() * dv).sum() - terms.sum()
    return bool(difference.abs() < 0.03 * terms.square().sum().sqrt())


@pytest.mark.parametrize("blocks", [1, 2])
def test_states_of_wanted_tokens_are_those_of_all(blocks: int) -> None:
    """In values and gradients. The gradient of some of the wanted states is 0, as where the target is padding."""
    encoder, wanted = make("bert4rec", blocks=blocks).encoder, torch.tensor(WANTED)
    assert isinstance(encoder, BERT4Rec)
    embeddings = torch.randn(sum(LENGTHS), 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(len(wanted), 6, dtype=torch.float64)
    weight[::5] = 0
    found = []
    for states in (
        encoder.states(embeddings, layout_of(LENGTHS, LONGEST, WANTED)),
        encoder.states(embeddings, layout_of(LENGTHS, LONGEST)).index_select(0, wanted),
    ):
        found.append([states, *torch.autograd.grad((states * weight).sum(), [embeddings, *encoder.parameters()])])
    for ours, whole in zip(*found, strict=True):
        torch.testing.assert_close(ours, whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize("wanted", [None, WANTED])
@pytest.mark.parametrize(("dim", "heads"), [(6, 2), (16, 2), (50, 1)])
def test_a_block_with_padded_heads_is_one_without(dim: int, heads: int, wanted: list[int] | None) -> None:
    block = BERTBlock(dim, heads, 0.0).double()
    x = torch.randn(sum(LENGTHS), dim, dtype=torch.float64, requires_grad=True)
    parts = []
    for sequence in block.qkv(x).unflatten(-1, (3, heads, -1)).transpose(0, 2).split(LENGTHS, dim=2):
        parts.append(F.scaled_dot_product_attention(*sequence.unbind(1)).transpose(0, 1).flatten(1))
    whole = block.attention_norm(x + block.output(torch.cat(parts)))
    whole = block.feed_forward_norm(whole + block.outer(F.gelu(block.inner(whole))))
    found = []
    for states in (block(x, layout_of(LENGTHS, LONGEST, wanted)), whole if wanted is None else whole[wanted]):
        found.append([states, *torch.autograd.grad(states.pow(3).sum(), [x, *block.parameters()])])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("wanted", [None, WANTED])
def test_flash_attention_is_called_as_its_twin(wanted: list[int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a loop in the place of torch's operation, which has no CPU version."""
    calls = []

    def loop(q: Any, k: Any, v: Any, offsets: Any, offsets_k: Any, *others: Any, scale: float) -> tuple[torch.Tensor]:
        assert offsets.dtype == offsets_k.dtype == torch.int32
        assert (int(offsets[-1]), int(offsets_k[-1])) == (len(q), len(k))
        calls.append(others)
        parts = []
        for query, key in zip(*(itertools.pairwise(x.tolist()) for x in (offsets, offsets_k)), strict=True):
            queries, keys = slice(*query), slice(*key)
            scores = torch.einsum("qhd,khd->hqk", q[queries], k[keys]) * scale
            parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[keys]))
        return (torch.cat(parts),)

    encoder, layout = make("bert4rec").encoder, layout_of(LENGTHS, LONGEST, wanted)
    assert isinstance(encoder, BERT4Rec)
    embeddings = torch.randn(sum(LENGTHS), 6, dtype=torch.float64, requires_grad=True)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", loop)
    found = []
    for fits in (False, True):
        monkeypatch.setattr(bert4rec, "flash_fits", lambda *_, fits=fits: fits)
        states = encoder.states(embeddings, layout)
        (gradient,) = torch.autograd.grad(states.square().sum(), embeddings)
        found.append((states, gradient))
    for padded, flash in zip(*found, strict=True):
        torch.testing.assert_close(flash, padded, rtol=0, atol=1e-9)
    encoder.train().states(embeddings, layout)
    #                                 longest query and key, dropout, causal, debug mask
    assert calls == [(LONGEST, LONGEST, dropout, False, False) for dropout in (0.0, 0.0, 0.2, 0.2)]


def test_torch_has_flash_attention_with_these_arguments_and_its_gradient() -> None:
    """On the meta device, which knows sizes alone."""
    layout = layout_of(LENGTHS, LONGEST, WANTED)
    on_meta = moved(layout, "meta")
    q, k, v = (
        torch.zeros(rows, 2, 8, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for rows in (len(WANTED), sum(LENGTHS), sum(LENGTHS))
    )
    output = flash_attention(q, k, v, SCALE, HALF, on_meta)
    assert (output.shape, output.dtype) == (q.shape, torch.bfloat16)
    for x, gradient in zip((q, k, v), torch.autograd.grad(output.sum(), (q, k, v)), strict=True):
        assert gradient.shape == x.shape


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_flash_attention_is_taken_in_half_precision_on_a_gpu(device: str) -> None:
    for dtype, queries in itertools.product((torch.float16, torch.bfloat16, torch.float32, torch.float64), (4, 2)):
        q, k = (torch.zeros(rows, 2, 8, dtype=dtype, device=device, requires_grad=True) for rows in (queries, 4))
        assert bert4rec.flash_fits(q, k, k, 0.2) is (device == "cuda" and dtype.itemsize == 2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 16, 56, 64])
@pytest.mark.parametrize("wanted", [None, WANTED, [4, 134, 135, 199, 232]])
def test_flash_attention_is_attention_of_padded_sequences(
    dtype: torch.dtype, width: int, wanted: list[int] | None
) -> None:
    qkv, layout, gradient = inputs(dtype, width, wanted)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    results = []
    for attention, arguments in ((flash_attention, qkv), (padded_attention, qkv), (padded_attention, exact)):
        output = attention(*arguments, SCALE, 0.0, layout)
        results.append([output.detach(), *torch.autograd.grad(output, arguments, gradient.to(output.dtype))])
    assert_no_worse(*results, ["output", "dq", "dk", "dv"])


@pytest.mark.gpu
def test_dropout_of_flash_attention_keeps_the_mean_and_is_that_of_its_gradient() -> None:
    qkv, layout, gradient = inputs(torch.bfloat16, 32)
    exact = padded_attention(*(x.detach().double() for x in qkv), SCALE, 0.0, layout)
    draws = []
    for _ in range(1000):
        output = flash_attention(*qkv, SCALE, HALF, layout)
        draws.append(output.detach())
    assert same_dropout(qkv[2], output, torch.autograd.grad(output, qkv[2], gradient)[0], gradient)
    deviation, mean = torch.std_mean(torch.stack(draws).double(), dim=0)
    assert ((mean - exact).abs() <= 6 * deviation / 1000**0.5).all()


@pytest.mark.gpu
@pytest.mark.parametrize("wanted", [None, WANTED])
def test_a_graph_of_flash_attention_draws_another_dropout_at_every_replay(wanted: list[int] | None) -> None:
    qkv, layout, gradient = inputs(torch.bfloat16, 32, wanted)
    stream = RunStream(torch.device("cuda"))

    def work() -> tuple[torch.Tensor, torch.Tensor]:
        output = flash_attention(*qkv, SCALE, HALF, layout)
        return output.detach(), torch.autograd.grad(output, qkv[2], gradient)[0]

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
    for output, dv in replays:
        assert same_dropout(qkv[2], output, dv, gradient)


@pytest.mark.gpu
def test_a_graph_of_wanted_states_follows_what_is_wanted() -> None:
    """With other windows and wanted tokens a replay has the states and gradients of the whole computation."""
    encoder = make("bert4rec", torch.float32).cuda().encoder
    assert isinstance(encoder, BERT4Rec)
    encoder.compute_dtype = torch.bfloat16
    embeddings = torch.randn(sum(LENGTHS), 6, device="cuda", requires_grad=True)
    offsets, wanted = offsets_of(LENGTHS).cuda(), torch.tensor(WANTED, device="cuda")
    weight = torch.randn(len(WANTED), 6, device="cuda")
    weight[::5] = 0
    stream = RunStream(torch.device("cuda"))

    def work() -> tuple[torch.Tensor, torch.Tensor]:
        layout = Layout.of(offsets, len(embeddings), LONGEST).of_queries(wanted)
        states = encoder.states(embeddings, layout)
        return states.detach(), torch.autograd.grad((states * weight).sum(), embeddings)[0]

    with stream.active():
        work()
        graph, results = stream.capture(work)
        offsets.copy_(offsets_of(LENGTHS[::-1]))
        wanted.copy_(torch.arange(sum(LENGTHS) - len(WANTED), sum(LENGTHS)))
        graph.replay()
        states = encoder.states(embeddings, Layout.of(offsets, len(embeddings), LONGEST)).index_select(0, wanted)
        (gradient,) = torch.autograd.grad((states * weight).sum(), embeddings)
    stream.wait()
    for ours, whole in zip(results, (states.detach(), gradient), strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, whole, rtol=0, atol=0.03 * float(whole.abs().max()))
