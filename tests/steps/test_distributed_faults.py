"""Where one of several processes fails, or has other files, all end by one line, and nothing is lost."""

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from steps.common import processes
from steps.common.cli import StepError
from steps.common.files import read_json, read_jsonl, write_json
from steps.common.locks import locked
from steps.common.torchrun import _CONNECTING, _main_connection, first_to_end
from tests.conftest import write_processed
from tests.steps.runs import config, planned, states
from tests.steps.test_distributed import torchrun, two_devices


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_processed(tmp_path_factory.mktemp("data") / "t", [9 + user % 17 for user in range(50)], 80)


def made(folder: Path, data: Path, **changes: Any) -> Path:
    write_json(folder / "config.json", planned(config(**changes), data))
    return folder


def train(run: Path, data: Path, *fault: object, processes: int = 2, device: str = "cpu") -> tuple[int, str]:
    """Exit code and stderr of a training by several processes, one of which has the fault."""
    module = ["tests.steps.distributed_faults", *fault, "--"] if fault else ["steps.train"]
    command = torchrun(processes, *module, "--run", run, "--data", data, "--device", device)
    try:
        _, said = command.communicate(timeout=120)
    finally:
        command.kill()  # with which its processes end, also where they wait for each other
    return command.returncode, said


def the_line(found: tuple[int, str]) -> str:
    """The one line by which a training failed, without torchrun's own report."""
    code, said = found
    assert code != 0
    (line,) = [line for line in said.splitlines() if line.startswith("train: ")]
    assert "rank 1: " not in said
    return line


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_process_that_captures_no_graph_says_so_and_all_take_the_same_steps(data: Path, tmp_path: Path) -> None:
    eager, some = (made(tmp_path / name, data, model="hstu-rowwise", epochs=2) for name in ("eager", "some"))
    assert train(eager, data)[0] == 0
    code, said = train(some, data, 1, "capture")
    assert code == 0, said
    assert said.count("training without") == 1
    assert "rank 1: training without a CUDA graph, which does not take Retrieval: operation not permitted" in said
    assert (some / "model.safetensors").read_bytes() == (eager / "model.safetensors").read_bytes()
    assert not read_json(some / "training.json")["captured"]


@pytest.mark.slow
def test_processes_wait_for_the_one_that_hashes_a_state_of_any_size(data: Path, tmp_path: Path) -> None:
    run = made(tmp_path / "run", data, model="hstu-rowwise", epochs=2)
    code, said = train(run, data, 0, "hash")
    assert code == 0, said
    assert (run / "training.json").exists()


@pytest.mark.slow
def test_what_fails_before_processes_join_is_said_once(data: Path, tmp_path: Path) -> None:
    run = made(tmp_path / "run", data)
    assert "--device nonsense: cpu, cuda" in the_line(train(run, data, device="nonsense"))
    command = torchrun(2, "steps.train", "--run", run)
    printed, said = command.communicate(timeout=60)
    assert command.returncode != 0
    assert said.count("usage: ") == said.count("the following arguments are required: --data") == 1
    command = torchrun(2, "steps.train", "--help")
    printed, said = command.communicate(timeout=60)
    assert (command.returncode, printed.count("usage: ")) == (0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["missing", "damaged", "damaged for all"])
def test_where_one_process_cannot_read_the_state_all_stop_and_it_stays(fault: str, data: Path, tmp_path: Path) -> None:
    run = made(tmp_path / "run", data)
    _, state = states(run, config(), data)
    other = tmp_path / "other"
    content = bytearray(state.read_bytes())
    content[-40] ^= 1
    if fault == "damaged":
        other.write_bytes(content)
    if fault == "damaged for all":
        state.write_bytes(content)
    before = files(run)
    line = the_line(train(run, data, *([1, "state", other] if fault != "damaged for all" else [])))
    expected = {
        "missing": f"the state {state} differs between the processes: rank 0 has ",
        "damaged": f"{state} is damaged: its sha256 is another than it says (rank 1); nothing was changed",
        "damaged for all": f"{state} is damaged: its sha256 is another than it says (rank 0, 1); nothing was changed",
    }
    assert expected[fault] in line
    assert fault == "missing" or f"or remove {run / 'resume'} to start at epoch 1" in line
    assert files(run) == before


@pytest.mark.slow
def test_processes_with_different_configs_do_not_begin(data: Path, tmp_path: Path) -> None:
    run, other = made(tmp_path / "run", data), made(tmp_path / "other", data, epochs=5)
    line = the_line(train(run, data, 1, "config", other))
    assert f"{run / 'config.json'} differs between the processes: rank 0 has " in line
    assert [*files(run)] == ["config.json"]


@pytest.mark.slow
def test_where_the_disk_of_one_process_is_full_nothing_is_left(data: Path, tmp_path: Path) -> None:
    run = made(tmp_path / "run", data, model="hstu-rowwise")
    line = the_line(train(run, data, 1, "disk"))
    assert line == (
        f"train: cannot write {run / 'resume/state.safetensors'}: the disk is full; make room and run the same command "
        "again"
    )
    assert [*files(run)] == ["config.json"]


@pytest.mark.slow
def test_a_process_that_fails_in_a_step_says_why_and_ends_the_others(data: Path, tmp_path: Path) -> None:
    assert "No space left on device" in the_line(train(made(tmp_path / "run", data), data, 1, "step", processes=3))


@pytest.mark.slow
def test_torchrun_may_start_all_again(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps its store, with what processes told each other there before."""
    monkeypatch.setenv("PET_MAX_RESTARTS", "1")
    run = made(tmp_path / "run", data, model="hstu-rowwise", epochs=3)
    code, said = train(run, data, 0, "killed", tmp_path / "mark")
    assert code == 0, said
    assert said.count("train: another process of this run ended") == 1
    assert len(read_jsonl(run / "history.jsonl")) == 3


@pytest.mark.gpu
@two_devices
def test_a_device_without_a_graph_takes_the_same_steps(data: Path, tmp_path: Path) -> None:
    every, some = (made(tmp_path / name, data, model="hstu-rowwise", epochs=2) for name in ("every", "some"))
    for run in (every, some):
        settings = read_json(run / "config.json")
        settings["training"]["dropout"] = 0.0
        write_json(run / "config.json", settings)
    assert train(every, data, device="cuda")[0] == 0
    code, said = train(some, data, 1, "capture", device="cuda")
    assert code == 0, said
    assert "rank 1: training without a CUDA graph, which does not take Retrieval: operation not permitted" in said
    captured = [read_json(run / "training.json")["captured"] for run in (every, some)]
    assert captured == [True, False]
    losses = [[line["train/loss"] for line in read_jsonl(run / "history.jsonl")] for run in (every, some)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.gpu
@two_devices
def test_a_device_whose_process_fails_in_a_step_ends_the_one_that_waits(data: Path, tmp_path: Path) -> None:
    """Which waits in NCCL: `train` gives all 120 seconds, from start to end; NCCL would give up after ten minutes."""
    run = made(tmp_path / "run", data)
    assert "No space left on device" in the_line(train(run, data, 1, "step", device="cuda"))


@pytest.mark.gpu
@two_devices
@pytest.mark.parametrize("killed", [0, 1])
def test_a_device_whose_process_is_killed_ends_the_other_and_both_go_on(
    killed: int, data: Path, tmp_path: Path
) -> None:
    run = made(tmp_path / "run", data, model="hstu-rowwise", epochs=3)
    code, said = train(run, data, killed, "killed", tmp_path / "mark", device="cuda")
    assert code != 0
    assert said.count("train: another process of this run ended") == 1, said
    code, said = train(run, data, device="cuda")
    assert code == 0, said
    assert [line["epoch"] for line in read_jsonl(run / "history.jsonl")] == [1, 2, 3]


@pytest.fixture
def unconnected() -> Iterator[None]:
    """A process that remembers no connection to torchrun, before and after."""
    _main_connection.cache_clear()
    yield
    _main_connection.cache_clear()


@pytest.mark.usefixtures("unconnected")
def test_a_process_ends_where_torchrun_was_killed_before_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would try for half an hour to reach a store that is gone."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    started = {"WORLD_SIZE": 2, "RANK": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in {**started, "TORCHELASTIC_USE_AGENT_STORE": True}.items():
        monkeypatch.setenv(name, str(value))
    assert timedelta(seconds=60) >= _CONNECTING
    monkeypatch.setattr("steps.common.torchrun._CONNECTING", timedelta(seconds=1))
    start = time.monotonic()
    with pytest.raises(StepError, match="torchrun was stopped"), processes.joined(torch.device("cpu")):
        pass
    assert time.monotonic() - start < 30
    monkeypatch.setattr("steps.common.torchrun.rendezvous", lambda *_, **how: pytest.fail("it tries a second time"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not first_to_end()


def test_a_process_that_ctrl_c_ends_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else those of another machine, to which nobody sent it, would wait for a minute."""
    monkeypatch.setattr("steps.common.torchrun.started", lambda: True)
    for name in ("main_connection", "connected"):
        monkeypatch.setattr(f"steps.common.torchrun.{name}", lambda: (None, 0, 2))
    monkeypatch.setattr("steps.common.torchrun.end_with_others", threading.Event)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *_, **how: None)
    with pytest.raises(StepError, match="torchrun was stopped"), processes.joined(torch.device("cpu")):
        raise KeyboardInterrupt


def test_several_processes_without_torchrun_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a cluster sets WORLD_SIZE: a process alone would wait for the others, and then say that they ended."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused = pytest.raises(StepError, match="WORLD_SIZE is 2, but there is no store of torchrun")
    with refused, processes.joined(torch.device("cpu")):
        pass
    assert first_to_end()  # it says so by itself
    monkeypatch.setenv("WORLD_SIZE", "1")
    with processes.joined(torch.device("cpu")) as found:
        assert found is processes.ALONE


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_processes_that_wait_end_when_they_are_stopped(number: signal.Signals, data: Path, tmp_path: Path) -> None:
    """torchrun gets the signal, and hands it on: its processes have sessions of their own."""
    run = made(tmp_path / "run", data)
    with locked(run):
        command = torchrun(2, "steps.train", "--run", run, "--data", data, "--device", "cpu", start_new_session=True)
        assert command.stderr is not None
        assert any("another process works on" in line for line in command.stderr)
        time.sleep(3)  # until the other waits too
        start = time.monotonic()
        (os.killpg if number == signal.SIGINT else os.kill)(command.pid, number)
        try:
            _, said = command.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(command.pid, signal.SIGKILL)
            raise
    assert command.returncode != 0
    assert time.monotonic() - start < 20  # torchrun kills after 30 s
    ended = said.count("train: another process of this run ended, or torchrun was stopped")
    assert ended == said.count("train: ") == 1
