"""Sampled softmax: its definition in loops, its three implementations, its limit."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.sampled_softmax import dense, naive, sampled_softmax

triton_op = pytest.importorskip("kernels.sampled_softmax.triton_op", exc_type=ImportError)

TEMPERATURE = 0.05
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


def inputs(tokens: int = 9, items: int = 12, negatives: int = 5, dim: int = 4):
    torch.manual_seed(tokens)
    states = torch.randn(tokens, dim, dtype=torch.float64)
    table = torch.randn(items, dim, dtype=torch.float64)
    positives = torch.randint(0, items, (tokens,))
    drawn = torch.randint(0, items, (tokens, negatives))
    drawn[0] = positives[0]  # every negative collides
    drawn[1, 0] = drawn[1, 1]  # one drawn twice counts twice
    return states, table, positives, drawn


@pytest.mark.parametrize("implementation", [dense, naive])
def test_values_equal_the_definition(implementation) -> None:
    states, table, positives, negatives = inputs()
    losses = implementation.sampled_softmax(states, table, positives, negatives, TEMPERATURE)
    for token in range(len(states)):

        def score(item: int, token: int = token) -> float:
            a, b = states[token], table[item]
            return float(a @ b) / max(float(a.norm()), 1e-6) / max(float(b.norm()), 1e-6) / TEMPERATURE

        positive = score(int(positives[token]))
        others = [score(int(item)) for item in negatives[token] if item != positives[token]]
        expected = math.log(math.exp(positive) + sum(map(math.exp, others))) - positive
        assert float(losses[token]) == pytest.approx(expected, abs=1e-9)
    assert losses[0] == 0  # nothing but collisions is left out entirely


def test_both_implementations_have_the_same_gradients() -> None:
    states, table, positives, negatives = inputs(tokens=20)
    states.requires_grad_()
    table.requires_grad_()
    weight = torch.randn(20, dtype=torch.float64)
    gradients = []
    for implementation in (dense, naive):
        losses = implementation.sampled_softmax(states, table, positives, negatives, TEMPERATURE)
        gradients.append(torch.autograd.grad((losses * weight).sum(), [states, table]))
    for ours, twin in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, twin, rtol=0, atol=1e-10)


def test_with_every_item_as_a_negative_it_is_the_full_softmax() -> None:
    states, table, positives, _ = inputs()
    everything = torch.arange(len(table)).expand(len(states), -1)
    logits = F.normalize(states, dim=-1) @ F.normalize(table, dim=-1).T / TEMPERATURE
    expected = F.cross_entropy(logits, positives, reduction="none")
    torch.testing.assert_close(sampled_softmax(states, table, positives, everything, TEMPERATURE), expected)


def test_the_dispatch_follows_the_catalogue_size(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr(dense, "sampled_softmax", lambda *_: used.append("dense"))
    monkeypatch.setattr(naive, "sampled_softmax", lambda *_: used.append("naive"))
    for items in (320, 321):
        sampled_softmax(torch.zeros(1, 2), torch.zeros(items, 2), torch.zeros(1), torch.zeros(1, 5), TEMPERATURE)
    assert used == ["dense", "naive"]


def test_what_fits_goes_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.sampled_softmax.fits_triton", lambda *_: True)
    monkeypatch.setattr(triton_op, "sampled_softmax", lambda *arguments: arguments)
    arguments = (*inputs(), TEMPERATURE, None)
    assert sampled_softmax(*arguments) == arguments


def draws(
    tokens: int, negatives: int, items: int, dim: int, dtype: torch.dtype = torch.float32, popular: float = 0.0
) -> list[torch.Tensor]:
    """States, table, positives, negatives; item 0 takes the share `popular` of all draws, the rest is uniform."""
    torch.manual_seed(1000 * tokens + dim)
    drawn = torch.randint(0, items, (tokens, 1 + negatives)) * (torch.rand(tokens, 1 + negatives) >= popular)
    vectors = [torch.randn(rows, dim).to(DEVICE, dtype) for rows in (tokens, items)]
    return [*vectors, drawn[:, 0].to(DEVICE), drawn[:, 1:].to(DEVICE)]


def results(
    implementation, states, table, positives, negatives, log_frequency: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """The losses, and the gradients of states and table of their weighted sum."""
    leaves = [x.detach().requires_grad_() for x in (states, table)]
    losses = implementation.sampled_softmax(*leaves, positives, negatives, TEMPERATURE, log_frequency)
    weight = torch.arange(len(states), device=DEVICE) % 4 - 1  # exact in every type
    return [losses.detach(), *torch.autograd.grad((losses * weight).sum(), leaves)]


def assert_as_exact_as_naive(
    states: torch.Tensor, table: torch.Tensor, *indices: torch.Tensor, log_frequency: torch.Tensor | None = None
) -> None:
    """The error against float64 is at most twice that of `naive` in the same type, up to a few roundings.

    A logit, at most 1 / temperature, is rounded in float32 about twice (cosine, division); what that does to
    the loss is absolute, to gradients relative. Gradients are rounded once more, to their type.
    """
    doubles = [None if x is None else x.double() for x in (states, table, log_frequency)]
    exact = results(naive, *doubles[:2], *indices, doubles[2])
    plain = results(naive, states, table, *indices, log_frequency)
    fused = results(triton_op, states, table, *indices, log_frequency)
    assert [x.dtype for x in fused] == [torch.float32, states.dtype, table.dtype]
    logit = 2 * torch.finfo(torch.float32).eps / TEMPERATURE
    for ours, theirs, truth in zip(fused, plain, exact, strict=True):
        assert ours.shape == truth.shape
        if truth.numel():
            error, allowed = ((x.double() - truth).abs().max() for x in (ours, theirs))
            rounding = logit if truth.dim() == 1 else (logit + torch.finfo(ours.dtype).eps / 2) * truth.abs().max()
            assert error <= 2 * allowed + rounding


def use_blocks(monkeypatch: pytest.MonkeyPatch, negatives: int, drawn: int, chunk: int) -> None:
    """Blocks so small that a few tokens need several of every kind."""
    rows = {
        "sampled_softmax_norms": {"block_items": 4, "num_warps": 1},
        "sampled_softmax_forward": {"block_negatives": negatives, "num_warps": 1},
        "sampled_softmax_table": {"block_draws": drawn, "chunk": chunk, "num_warps": 1},
    }
    monkeypatch.setattr(triton_op, "configuration", lambda operation, *_: rows[operation])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("tokens", "negatives", "items", "dim", "popular"),
    [
        (23, 9, 12, 40, 0.0),  # items drawn twice, negatives that are the positive
        (5, 3, 300, 8, 0.0),
        (40, 9, 6, 17, 0.9),  # 360 draws of one item
        (4, 0, 7, 9, 0.0),  # no negative
        (0, 3, 5, 8, 0.0),  # no token
        (3, 1, 1, 16, 0.0),  # no item but the positive
    ],
)
def test_triton_is_as_exact_as_torch(tokens, negatives, items, dim, popular, dtype) -> None:
    assert_as_exact_as_naive(*draws(tokens, negatives, items, dim, dtype, popular))


@settings(max_examples=15, deadline=None)
@given(
    tokens=st.integers(1, 24),
    negatives=st.integers(0, 9),
    items=st.integers(1, 12),
    dim=st.integers(8, 40),
    popular=st.sampled_from([0.0, 0.5, 0.95]),
    blocks=st.tuples(st.sampled_from([2, 4]), st.sampled_from([2, 8]), st.sampled_from([1, 3, 8])),
    corrected=st.booleans(),
    dtype=st.sampled_from(TYPES),
)
def test_triton_with_many_blocks_and_chunks(tokens, negatives, items, dim, popular, blocks, corrected, dtype) -> None:
    arguments = draws(tokens, negatives, items, dim, dtype, popular)
    log_frequency = torch.linspace(-6, 0, items).to(DEVICE, dtype) if corrected else None
    with pytest.MonkeyPatch.context() as patch:
        use_blocks(patch, *blocks)
        assert_as_exact_as_naive(*arguments, log_frequency=log_frequency)


def test_triton_has_the_gradients_of_vectors_too_short_to_normalise() -> None:
    states, table, *indices = draws(12, 5, 6, 10)
    for vectors in (states, table):
        vectors[0] = 0
        vectors[1] *= 1e-8
    exact = results(naive, states.double(), table.double(), *indices)
    for ours, truth in zip(results(triton_op, states, table, *indices), exact, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-4)


def test_triton_takes_types_and_layouts_as_they_come() -> None:
    states, table, positives, negatives = draws(10, 5, 6, 20)
    states = states.half()
    expected = results(triton_op, states.float(), table, positives, negatives)
    wide = torch.cat([states, states], dim=1)[:, :20]
    actual = results(triton_op, wide, table.T.contiguous().T, positives, negatives.T.contiguous().T)
    for ours, truth, dtype in zip(actual, expected, [torch.float32, torch.float16, torch.float32], strict=True):
        assert torch.equal(ours, truth.to(dtype))


def test_triton_repeats_bit_by_bit_and_leaves_what_is_not_drawn_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    use_blocks(monkeypatch, 4, 4, 8)
    states, table, *indices = draws(20, 7, 5, 12, popular=0.5)
    table = torch.cat([table, table])  # rows 5 to 9 are never drawn
    first, second = (results(triton_op, states, table, *indices) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert not first[2][5:].any()


def test_the_operators_are_registered_for_compilation() -> None:
    states, table, *indices = draws(4, 3, 5, 8)
    states.requires_grad_()
    table.requires_grad_()
    # Not test_aot_dispatch: it takes gradients of all outputs, of which all but the losses have none.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(triton_op._forward, (states, table, *indices, TEMPERATURE, None), test_utils=checks)
    saved = torch.ops.hstu.sampled_softmax_forward(states, table, *indices, TEMPERATURE, None)[1:4]
    arguments = [x.detach() for x in (states, table, *indices, *saved)]
    torch.library.opcheck(triton_op._table_gradient, arguments)


def test_compiled_it_has_the_same_gradients() -> None:
    arguments = draws(4, 3, 5, 8)
    compiled = SimpleNamespace(
        sampled_softmax=torch.compile(triton_op.sampled_softmax, fullgraph=True, backend="aot_eager")
    )
    for ours, eager in zip(results(compiled, *arguments), results(triton_op, *arguments), strict=True):
        assert torch.equal(ours, eager)


@pytest.mark.parametrize("of", [0, 1], ids=["states", "table"])
def test_a_second_derivative_is_refused(of: int) -> None:
    *leaves, positives, negatives = draws(4, 3, 5, 8)
    for leaf in leaves:
        leaf.requires_grad_()
    losses = triton_op.sampled_softmax(*leaves, positives, negatives, TEMPERATURE)
    (first,) = torch.autograd.grad(losses.sum(), leaves[of], create_graph=True)
    with pytest.raises(RuntimeError, match=r"first derivatives only|no autograd formula"):
        torch.autograd.grad(first.square().sum(), leaves)


def test_shapes_that_do_not_match_are_refused() -> None:
    states, table, positives, negatives = inputs()
    for arguments, message in (
        ((states[:, 1:], table, positives, negatives), "states and table"),
        ((states, table, positives[1:], negatives), "positives and negatives"),
        ((states, table, positives, negatives[1:]), "positives and negatives"),
        ((states, table, positives, negatives[:, 0]), "positives and negatives"),
    ):
        with pytest.raises(ValueError, match=message):
            sampled_softmax(*arguments, TEMPERATURE)
    with pytest.raises(ValueError, match="log_frequency"):
        sampled_softmax(states, table, positives, negatives, TEMPERATURE, torch.zeros(len(table) + 1))


@pytest.mark.gpu
def test_triton_in_a_cuda_graph() -> None:
    arguments = draws(500, 128, 3000, 50)
    expected = results(triton_op, *arguments)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(triton_op, *arguments)
    graph.replay()
    assert all(map(torch.equal, captured, expected))


@pytest.mark.gpu
def test_triton_needs_a_tenth_of_the_memory() -> None:
    arguments = draws(2000, 128, 4000, 256, torch.bfloat16)
    peaks = []
    for implementation in (triton_op, naive):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results(implementation, *arguments)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[0] <= peaks[1] / 10
