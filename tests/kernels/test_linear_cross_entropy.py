"""Cross-entropy among all items: its definition in loops, Triton against float64, its extremes, its limits."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_no_worse

from kernels.common import _warn
from kernels.linear_cross_entropy import linear_cross_entropy, naive

triton_op = pytest.importorskip("kernels.linear_cross_entropy.triton_op", exc_type=ImportError)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
# Gradients are, as a bias table's, sums of many terms that cancel.
NAMES = ("loss", "d bias table states", "d bias table items", "d bias table bias")


def inputs(
    rows: int, items: int, dim: int, dtype: torch.dtype = torch.float32, biased: bool = True, seed: int = 0
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """States, items and bias; and targets, of which some are padding, and the last is an item."""
    torch.manual_seed(seed)
    tensors = [torch.randn(rows, dim), torch.randn(items, dim) / dim**0.5, torch.randn(items)][: 3 if biased else 2]
    targets = torch.randint(0, items, (rows,)) * (torch.rand(rows) < 0.8)
    targets[-1:] = items - 1
    return [x.to(DEVICE, dtype) for x in tensors], targets.to(DEVICE)


def results(function, tensors: list[torch.Tensor], targets: torch.Tensor, gradient: float = 3.0) -> list[torch.Tensor]:
    """The loss, and the gradients of its multiple."""
    states, items, *bias = (leaves := [x.detach().requires_grad_() for x in tensors])
    loss = function(states, items, targets, *bias)
    return [loss.detach(), *torch.autograd.grad(gradient * loss, leaves)]


def versions(tensors: list[torch.Tensor], targets: torch.Tensor) -> list[list[torch.Tensor]]:
    """The results of Triton, of the naive version, and of the naive version in float64."""
    double = [x.double() for x in tensors]
    plain = naive.linear_cross_entropy
    ours = results(triton_op.linear_cross_entropy, tensors, targets)
    return [ours, results(plain, tensors, targets), results(plain, double, targets)]


def assert_as_exact_as_naive(tensors: list[torch.Tensor], targets: torch.Tensor) -> None:
    ours, low, exact = versions(tensors, targets)
    assert [x.dtype for x in ours] == [torch.float32, *(x.dtype for x in tensors)]
    assert_no_worse(ours, low, exact, NAMES[: len(ours)])


def use_blocks(patch: pytest.MonkeyPatch, rows: int, items: int, programs: int) -> None:
    """Tiles so small that a few states and items need several, and so many programs."""
    products = {"block_rows": rows, "block_items": items, "num_warps": 1, "num_stages": 1, "programs": programs}
    entries = {"linear_cross_entropy_sums": {"block_elements": 64, "num_warps": 1}}
    patch.setattr(triton_op, "configuration", lambda operation, *_: entries.get(operation, products))


def test_the_naive_version_is_the_definition() -> None:
    (states, items, bias), targets = inputs(6, 5, 4, torch.float64)
    targets[0] = 0
    losses = []
    for state, target in zip(states[1:], targets[1:].tolist(), strict=True):
        logits = [float(state @ vector) + float(b) for vector, b in zip(items, bias, strict=True)]
        if target:
            losses.append(math.log(sum(map(math.exp, logits[1:]))) - logits[target])
    loss = naive.linear_cross_entropy(states, items, targets, bias)
    assert float(loss) == pytest.approx(sum(losses) / len(losses), abs=1e-12)
    nothing = naive.linear_cross_entropy(states, items, targets)
    assert torch.equal(nothing, naive.linear_cross_entropy(states, items, targets, torch.zeros_like(bias)))


def test_the_naive_version_has_its_gradients_and_padding_has_none() -> None:
    tensors, targets = inputs(7, 6, 3, torch.float64)
    leaves = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(lambda s, e, b: naive.linear_cross_entropy(s, e, targets, b), leaves)
    targets[2] = 0
    _, of_states, of_items, of_bias = results(naive.linear_cross_entropy, tensors, targets)
    assert not of_states[2].any()
    assert not of_items[0].any()
    assert of_bias[0] == 0


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "items", "dim", "biased"),
    [
        (150, 200, 50, True),  # several tiles of each
        (70, 130, 64, False),
        (5, 300, 8, True),  # fewer states than a tile has
        (130, 3, 20, False),  # fewer items
        (33, 90, 256, True),
        (1, 2, 1, True),  # one item, which is certain
        (40, 70, 130, False),
    ],
)
def test_triton_is_as_exact_as_torch(rows: int, items: int, dim: int, biased: bool, dtype: torch.dtype) -> None:
    assert_as_exact_as_naive(*inputs(rows, items, dim, dtype, biased))


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 70),
    items=st.integers(2, 70),
    dim=st.integers(1, 40),
    blocks=st.tuples(st.sampled_from([16, 32]), st.sampled_from([16, 32]), st.integers(1, 30)),
    biased=st.booleans(),
    dtype=st.sampled_from(TYPES),
    seed=st.integers(0, 999),
)
def test_triton_with_many_tiles_and_programs(rows, items, dim, blocks, biased, dtype, seed) -> None:
    tensors, targets = inputs(rows, items, dim, dtype, biased, seed)
    with pytest.MonkeyPatch.context() as patch:
        use_blocks(patch, *blocks)
        assert_as_exact_as_naive(tensors, targets)


@pytest.mark.parametrize(
    ("rows", "through", "at_once"), [(1, 1, 1), (90, 61, 396), (3, 5, 396), (500, 9, 396), (2, 0, 9)]
)
def test_programs_share_all_there_is_and_leave_none_idle(rows: int, through: int, at_once: int) -> None:
    split = triton_op._split(rows * 64, 64, through * 32 - 5 * (through > 0), 32, at_once)
    assert split.grid == (rows, split.programs)
    assert rows * split.programs <= max(at_once, rows)
    assert (split.programs - 1) * split.share < max(1, through) <= split.programs * split.share


def test_padding_is_no_item_and_has_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    use_blocks(monkeypatch, 16, 16, 4)
    (states, items, bias), targets = inputs(40, 50, 20)
    targets[:17] = 0  # a tile of nothing but padding
    targets[17] = 49
    found = results(triton_op.linear_cross_entropy, [states, items, bias], targets)
    items[0], bias[0] = 100 * items[0], 5.0
    for ours, other in zip(found, results(triton_op.linear_cross_entropy, [states, items, bias], targets), strict=True):
        assert torch.equal(ours, other)
    _, of_states, of_items, of_bias = found
    assert not of_states[targets == 0].any()
    assert not of_items[0].any()
    assert of_bias[0] == 0
    kept = targets > 0
    counted = results(triton_op.linear_cross_entropy, [states[kept], items, bias], targets[kept])
    torch.testing.assert_close(counted[0], found[0])
    torch.testing.assert_close(counted[1], of_states[kept])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_items_enough_for_every_program_have_their_gradients_written_at_once(dtype, monkeypatch) -> None:
    monkeypatch.setattr(triton_op, "cross_entropy_sum_kernel", None)
    use_blocks(monkeypatch, 16, 16, 5)
    assert_as_exact_as_naive(*inputs(40, 16 * 2 + 3, 20, dtype))


@pytest.mark.parametrize("implementation", [naive, triton_op], ids=["naive", "triton"])
@pytest.mark.parametrize("rows", [0, 5])
def test_the_mean_over_no_target_is_no_number_and_has_gradients_of_zero(implementation, rows: int) -> None:
    tensors, targets = inputs(rows, 9, 16)
    loss, *gradients = results(implementation.linear_cross_entropy, tensors, torch.zeros_like(targets))
    assert loss.isnan()
    assert [x.shape for x in gradients] == [x.shape for x in tensors]
    assert not any(x.any() for x in gradients)


def test_states_predicted_well_have_gradients_as_exact_as_others() -> None:
    """One less the probability of the target, 1e-5 to 1e-9, would be exact to 1e-7."""
    (states, items), targets = inputs(20, 30, 16, biased=False)
    targets = torch.arange(1, 21, device=DEVICE)
    states = items[targets] * torch.linspace(14, 24, 20, device=DEVICE)[:, None] / items[targets].square().sum(1, True)
    ours, _, exact = versions([states, items], targets)
    errors = (ours[1].double() - exact[1]).norm(dim=1) / exact[1].norm(dim=1)
    assert errors.max() < 2e-5


@pytest.mark.parametrize("size", [1e3, 1e-3])
def test_large_and_small_logits(size: float) -> None:
    (states, items, bias), targets = inputs(40, 60, 20)
    ours, _, exact = versions([size * states, items, bias], targets)
    for found, right in zip(ours, exact, strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-3, atol=1e-3 * float(right.abs().max()))


def test_a_bias_may_leave_items_out() -> None:
    (states, items, bias), targets = inputs(30, 40, 16)
    bias[5:30] = -torch.inf
    targets[:] = 3
    ours, _, exact = versions([states, items, bias], targets)
    assert_no_worse(ours, ours, exact, NAMES)
    assert not ours[2][5:30].any()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("target", [-100, 9, 2**40])
def test_a_target_that_is_no_item_makes_the_loss_no_number(target: int) -> None:
    tensors, targets = inputs(5, 9, 16)
    targets[2] = target
    assert triton_op.linear_cross_entropy(tensors[0], tensors[1], targets, tensors[2]).isnan()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("of", ["state", "item"])
def test_numbers_that_are_none_are_not_hidden(of: str) -> None:
    (states, items), targets = inputs(20, 30, 16, biased=False)
    targets[:] = 4
    (states if of == "state" else items)[7, 3] = torch.nan
    loss, of_states, of_items = results(triton_op.linear_cross_entropy, [states, items], targets)
    assert loss.isnan()
    assert of_states[7].isnan().all()
    assert of_items[1:].isnan().any()


def test_layouts_are_taken_as_they_come() -> None:
    (states, items, bias), targets = inputs(40, 30, 20)
    expected = results(triton_op.linear_cross_entropy, [states, items, bias], targets)
    wide, tall = torch.cat([states, states], 1)[:, :20], items.T.contiguous().T
    strided = torch.stack([targets, targets], 1)[:, 0]
    found = results(triton_op.linear_cross_entropy, [wide, tall, torch.stack([bias, bias], 1)[:, 1]], strided)
    assert all(map(torch.equal, found, expected))


def test_gradients_repeat_and_those_not_asked_for_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    use_blocks(monkeypatch, 16, 16, 9)
    tensors, targets = inputs(60, 70, 20)
    first, second = (results(triton_op.linear_cross_entropy, tensors, targets) for _ in range(2))
    assert all(map(torch.equal, first, second))
    for which in range(3):
        leaves = [x.detach().requires_grad_(place == which) for place, x in enumerate(tensors)]
        triton_op.linear_cross_entropy(leaves[0], leaves[1], targets, leaves[2]).mul(3).backward()
        for place, leaf in enumerate(leaves):
            assert torch.equal(leaf.grad, first[1 + place]) if place == which else leaf.grad is None


def test_torch_knows_the_operators() -> None:
    for biased in (True, False):
        tensors, targets = inputs(5, 9, 8, biased=biased)
        states, items, bias = [x.requires_grad_() for x in tensors] + [None] * (not biased)
        # Not test_aot_dispatch: it takes gradients of all outputs, of which all but the loss have none.
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(triton_op._forward, (states, items, targets, bias), test_utils=checks)
        _, *saved, _, inverse = triton_op._forward(states.detach(), items.detach(), targets, bias)
        arguments = [x.detach() for x in (states, items, *saved, inverse)]
        torch.library.opcheck(triton_op._item_gradients, (*arguments, biased))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_compiles_in_one_graph_for_dynamic_sizes(backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(
        lambda *arguments: triton_op.linear_cross_entropy(*arguments), fullgraph=True, backend=backend, dynamic=True
    )
    for rows in (6, 9):
        tensors, targets = inputs(rows, 12, 8)
        ours = results(compiled, tensors, targets)
        assert all(map(torch.equal, ours, results(triton_op.linear_cross_entropy, tensors, targets)))


def test_what_fits_goes_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr("kernels.linear_cross_entropy.fits_triton", lambda *_: True)
    for name, module in (("triton", triton_op), ("torch", naive)):
        monkeypatch.setattr(module, "linear_cross_entropy", lambda *_, name=name: used.append(name))
    targets = torch.zeros(2, dtype=torch.int64)
    for dim, dtype, allowed in (
        (64, torch.float32, True), (64, torch.float32, False), (65, torch.float32, True),
        (256, torch.float16, False), (257, torch.float16, True),
    ):  # fmt: skip
        monkeypatch.setattr("kernels.linear_cross_entropy.tf32_allowed", lambda allowed=allowed: allowed)
        _warn.cache_clear()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            linear_cross_entropy(torch.zeros(2, dim, dtype=dtype), torch.zeros(3, dim, dtype=dtype), targets)
        assert ["at most 256 dimensions" in str(warning.message) for warning in seen] == [True] * (dim == 257)
    assert used == ["triton", "torch", "torch", "triton", "torch"]


def test_on_the_cpu_it_is_torch() -> None:
    tensors, targets = inputs(7, 25, 40)
    states, items, bias = (x.cpu() for x in tensors)
    expected = naive.linear_cross_entropy(states, items, targets.cpu(), bias)
    assert torch.equal(linear_cross_entropy(states, items, targets.cpu(), bias), expected)


def test_inputs_that_make_no_sense_are_refused() -> None:
    (states, items, bias), targets = inputs(3, 8, 10)
    for arguments, message in (
        ((states[:, 1:], items, targets), r"\(M, d\) and \(V, d\)"),
        ((states, items, targets[1:]), r"targets must be \(3,\), not \(2,\)"),
        ((states, items, targets, bias[1:]), r"bias must be \(8,\), not \(7,\)"),
        ((states, items.half(), targets), "one type, not torch.float16, torch.float32"),
        ((states, items, targets, bias.half()), "one type"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(*arguments)


@pytest.mark.parametrize("dim", [50, 128])
def test_with_the_tiles_of_tf32(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which an interpreter rounds the factors alone."""
    monkeypatch.setattr(triton_op, "tf32_allowed", lambda: True)
    ours, _, exact = versions(*inputs(200, 150, dim))
    for found, right in zip(ours, exact, strict=True):
        assert 0 < (found.double() - right).norm() <= 2e-3 * right.norm()


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "items", "dim", "biased"), [(5700, 3884, 50, True), (700, 20_000, 128, False)])
def test_tf32_where_torch_uses_it(
    rows: int, items: int, dim: int, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    for name, ours, low, exact in zip(NAMES, *versions(*inputs(rows, items, dim, biased=biased)), strict=False):
        # On top of twice the error: TF32 keeps 10 bits of a factor, which may be rounded here and cut there.
        error, allowed = ((x.double() - exact).abs().max() for x in (ours, low))
        assert error <= 2 * allowed + 2**-10 * exact.abs().max(), name


@pytest.mark.gpu
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("dim", [50, 64, 100, 128, 200, 256])
def test_every_width_repeats_and_is_captured(
    dim: int, dtype: torch.dtype, tf32: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", tf32)
    tensors, targets = inputs(1000, 3000, dim, dtype)
    expected = results(triton_op.linear_cross_entropy, tensors, targets)
    assert all(map(torch.equal, results(triton_op.linear_cross_entropy, tensors, targets), expected))
    exact = results(naive.linear_cross_entropy, [x.double() for x in tensors], targets)
    for ours, right in zip(expected, exact, strict=True):
        assert (ours.double() - right).norm() <= 2e-2 * right.norm()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(triton_op.linear_cross_entropy, tensors, targets)
    graph.replay()
    assert all(map(torch.equal, captured, expected))


@pytest.mark.gpu
def test_it_needs_a_tenth_of_the_memory() -> None:
    tensors, targets = inputs(4000, 20_000, 64, torch.bfloat16)
    peaks = []
    for implementation in (triton_op, naive):
        results(implementation.linear_cross_entropy, tensors, targets)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results(implementation.linear_cross_entropy, tensors, targets)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[0] <= peaks[1] / 10


@pytest.mark.gpu
def test_compiled_by_inductor_it_has_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    torch.compiler.reset()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, dynamic=True)
    for rows in (500, 777):
        tensors, targets = inputs(rows, 3000, 50)
        for ours, eager in zip(
            results(compiled, tensors, targets), results(linear_cross_entropy, tensors, targets), strict=True
        ):
            torch.testing.assert_close(ours, eager, rtol=1e-6, atol=1e-9)
