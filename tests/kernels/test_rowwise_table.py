"""The rowwise table: its rule, its implementations against each other, what it leaves alone, and its rounding."""

from collections.abc import Callable

import pytest
import torch

from kernels import jagged
from kernels.rowwise_table import EPS, RowwiseTable, fbgemm, naive, unique

ROWS, DIM, LR = 40, 8, 0.05
Find = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(params=["torch", "fbgemm"])
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[torch.dtype], RowwiseTable]:
    """Makes tables that learn by one of the implementations."""
    if request.param == "torch":
        monkeypatch.setattr(fbgemm, "fits", lambda weight: False)

    def table(dtype: torch.dtype = torch.float32) -> RowwiseTable:
        made = RowwiseTable(ROWS, DIM, LR, dtype)
        torch.manual_seed(0)
        made.weight.copy_(0.1 * torch.randn(ROWS, DIM))
        if request.param == "fbgemm" and not jagged.fbgemm.available():
            pytest.skip("fbgemm_gpu is not installed")
        return made

    return table


def learn(table: RowwiseTable, rows: list[int], gradient: torch.Tensor) -> None:
    table(torch.tensor(rows)).backward(gradient)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 2e-4)])
def test_it_learns_by_the_rule(
    make: Callable[[torch.dtype], RowwiseTable], dtype: torch.dtype, tolerance: float
) -> None:
    table = make(dtype)
    weight, sums = table.weight.double(), torch.zeros(ROWS, dtype=torch.float64)
    for rows in ([3, 7, 39, 0, 0], [7, 1, 0, 38, 39]):
        gradient = torch.randn(len(rows), DIM)
        torch.testing.assert_close(
            table(torch.tensor(rows)).detach().double(),
            weight[rows] * (torch.tensor(rows) > 0)[:, None],
            rtol=0,
            atol=tolerance,
        )
        learn(table, rows, gradient)
        for row, g in zip(rows, gradient.double(), strict=True):
            if row:
                sums[row] += (g * g).mean()
                weight[row] -= LR * g / (sums[row].sqrt() + EPS)
    torch.testing.assert_close(table.weight.double(), weight, rtol=0, atol=tolerance)
    torch.testing.assert_close(table.sums.double(), sums, rtol=1e-6, atol=1e-9)
    assert table.weight.dtype == dtype


@pytest.mark.skipif(not jagged.fbgemm.available(), reason="fbgemm_gpu is not installed")
@pytest.mark.parametrize(
    ("dim", "dtype", "held"),
    [(8, torch.float32, True), (8, torch.float16, True), (6, torch.float32, False), (8, torch.bfloat16, False)],
)
def test_fbgemm_holds_what_it_can_of_tables_on_a_cpu(dim: int, dtype: torch.dtype, held: bool) -> None:
    table = RowwiseTable(ROWS, dim, LR, dtype)
    table.weight.fill_(0.1)
    learn(table, [3, 4], torch.ones(2, dim))
    assert (table._fused is not None) is held


def test_it_stays_as_it_is_without_a_backward_pass_and_when_frozen(
    make: Callable[[torch.dtype], RowwiseTable],
) -> None:
    table = make(torch.float32)
    learn(table, [3, 4], torch.randn(2, DIM))
    before = {name: tensor.clone() for name, tensor in table.state_dict().items()}
    with torch.no_grad():
        table(torch.tensor([3, 4]))
    table.frozen = True
    learn(table, [3, 4], torch.randn(2, DIM))
    assert set(before) == {"weight", "sums"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in table.state_dict().items())


@pytest.mark.parametrize("learns", [False, True], ids=["inference", "gradients enabled within"])
def test_it_looks_up_under_inference_mode(make: Callable[[torch.dtype], RowwiseTable], learns: bool) -> None:
    table, rows = make(torch.float32), torch.tensor([3, 0, 4])
    learn(table, [3, 4], torch.randn(2, DIM))
    expected = table.weight[rows].clone() * (rows > 0)[:, None]
    with torch.inference_mode(), torch.set_grad_enabled(learns):
        found = table(rows)
    assert torch.equal(found, expected)
    learn(table, [3, 4], torch.randn(2, DIM))  # and learns on
    assert not torch.equal(table.weight[3], expected[0])


@pytest.mark.parametrize("dim", [0, 1, 4, 8])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_nothing_is_a_size_like_others(rows: int, dim: int, make: Callable[[torch.dtype], RowwiseTable]) -> None:
    del make  # for its choice of an implementation
    table = RowwiseTable(rows, dim, LR, torch.float32)
    table.weight.fill_(1.0)
    for given in ([], [0], [0, 0], [2, 1]):
        if max(given, default=-1) < rows:
            found = table(torch.tensor(given, dtype=torch.int64))
            assert found.shape == (len(given), dim)
            found.backward(torch.ones_like(found))
    learnt = float(rows == 3 and dim > 0)
    assert table.sums.tolist() == [0.0, learnt, learnt][:rows]
    weights = torch.tensor([1.0, 1.0 - LR * learnt, 1.0 - LR * learnt])[:rows, None].expand(rows, dim)
    torch.testing.assert_close(table.weight.clone(), weights.contiguous())


def padded(index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return naive.padded_unique(index, 99)


@pytest.mark.parametrize("find", [unique, padded])
def test_no_entries_have_no_unique_values(find: Find) -> None:
    for found in find(torch.tensor([], dtype=torch.int64)):
        assert found.shape == (0,)
        assert found.dtype == torch.int64


def test_a_loaded_state_goes_on_as_the_saved_one(make: Callable[[torch.dtype], RowwiseTable]) -> None:
    first, second = make(torch.float32), make(torch.float32)
    learn(first, [3, 4], torch.randn(2, DIM))
    learn(second, [9, 4], torch.randn(2, DIM))  # so that it is in use when it loads
    second.load_state_dict(first.state_dict())
    gradient = torch.randn(3, DIM)
    for table in (first, second):
        learn(table, [4, 3, 8], gradient)
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.sums, second.sums)


def test_a_changed_rate_counts_from_the_next_lookup(make: Callable[[torch.dtype], RowwiseTable]) -> None:
    table = make(torch.float32)
    for lr in (LR, 10 * LR, 0.0):
        table.lr = lr
        before, sums = table.weight[3].clone(), float(table.sums[3])
        learn(table, [3], torch.ones(1, DIM))
        torch.testing.assert_close(table.weight[3], before - lr / (sums + 1) ** 0.5)


@pytest.mark.parametrize(
    ("find", "expected"), [(unique, [0, 3, 5, 9]), (padded, [0, 3, 5, 9, 99, 99, 99])], ids=["cpu", "padded"]
)
def test_unique_values_and_their_inverse(find: Find, expected: list[int]) -> None:
    index = torch.tensor([5, 0, 5, 3, 9, 3, 3])
    values, inverse = find(index)
    assert values.tolist() == expected
    assert torch.equal(values[inverse], index)


def test_rounding_goes_to_a_neighbour_and_is_right_on_average() -> None:
    torch.manual_seed(0)
    value = torch.tensor([0.0201, -0.3333, 1.0, 0.0])[:, None].expand(-1, 20_000).contiguous()
    rounded = naive.stochastically(value, torch.float16)
    spacing = torch.tensor([2.0**-16, 2.0**-12, 0.0, 0.0])
    assert ((rounded.float() - value).abs().amax(1) <= spacing).all()
    assert ((rounded.double().mean(1) - value[:, 0].double()).abs() <= 0.02 * spacing).all()


@pytest.mark.gpu
def test_it_can_be_captured_and_learns_the_same() -> None:
    tables = [RowwiseTable(ROWS, DIM, LR, torch.float32).cuda() for _ in range(2)]
    for table in tables:
        table.weight.fill_(0.1)
    rows, gradient = torch.tensor([3, 7, 0, 0], device="cuda"), torch.randn(4, DIM, device="cuda")
    for table in tables:
        table.frozen = True
        table(rows).backward(gradient)
        table.frozen = False
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tables[0](rows).backward(gradient)
    for _ in range(3):
        graph.replay()
        tables[1](rows).backward(gradient)
    torch.testing.assert_close(tables[0].weight, tables[1].weight)
    torch.testing.assert_close(tables[0].sums, tables[1].sums)
