"""Several machines train one run: a torchrun on each, here all on one. They start together and end together."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from steps.common.cli import StepError
from steps.common.files import read_json, read_jsonl, write_json
from steps.common.torchrun import Others, agreed, wait_for_end
from tests.conftest import ROOT, write_processed
from tests.steps.runs import config, planned
from tests.steps.test_distributed import ENVIRONMENT, torchrun

SAYS = "train: another process of this run ended, or torchrun was stopped: all stop"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_processed(tmp_path_factory.mktemp("data") / "t", [9 + user % 17 for user in range(50)], 80)


@pytest.fixture
def run(data: Path, tmp_path: Path) -> Path:
    write_json(tmp_path / "run/config.json", planned(config("hstu-rowwise", epochs=3), data))
    return tmp_path / "run"


def train(run: Path, data: Path, *fault: object, restarts: int = 0) -> list[tuple[int, str]]:
    """Exit code and stderr of the torchrun of each of two machines, which have a process each."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    module = ["tests.steps.distributed_faults", *fault, "--"] if fault else ["steps.train"]
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=run"]
    start = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", *meeting]
    command = [*start, f"--max-restarts={restarts}", "-m", "--", *module]
    machines = [
        subprocess.Popen(
            [*map(str, [*command, "--run", run, "--data", data, "--device", "cpu"])],
            cwd=ROOT, env=os.environ | ENVIRONMENT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]  # fmt: skip
    with ThreadPoolExecutor(2) as pool:
        said = [*pool.map(lambda machine: machine.communicate(timeout=120)[1], machines)]
    return [(machine.returncode, text) for machine, text in zip(machines, said, strict=True)]


@pytest.mark.slow
def test_two_machines_train_to_the_bytes_of_two_processes(run: Path, data: Path, tmp_path: Path) -> None:
    for code, said in train(run, data):
        assert code == 0, said
    write_json(tmp_path / "one/config.json", read_json(run / "config.json"))
    one = torchrun(2, "steps.train", "--run", tmp_path / "one", "--data", data, "--device", "cpu")
    _, said = one.communicate(timeout=120)
    assert one.returncode == 0, said
    assert (run / "model.safetensors").read_bytes() == (tmp_path / "one/model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])  # torchrun keeps the store on the machine of the first
def test_where_a_machine_is_lost_the_other_ends_and_goes_on_later(
    rank: int, run: Path, data: Path, tmp_path: Path
) -> None:
    """It waits at the store meanwhile, where it would wait for a month."""
    ended = train(run, data, rank, "lost", tmp_path / "mark")
    assert all(code != 0 for code, _ in ended)
    assert sum(said.count(SAYS) for _, said in ended) == 1
    again = torchrun(2, "steps.train", "--run", run, "--data", data, "--device", "cpu")
    printed, said = again.communicate(timeout=120)
    assert again.returncode == 0, said
    assert "resuming after epoch 1" in printed
    assert [line["epoch"] for line in read_jsonl(run / "history.jsonl")] == [1, 2, 3]


@pytest.mark.slow
def test_torchrun_may_start_all_again_where_one_machine_had_no_failure(run: Path, data: Path, tmp_path: Path) -> None:
    """The two count their restarts differently (findings/torchrun-restart-count.sh)."""
    for code, said in train(run, data, 1, "killed", tmp_path / "mark", restarts=1):
        assert code == 0, said
    assert (tmp_path / "mark").exists()
    assert len(read_jsonl(run / "history.jsonl")) == 3


@pytest.fixture
def store() -> Any:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))


def start(store: Any, ranks: list[int], size: int, seconds: float = 60) -> list[str]:
    """The names that processes of these ranks agree on."""
    connections = [dist.TCPStore("127.0.0.1", store.port, is_master=False) for _ in ranks]
    with ThreadPoolExecutor(len(ranks)) as pool:
        return [*pool.map(lambda place: agreed(connections[place], ranks[place], size, seconds), range(len(ranks)))]


def test_each_start_of_all_processes_has_a_name_of_its_own(store: Any) -> None:
    first, second, larger = start(store, [0, 1], 2), start(store, [1, 0], 2), start(store, [0, 1, 2], 3)
    with pytest.raises(StepError, match="of 3 processes not all have begun within 0 s"):
        start(store, [1, 2], 3, 0.3)  # the first has ended; what it said is still there
    last = start(store, [0, 1, 2], 3)
    names = [{*found} for found in (first, second, larger, last)]
    assert [len(found) for found in names] == [1] * 4
    assert len(set.union(*names)) == 4


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """Both ends of a pipe of signals, for processes that look at each other a hundred times a second."""
    monkeypatch.setattr("steps.common.torchrun._TICK_S", 0.01)
    monkeypatch.setattr("steps.common.torchrun._SILENT_TICKS", 5)
    monkeypatch.setattr("steps.common.torchrun._UNWINDING_S", 0)
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def ended(others: Others, signals: tuple[int, int]) -> None:
    threading.Thread(target=others.watch, daemon=True).start()
    wait_for_end(others, signals[0])


def seen_to_end(others: Others, signals: tuple[int, int]) -> None:
    """Without a second thread, which ends too where this one gets no answer in time, as on a busy machine."""
    others.watch()
    assert others.ended
    wait_for_end(others, signals[0])


def test_a_process_ends_where_the_next_one_is_silent(store: Any, signals: tuple[int, int]) -> None:
    store.add("lives/2", 1)
    seen_to_end(Others(store, 1, 3), signals)
    assert store.add("lives/1", 0) == 6  # once when it saw the other live, and five times when it did not
    assert store.add("ended", 0) == 0  # it says so afterwards


def test_a_process_ends_where_any_other_has_failed(store: Any, signals: tuple[int, int]) -> None:
    store.add("ended", 1)
    seen_to_end(Others(store, 1, 3), signals)
    assert store.add("lives/1", 0) == 1


def test_a_process_ends_where_its_own_torchrun_was_killed(store: Any, signals: tuple[int, int]) -> None:
    """Also if another one keeps the store: the process would go on, and torchrun there would wait for this machine."""
    others = Others(store, 1, 3)
    others.torchrun += 1
    seen_to_end(others, signals)
    assert store.add("lives/1", 0) == 1


@pytest.mark.parametrize("answers", [False, True])
def test_a_process_ends_where_the_store_is_out_of_reach(answers: bool, signals: tuple[int, int]) -> None:
    class Away:
        def add(self, *_: object) -> int:
            if answers:
                raise dist.DistNetworkError("the connection was closed")
            waits.wait()
            return 0

    waits = threading.Event()
    ended(Others(Away(), 1, 3), signals)
    waits.set()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_process_that_has_finished_ends_by_a_signal_alone(
    number: signal.Signals, store: Any, signals: tuple[int, int]
) -> None:
    store.add("ended", 1)
    others = Others(store, 1, 3)
    others.finished.set()
    with ThreadPoolExecutor(1) as pool:
        end = pool.submit(ended, others, signals)
        os.write(signals[1], bytes([signal.SIGWINCH]))
        with pytest.raises(TimeoutError):
            end.result(timeout=0.3)
        os.write(signals[1], bytes([number]))
    assert store.add("lives/1", 0) == 0
