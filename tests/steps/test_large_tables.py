"""Tables of which each process has its rows alone: made, written, read and ranked by as of one process.

Threads stand for processes here; tests/steps/test_distributed.py has real ones.
"""

import errno
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save

from steps.common.cli import StepError
from steps.common.processes import Processes
from steps.data.sequences import load_sequences
from steps.data.split import split_sequences
from steps.evaluation import sharded_ranks
from steps.evaluation.exact_ranks import Ranker, Ranking, Rules
from steps.models import large_table, weights
from steps.models.large_table import Block, rowwise_table
from steps.models.weights import load_weights, save_weights, write_together
from steps.tasks import build
from steps.training.checkpoint import State, StateError, read_state, write_state, write_state_together
from tests.conftest import write_processed
from tests.steps.runs import PAPER, config

ROWS, DIM = 40, 4
LR, DTYPE = 0.05, torch.float16


class Ended(Exception):
    """Another process ended before it gave what this one waits for."""


class Exchange:
    """What processes give to each other, a round at a time: a round that is complete outlives the end of a process."""

    def __init__(self, size: int) -> None:
        self.size, self.ended = size, False
        self.rounds: list[dict[int, Any]] = []
        self.joined = [0] * size
        self.changed = threading.Condition()

    def all(self, rank: int, value: Any) -> list[Any]:
        """What every process gives in this round, in the order of their ranks."""
        with self.changed:
            if self.joined[rank] == len(self.rounds):
                self.rounds.append({})
            given = self.rounds[self.joined[rank]]
            self.joined[rank] += 1
            given[rank] = value
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: len(given) == self.size or self.ended, timeout=300)
            if len(given) < self.size:
                raise Ended
            return [given[other] for other in range(self.size)]

    def end(self) -> None:
        with self.changed:
            self.ended = True
            self.changed.notify_all()


class Threads(Processes):
    """A thread that takes part as process `rank` of `size`."""

    def sum_(self, tensor: torch.Tensor) -> None:
        tensor.copy_(sum(self.store.all(self.rank, tensor.clone())))

    def gathered(self, text: str) -> list[str]:
        return self.store.all(self.rank, text)


def together(size: int, work: Callable[[Threads], Any]) -> list[Any]:
    """What `work` returns in each of several processes; where one fails, those that wait for it end."""
    exchange = Exchange(size)

    def one(rank: int) -> Any:
        try:
            return work(Threads(rank, size, exchange))
        except BaseException:
            exchange.end()
            raise

    with ThreadPoolExecutor(size) as pool:
        return [future.result() for future in [pool.submit(one, rank) for rank in range(size)]]


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Makes the tables that follow those of a process."""

    def become(rank: int, size: int) -> None:
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        monkeypatch.setattr(dist, "get_world_size", lambda: size)

    return become


def test_a_table_of_usual_size_is_drawn_as_ever(as_rank: Callable[[int, int], None]) -> None:
    torch.manual_seed(5)
    expected = torch.nn.init.trunc_normal_(torch.empty(ROWS, DIM, dtype=DTYPE), std=0.02, a=-0.04, b=0.04)
    after = torch.rand(3)
    for rank, rows in ((None, slice(0, 40)), (0, slice(0, 14)), (1, slice(14, 28)), (2, slice(28, 40))):
        as_rank(rank or 0, 3)
        torch.manual_seed(5)
        table = rowwise_table(ROWS, DIM, LR, DTYPE, sharded=rank is not None)
        assert torch.equal(table.weight, expected[rows])
        assert torch.equal(torch.rand(3), after)


def test_of_a_large_table_a_process_makes_its_rows_alone(
    as_rank: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large_table, "DRAWN_WHOLE", 100)
    monkeypatch.setattr(large_table, "_DRAWN_AT_ONCE", 6 * DIM)
    torch.manual_seed(5)
    whole = rowwise_table(ROWS, DIM, LR, DTYPE)
    after = torch.rand(3)
    assert (whole.weight.shape, whole.weight.dtype) == ((ROWS, DIM), DTYPE)
    assert len(whole.weight[:, 0].unique()) > 30  # no block is drawn twice
    assert 0.014 < whole.weight.float().std() < 0.021  # 0.0176 of normal numbers cut at two deviations
    assert whole.weight.abs().max() <= 0.0401
    sizes: list[int] = []
    drawn = large_table._drawn
    monkeypatch.setattr(large_table, "_drawn", lambda rows, *how: (sizes.append(rows), drawn(rows, *how))[1])
    for size in (2, 3, 41):
        parts = []
        for rank in range(size):
            as_rank(rank, size)
            torch.manual_seed(5)
            table = rowwise_table(ROWS, DIM, LR, DTYPE, sharded=True)
            assert torch.equal(torch.rand(3), after)
            assert not table.sums.any()
            parts.append(table.weight)
        assert torch.equal(torch.cat(parts), whole.weight)
    assert max(sizes) == 6
    values = large_table._drawn(1000, 100, 1)
    inside = [float((values.abs() < limit).float().mean()) for limit in (0.01, 0.02)]
    assert inside == pytest.approx([0.3829 / 0.9545, 0.6827 / 0.9545], abs=0.01)  # of a normal distribution's table


WHOLE = {
    "items.weight": torch.arange(40.0).view(10, 4).half(),
    "items.sums": torch.arange(10.0),
    "encoder.bias": torch.ones(3),
    "encoder.step": torch.tensor(3.0),
    "count": torch.tensor([1, 2]),
}


def own(rank: int, size: int, prefix: str = "") -> tuple[dict[str, torch.Tensor], dict[str, Block]]:
    """What a process has of WHOLE, and which rows that is."""
    each = -(-10 // size)
    first, end = min(10, rank * each), min(10, (rank + 1) * each)
    blocks = {f"{prefix}items.{name}": Block(first, end - first, 10) for name in ("weight", "sums")}
    tensors = {prefix + name: value for name, value in WHOLE.items()}
    return tensors | {name: tensors[name][first:end] for name in blocks}, blocks


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])  # of six the last has no row
def test_processes_write_the_bytes_of_one(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steps.models.weights.AT_ONCE", 8)  # so that tensors are written in parts
    path = tmp_path / "w.safetensors"
    together(size, lambda processes: write_together(path, *own(processes.rank, size), processes))
    assert path.read_bytes() == save(WHOLE)
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


def test_where_one_process_cannot_write_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_text("before")

    def work(processes: Threads) -> None:
        tensors, blocks = own(processes.rank, 2)
        if processes.rank == 1:
            processes.told("")
            raise StepError("the disk is full")
        write_together(path, tensors, blocks, processes)

    with pytest.raises(Ended):
        together(2, work)
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


def test_where_the_disk_of_one_process_is_full_all_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, said = tmp_path / "w.safetensors", []
    write_own = weights._write_own

    def full(*given: Any, first: bool) -> None:
        if not first:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_own(*given, first=first)

    def work(processes: Threads) -> None:
        try:
            write_together(path, *own(processes.rank, 2), processes)
        except StepError as error:
            said.append(str(error))
            raise

    monkeypatch.setattr(weights, "_write_own", full)
    with pytest.raises(StepError):
        together(2, work)
    assert said == 2 * [f"cannot write {path}: the disk is full; make room and run the same command again"]
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("written_by", [1, 2, 3])
def test_a_state_goes_to_another_number_of_processes(
    written_by: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steps.models.weights.AT_ONCE", 8)
    path, progress = tmp_path / "state.safetensors", {"identity": "x", "history": [{"epoch": 1, "é": 0.5}]}
    whole = {f"model/{name}": value for name, value in WHOLE.items()}
    if written_by == 1:
        write_state(path, State(whole, progress))
    else:

        def work(processes: Threads) -> None:
            write_state_together(path, *own(processes.rank, written_by, "model/"), progress, processes)

        together(written_by, work)
    for size in (1, 2, 4):
        for rank in range(size):
            expected, blocks = own(rank, size, "model/")
            state = read_state(path, "x", blocks if size > 1 else None)
            assert state is not None
            assert state.progress == progress
            assert state.tensors.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.equal(state.tensors[name], value), name
                assert state.tensors[name].dtype == value.dtype
    with pytest.raises(StateError, match="another config"):
        read_state(path, "y")
    with pytest.raises(StateError, match=r"model/items.weight has 10 rows, not 11"):
        read_state(path, "x", {"model/items.weight": Block(0, 5, 11)})
    with pytest.raises(StateError, match="cannot be read: "):
        read_state(tmp_path, "x")  # a folder
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(StateError, match="is damaged: its sha256"):
        read_state(path, "x", own(0, 2, "model/")[1])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_processed(tmp_path_factory.mktemp("data") / "t", [9 + user % 17 for user in range(50)], 80)


def rowwise(dtype: str = "float16") -> dict[str, Any]:
    return config("hstu", protocol=PAPER, items={"lr": 0.05, "dtype": dtype, "negative_pool": 50})


def parts_of(size: int, weights: Path, as_rank: Callable[[int, int], None]) -> list[Any]:
    """The model of each process, with its rows of the weights."""
    found = []
    for rank in range(size):
        as_rank(rank, size)
        model = build(rowwise(), 80, sharded=True)
        load_weights(model, weights)
        found.append(model)
    return found


def test_weights_are_read_and_written_by_rows(data: Path, tmp_path: Path, as_rank: Callable[[int, int], None]) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(build(rowwise(), 80), path)
    whole = load_file(path)
    models = parts_of(3, path, as_rank)
    assert torch.equal(torch.cat([model.items.weight for model in models]), whole["items.weight"])
    assert {model.num_parameters() for model in models} == {build(rowwise(), 80).num_parameters()}
    together(3, lambda processes: save_weights(models[processes.rank], tmp_path / "again", processes))
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    as_rank(0, 2)
    with pytest.raises(StepError, match=r"items.sums has 81 rows, not 91. Train again"):
        load_weights(build(rowwise(), 90, sharded=True), path)


@pytest.mark.parametrize(("items_at_once", "ties"), [(2**20, False), (2**20, True), (32, True), (7, False)])
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_are_those_of_one_process(
    size: int,
    ties: bool,
    items_at_once: int,
    data: Path,
    tmp_path: Path,
    as_rank: Callable[[int, int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With ties many items have the same vector. In stretches of 7 the last digit of their scores is not the same."""
    monkeypatch.setattr(sharded_ranks, "ITEMS_AT_ONCE", items_at_once)
    sequences, _ = load_sequences(data, torch.device("cpu"))
    held_out = split_sequences(sequences, PAPER).held_out["test"]
    rules = [Rules("rated", "history"), Rules("catalogue", "window"), Rules("catalogue", "nothing")]
    torch.manual_seed(7)
    one: Any = build(rowwise(), 80)
    one.items.weight += 0.3 * torch.randn_like(one.items.weight)
    if ties:
        one.items.weight[:] = one.items.weight[torch.arange(81) % 5]
    path = tmp_path / "w.safetensors"
    save_weights(one, path)

    def ranked(model: Any, processes: Processes) -> list[Ranking]:
        finite, found = Ranker(sequences, held_out, rules, 20, 16, top=12, processes=processes).rank(model)
        assert finite
        return found

    expected = ranked(one, Processes())
    assert bool(expected[0].ranks.ties.any()) == ties
    models = parts_of(size, path, as_rank)
    for found in together(size, lambda processes: ranked(models[processes.rank], processes)):
        for ranking, right in zip(found, expected, strict=True):
            assert torch.equal(ranking.ranks.best, right.ranks.best)
            assert torch.equal(ranking.ranks.ties, right.ranks.ties)
            assert torch.equal(ranking.top, right.top)


def test_a_score_that_is_not_finite_is_told_to_all(
    data: Path, tmp_path: Path, as_rank: Callable[[int, int], None]
) -> None:
    sequences, _ = load_sequences(data, torch.device("cpu"))
    held_out = split_sequences(sequences, PAPER).held_out["test"]
    save_weights(build(rowwise(), 80), tmp_path / "w.safetensors")
    models = parts_of(2, tmp_path / "w.safetensors", as_rank)
    models[1].items.weight[3] = torch.nan

    def finite(processes: Threads) -> bool:
        ranker = Ranker(sequences, held_out, [Rules("rated", "history")], 20, 16, processes=processes)
        return bool(ranker.rank(models[processes.rank])[0])

    assert together(2, finite) == [False, False]
