"""Several processes take the steps of one, evaluate to its ranks, and stop and go on together."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from kernels.rowwise_table import naive, torchrec
from steps.common.cli import StepError
from steps.common.files import read_json, read_jsonl, write_json
from steps.common.processes import Processes
from steps.data.sequences import Batch, Sequences, load_sequences
from steps.training import distributed
from steps.training.checkpoint import State, state_tensors, write_state
from steps.training.distributed import balanced
from steps.training.loop import Training
from steps.training.schedule import Windows
from tests.conftest import ROOT, write_processed
from tests.steps import test_ranking
from tests.steps.distributed_faults import Replayed
from tests.steps.distributed_steps import steps
from tests.steps.runs import PAPER, config, planned

ENVIRONMENT = {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
ROWWISE_BY_TORCHREC = pytest.param(
    "hstu-rowwise",
    "torchrec",
    marks=pytest.mark.skipif(not torchrec.available(), reason="TorchRec is not installed"),
)
two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def torchrun(processes: int, *command: object, **options: Any) -> subprocess.Popen[str]:
    """The command by so many processes on this machine."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "--"]
    return subprocess.Popen(
        [*start, *map(str, command)],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def without_dropout(model: str, **changes: Any) -> dict[str, Any]:
    """A config whose steps draw nothing but negatives."""
    settings = config(model, **changes)
    settings["training"] |= {"dropout": 0.0}
    return settings


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 users: of batches of 16 the last has 2, fewer than 4 processes."""
    return write_processed(tmp_path_factory.mktemp("data") / "t", [9 + user % 17 for user in range(50)], 80)


def test_the_costliest_window_goes_first_and_to_the_part_that_costs_least() -> None:
    # 9 to the first part, both 4 to the second, a 1 to the second, which has 8, and of equal parts the first gets one.
    assert balanced([9, 1, 4, 4, 1], 2) == [[0, 4], [1, 2, 3]]
    assert balanced([5, 5, 5], 2) == [[0, 2], [1]]
    assert balanced([7], 3) == [[0], [], []]
    # The second part has its two windows by then, so that the last ones go to the first, which costs most.
    assert balanced([9, 1, 1, 1], 2) == [[0, 3], [1, 2]]
    torch.manual_seed(0)
    costs = (torch.randint(1, 201, (128,)) ** 2).tolist()
    for parts in (2, 4, 7):
        found = balanced(costs, parts)
        assert sorted(index for part in found for index in part) == list(range(128))
        assert max(map(len, found)) == -(-128 // parts)
        of_parts = [sum(costs[index] for index in part) for part in found]
        assert max(of_parts) - min(of_parts) <= max(costs)


def of_part(settings: dict[str, Any], data: Sequences, folder: Path, rank: int, size: int) -> Training:
    return Training(settings, data, "", folder, processes=Processes(rank, size))


@pytest.mark.parametrize("changes", [{}, {"stochastic_length": {"alpha": 1.2, "rule": "recent"}}])
def test_the_parts_of_a_batch_are_all_of_it(changes: dict[str, Any], data: Path, tmp_path: Path, alone: None) -> None:
    settings = without_dropout("hstu")
    settings["training"] |= changes
    found, _ = load_sequences(data, torch.device("cpu"))
    whole = Training(settings, found, "", tmp_path).schedule
    assert isinstance(whole, Windows)
    torch.manual_seed(4)
    expected = whole.epoch()
    parts = []
    for rank in range(3):
        schedule = of_part(settings, found, tmp_path, rank, 3).schedule
        torch.manual_seed(4)
        parts.append([(schedule, step) for step in schedule.epoch()])
    for (shape, inputs), *of_processes in zip(expected, *parts, strict=True):
        batch = whole.batch(shape, inputs)
        total = int(batch.token_mask.sum())
        item, next_item = torch.zeros(2, total, dtype=torch.int64)
        share = 0.0
        for schedule, step in of_processes:
            if step.inputs.shape[1]:
                own = schedule.batch(*step)
                item[own.part.place[own.token_mask]] += own.item[own.token_mask]
                next_item[own.part.place[own.token_mask]] += own.next_item[own.token_mask]
                share += float(schedule.share(own, step.inputs))
                assert own.part.num_tokens == shape.num_tokens
        assert torch.equal(item, batch.item[:total])
        assert torch.equal(next_item, batch.next_item[:total])
        assert share == pytest.approx(1)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that are none: each keeps the sums of its own part."""
    monkeypatch.setattr(Processes, "sum_", lambda self, tensor: None)
    monkeypatch.setattr(Processes, "gathered", lambda self, text: [text] * self.size)


@pytest.fixture
def group() -> Iterator[None]:
    """A group of one process, which has all rows of a table that processes share."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("case", ["hstu", "hstu-rowwise", "ranking"])
def test_captured_steps_are_those_that_are_not(
    case: str, data: Path, tmp_path: Path, alone: None, group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is captured reads a step's own values from buffers, and nothing else of the step that it was made of."""
    settings = deepcopy(CASES[case]) if case in CASES else without_dropout(case)
    settings["training"] |= {"dropout": 0.1}
    monkeypatch.setattr(distributed, "unique", naive.padded_unique)  # as on CUDA, in a size that is known beforehand
    found = test_ranking.sequences() if case == "ranking" else load_sequences(data, torch.device("cpu"))[0]
    results = []
    for captured in ("nothing", "all", "all but the update"):
        training = of_part(settings, found, tmp_path, 0, 2)
        captures: list[Replayed] = []
        fails = captured == "all but the update"

        def capture(
            work: Callable[[], Any], made: list[Replayed] = captures, fails: bool = fails, **how: Any
        ) -> tuple[Replayed, None]:
            if fails and not how.get("uses_random", True):
                raise RuntimeError("operation not permitted when stream is capturing")
            made.append(Replayed(work))
            return made[-1], None

        monkeypatch.setattr(training.stream, "capture", capture)
        training.execution.capture = captured != "nothing"
        training.model.train()
        torch.manual_seed(4)
        steps = training.schedule.epoch()
        for number, step in enumerate([*steps, *steps]):
            training.execution(step, number)
        shapes = {(step.shape, step.inputs.shape) for step in steps}
        of_shape = 2 if case == "hstu-rowwise" else 1  # before the lookup, and behind it
        made = {"nothing": 0, "all": of_shape * len(shapes) + 1, "all but the update": of_shape * len(shapes)}
        assert len(captures) == made[captured]
        assert training.execution.captured is (captured == "all")
        results.append([*training.model.state_dict().values(), training.execution.total])
    assert len(steps) > len(shapes)
    for first, *others in zip(*results, strict=True):
        assert all(torch.equal(first, other) for other in others)


DOT = {"similarity": "dot", "temperature": 1.0}
CASES = {
    "hstu": without_dropout("hstu"),
    "sasrec": without_dropout("sasrec"),
    "softmax": without_dropout("sasrec", loss={"name": "softmax", **DOT}),
    "bce": without_dropout("sasrec", loss={"name": "bce", **DOT}),
    "gbce": without_dropout("hstu", loss={"name": "gbce", "calibration": 0.75, **DOT}),
    "ranking": test_ranking.config(),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_of_the_parts_add_up_to_those_of_the_batch(
    case: str, data: Path, tmp_path: Path, alone: None
) -> None:
    settings = CASES[case]
    found, _ = load_sequences(data, torch.device("cpu"))
    if case == "ranking":
        settings["training"] |= {"dropout": 0.0}
        found = test_ranking.sequences()
    torch.set_default_dtype(torch.float64)
    try:
        one = Training(settings, found, "", tmp_path)
        one.model.train()
        torch.manual_seed(4)
        step = one.schedule.epoch()[-1]
        torch.manual_seed(11)
        loss = one.model.loss(one.schedule.batch(*step))
        loss.backward()
        sums = []
        for rank in range(3):
            part = of_part(settings, found, tmp_path, rank, 3)
            part.model.train()
            torch.manual_seed(4)
            part.execution(part.schedule.epoch()[-1], 11)
            sums.append(part.execution._sums)
    finally:
        torch.set_default_dtype(torch.float32)
    gradients = [torch.zeros(0)] + [
        (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).flatten()
        for parameter in one.model.parameters()
    ]
    torch.testing.assert_close(sum(sums), torch.cat([*gradients, loss.detach()[None]]), rtol=1e-10, atol=1e-14)


def test_processes_drop_out_differently_and_draw_the_same_negatives(
    data: Path, tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first numbers of a step are others in each process and step, but for those that negatives are drawn by."""
    found, _ = load_sequences(data, torch.device("cpu"))
    of_dropout: list[float] = []
    of_negatives: list[list[float]] = [[], []]
    for rank in range(2):
        training = of_part(config("hstu"), found, tmp_path, rank, 2)

        def drawing(batch: Batch, rank: int = rank, loss: Callable[..., torch.Tensor] = training.model.loss) -> Any:
            of_dropout.append(float(torch.rand(())))
            of_negatives[rank].append(float(torch.rand((), generator=batch.part.draws)))
            return loss(batch)

        monkeypatch.setattr(training.model, "loss", drawing)
        for _ in training._epoch(1, ""):
            pass
    steps = len(training.schedule.epoch())
    assert of_negatives[0] == of_negatives[1]
    assert len({*of_dropout, *of_negatives[0]}) == 3 * steps


def test_processes_go_on_from_the_state_of_a_compiled_one(
    data: Path, tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several processes are never compiled; a long training by one on CUDA is."""
    monkeypatch.setattr(Training, "_best_mode", lambda self: "compiled")
    settings = config("sasrec")
    found, _ = load_sequences(data, torch.device("cpu"))
    one = Training(settings, found, "", tmp_path)
    assert one.execution.compiled
    progress = {"identity": one._identity, "history": [{"epoch": 3}], "commits": [], "threads": []}
    write_state(tmp_path / "resume/state.safetensors", State(state_tensors(one.model, one.optimizer, {}), progress))
    part = of_part(settings, found, tmp_path, 1, 2)
    assert not part.execution.compiled
    assert part.done == 3


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize(
    ("model", "by"),
    [("hstu", ""), ("sasrec", ""), ("hstu-rowwise", "torch"), ("hstu-rowwise", "padded"), ROWWISE_BY_TORCHREC],
)
def test_processes_take_the_steps_of_one_and_rank_as_one(
    model: str, by: str, processes: int, data: Path, tmp_path: Path
) -> None:
    one, *of_processes = compared(model, by, processes, data, tmp_path, "cpu")
    for found in of_processes:
        assert found.keys() == one.keys()
        for name, value in found.items():
            assert torch.equal(value, of_processes[0][name]), name
            if is_ranked(name):
                assert torch.equal(value, one[name]), name
            else:
                tolerance = 1e-4 if by else 1e-9  # the rowwise table has float32 alone
                torch.testing.assert_close(value, one[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.gpu
@two_devices
@pytest.mark.parametrize(
    ("model", "by"), [("hstu", ""), ("sasrec", ""), ("hstu-rowwise", "torch"), ROWWISE_BY_TORCHREC]
)
def test_two_devices_take_the_steps_of_one_and_rank_as_one(model: str, by: str, data: Path, tmp_path: Path) -> None:
    one, *of_processes = compared(model, by, 2, data, tmp_path, "cuda")
    for found in of_processes:
        for name, value in found.items():
            assert torch.equal(value, of_processes[0][name]), name
            if is_ranked(name):
                assert torch.equal(value, one[name]), name
        # Not the weights: AdamW makes steps of equal size from gradients that are rounding errors alone.
        torch.testing.assert_close(found["losses"], one["losses"], rtol=1e-3, atol=0)


def is_ranked(name: str) -> bool:
    return name.split("/")[0] in ("best", "ties", "top")


def compared(
    model: str, by: str, processes: int, data: Path, folder: Path, device: str
) -> list[dict[str, torch.Tensor]]:
    """What `steps` finds of one process, and of each of several; all rank by the weights of the first."""
    table = {"items": {"lr": 0.05, "dtype": "float32", "negative_pool": 50}} if by else {}
    settings = without_dropout(model, protocol=PAPER, **table)
    write_json(folder / "config.json", settings)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trained = steps(settings, data, folder, torch.device(device))
        weights = {name.split("/")[1]: value for name, value in trained.items() if name.startswith("weights/")}
        torch.save(weights, folder / "weights.pt")
        one = steps(settings, data, folder, torch.device(device))
    finally:
        torch.set_num_threads(threads)
    command = torchrun(processes, "tests.steps.distributed_steps", folder, data, by, device)
    _, said = command.communicate(timeout=300)
    assert command.returncode == 0, said[-3000:]
    return [one, *(load_file(folder / f"found-{rank}.safetensors") for rank in range(processes))]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (config("bert4rec"), "one process trains this model"),
        (config("gru4rec"), "one process trains this model"),
        (
            config("hstu", loss={"name": "in-batch-softmax", "similarity": "cosine", "temperature": 0.05}),
            "one process trains this model",
        ),
    ],
)
def test_what_processes_cannot_share_is_refused(
    settings: dict[str, Any], said: str, data: Path, tmp_path: Path
) -> None:
    found, _ = load_sequences(data, torch.device("cpu"))
    with pytest.raises(StepError, match=said):
        of_part(settings, found, tmp_path, 0, 2)


def train(processes: int, run: Path, data: Path) -> subprocess.Popen[str]:
    return torchrun(processes, "steps.train", "--run", run, "--data", data, "--device", "cpu")


def workers(command: subprocess.Popen[str]) -> list[int]:
    """The process ids that torchrun started, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            variables = dict(
                entry.split("=", 1) for entry in (folder / "environ").read_text().split("\0") if "=" in entry
            )
        except OSError:  # it has ended
            continue
        if parent == command.pid and "RANK" in variables:
            found[int(variables["RANK"])] = int(folder.name)
    return [found[rank] for rank in sorted(found)]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes in /proc")
def test_a_killed_process_stops_all_and_others_go_on_and_evaluate(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_json(run / "config.json", planned(config("hstu-rowwise", epochs=40), data))
    for processes, killed in ((2, 1), (3, 0)):
        command = train(processes, run, data)
        assert command.stdout is not None
        epochs = [
            line for line, _ in zip((line for line in command.stdout if "epoch " in line), range(4), strict=False)
        ]
        os.kill(workers(command)[killed], signal.SIGKILL)
        start = time.monotonic()
        _, said = command.communicate(timeout=60)
        assert time.monotonic() - start < 60
        assert command.returncode != 0
        assert said.count("train: ") == 1, said
        assert (
            "train: another process of this run ended, or torchrun was stopped: all stop; the same command goes on"
            in said
        )
        assert not workers(command)
        assert sorted(path.name for path in run.iterdir()) == ["config.json", "resume"]
        assert [path.name for path in (run / "resume").iterdir() if path.suffix == ".safetensors"]
        if processes == 3:
            assert "resuming after epoch" in epochs[0]
    command = train(2, run, data)
    printed, said = command.communicate(timeout=300)
    assert command.returncode == 0, said
    assert printed.count("resuming after epoch") == 1  # one process prints
    history = read_jsonl(run / "history.jsonl")
    assert [line["epoch"] for line in history] == list(range(1, 41))
    assert sorted(path.name for path in run.iterdir()) == [
        "config.json", "history.jsonl", "mllog.txt", "model.safetensors", "training.json",
    ]  # fmt: skip
    assert read_json(run / "training.json")["processes"] == 2
    outcomes = []
    for processes in (1, 2):
        command = torchrun(processes, "steps.evaluate", "--run", run, "--data", data, "--device", "cpu")
        _, said = command.communicate(timeout=120)
        assert command.returncode == 0, said
        outcomes.append((run / "outcomes.safetensors").read_bytes())
    assert outcomes[0] == outcomes[1]
