"""A sharded table of one process, against a table that is not sharded. Of several: tests/steps/test_distributed.py."""

import builtins
import importlib.util
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from kernels.rowwise_table import EPS, RowwiseTable, naive, torchrec
from kernels.rowwise_table.sharded import ShardedRowwiseTable

ROWS, DIM, LR = 40, 8, 0.05


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def whole(dtype: torch.dtype) -> RowwiseTable:
    table = RowwiseTable(ROWS, DIM, LR, dtype)
    torch.manual_seed(0)
    table.weight.copy_(0.1 * torch.randn(ROWS, DIM))
    table.sums.copy_(torch.rand(ROWS))
    return table


@pytest.mark.parametrize("by", ["torch", "torchrec"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 2e-4)])
def test_it_learns_as_the_whole_table(
    by: str, dtype: torch.dtype, tolerance: float, group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by == "torch":
        monkeypatch.setattr(torchrec, "fits", lambda weight, rows: False)
    elif importlib.util.find_spec("torchrec") is None:
        pytest.skip("TorchRec is not installed")
    one = whole(dtype)
    sharded = ShardedRowwiseTable(one)
    for rows in ([0, 3, 7, 39, 40, 40], [], [0, 1, 7, 38, 39], [40, 99]):
        gradient, rows = torch.randn(len(rows), DIM), torch.tensor(rows, dtype=torch.int64)
        # Behind the last row there are none: zeros, as row 0.
        found = [one(torch.where(rows < ROWS, rows, 0)), sharded(rows)]
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=tolerance)
        assert found[1].dtype == torch.float32
        for vectors in found:
            vectors.backward(gradient)
    assert (sharded._fused is not None) == (by == "torchrec")
    gathered = sharded.whole()
    assert gathered.weight.dtype == dtype
    torch.testing.assert_close(gathered.weight, one.weight, rtol=0, atol=tolerance)
    torch.testing.assert_close(gathered.sums, one.sums, rtol=1e-6, atol=1e-9)


def test_vectors_are_float32_whatever_torchs_default_is(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchrec, "fits", lambda weight, rows: False)
    sharded = ShardedRowwiseTable(whole(torch.float16))
    torch.set_default_dtype(torch.float64)
    try:
        assert sharded(torch.tensor([0, 3, 40])).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("error", "warned"),
    [
        (ModuleNotFoundError("No module named 'torchrec'", name="torchrec"), False),
        (ModuleNotFoundError("No module named 'tensordict'", name="tensordict"), True),
        (OSError("undefined symbol: _ZN3c10"), True),
        (AttributeError("module 'fbgemm_gpu' has no attribute 'x'"), True),
    ],
    ids=["not installed", "lacks a package", "another torch", "another fbgemm_gpu"],
)
def test_torchrec_is_left_out_without_a_word_only_where_it_is_not_installed(
    error: Exception, warned: bool, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    real = builtins.__import__

    def broken(name: str, *arguments: object, **options: object) -> object:
        if name.startswith("torchrec"):
            raise error
        return real(name, *arguments, **options)

    torchrec.available.cache_clear()
    monkeypatch.setattr(builtins, "__import__", broken)
    try:
        assert not torchrec.available()
        assert not torchrec.available()
    finally:
        monkeypatch.undo()
        torchrec.available.cache_clear()
    assert ["TorchRec does not load" in str(warning.message) for warning in recwarn] == [True] * warned


@pytest.mark.parametrize("rows", [[], [4], [0, 3, 3, 0, 9, 0], [7, 2, 7]])
def test_an_owner_updates_a_row_once_by_the_sum_of_its_gradients(rows: list[int]) -> None:
    found, expected = whole(torch.float32), whole(torch.float32)
    gradient = torch.randn(len(rows), DIM)
    naive.update_repeated(found.weight, found.sums, torch.tensor(rows, dtype=torch.int64), gradient, LR, EPS)
    for row in set(rows):
        total = sum(one for other, one in zip(rows, gradient, strict=True) if other == row)
        expected.sums[row] += total.square().mean()
        expected.weight[row] -= LR * total / (expected.sums[row].sqrt() + EPS)
    torch.testing.assert_close(found.weight, expected.weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.sums, expected.sums, rtol=1e-6, atol=1e-9)


def test_it_takes_its_rows_of_a_whole_state(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    other = whole(torch.float32)
    other.weight += 1
    for rank, rows in ((0, slice(0, 14)), (2, slice(28, 40))):  # 40 rows on three processes: 14, 14 and 12
        monkeypatch.setattr(dist, "get_world_size", lambda: 3)
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        sharded = ShardedRowwiseTable(whole(torch.float32))
        assert torch.equal(sharded.weight, whole(torch.float32).weight[rows])
        sharded.load_state_dict(other.state_dict())
        assert torch.equal(sharded.weight, other.weight[rows])
        assert torch.equal(sharded.sums, other.sums[rows])
