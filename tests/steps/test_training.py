"""The training loop: static shapes change no result, and a run ends alike alone, with others, and resumed."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from steps.common.device import pick_precision
from steps.common.files import read_json, write_json
from steps.common.processes import Processes
from steps.data.sequences import Sequences, load_sequences
from steps.data.split import HeldOut
from steps.evaluation.exact_ranks import Ranker, Rules, rank
from steps.evaluation.metrics import Ranks, metric_values
from steps.evaluation.retrieval import RetrievalEvaluation
from steps.models.base import compile_modules
from steps.tasks import Task, losses
from steps.tasks.sessions import Sessions
from steps.training import checkpoint
from steps.training.loop import Training, train_together
from steps.training.optimizers import Adagrad, make_optimizer
from steps.training.schedule import Schedule, Windows, bucket_size
from steps.training.stream import RunStream
from steps.training.validation import Validation
from tests.conftest import ROOT, write_processed
from tests.steps import twins
from tests.steps.runs import PAPER, config, planned, reproducible
from tests.steps.test_models import MAX_LEN, make, schedule_of, sequences


def windows_of(model: Task, data: Sequences, num_held_out: torch.Tensor, bucket: int, **settings: Any) -> Windows:
    """The schedule of windows, padded to multiples of `bucket` tokens."""
    schedule = schedule_of(model, data, num_held_out, **settings)
    assert isinstance(schedule, Windows)
    schedule.bucket = bucket
    return schedule


LOSSES = {
    "sampled-softmax": {"similarity": "cosine", "temperature": 0.05},
    "in-batch-softmax": {"similarity": "cosine", "temperature": 0.05},
    "softmax": {"similarity": "dot", "temperature": 1.0},
    "bce": {"similarity": "dot", "temperature": 1.0},
    "gbce": {"similarity": "dot", "temperature": 1.0, "calibration": 0.75},
}
MODELS = ["hstu", "hstu-softmax", "sasrec", "transformer++", "ligr", "fuxi-alpha", "fuxi-gamma", "gru", "bert4rec"]


def same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the first tokens of any batch see the same negatives."""
    torch.manual_seed(9)
    sampled = torch.randint(1, 50, (5000, 7))
    monkeypatch.setattr(losses, "_sample_negatives", lambda tokens, count, *_: sampled[:tokens, :count])
    monkeypatch.setattr(
        losses, "_sample_indices", lambda targets, count, token_mask: sampled[: len(targets), :count] % 40
    )


@pytest.mark.parametrize(
    ("name", "loss"),
    [(name, "softmax" if name == "bert4rec" else "sampled-softmax") for name in MODELS]
    + [("sasrec", loss) for loss in list(LOSSES)[1:]],
)
@pytest.mark.parametrize("bucket", [1, 7, 256])
def test_padding_changes_neither_loss_nor_gradients(
    name: str, loss: str, bucket: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    same_draws(monkeypatch)
    model = make(name, loss={"name": loss} | LOSSES[loss])
    data = sequences([9, 3, 40, 220, 2])
    users, num_held_out = torch.tensor([3, 0, 4, 2, 1]), torch.zeros(5, dtype=torch.int64)
    if name == "bert4rec":  # the same items masked, whatever lies behind them
        monkeypatch.setattr(
            model.masking,
            "sample",
            lambda last, *_: (torch.arange(len(last)) % 5 == 0) | (torch.arange(len(last)) == 3),
        )
    found = []
    schedule = windows_of(model, data, num_held_out, batch=5, bucket=bucket)
    ((shape, inputs),) = schedule.steps(users)
    assert shape.num_tokens % bucket == 0
    assert 0 <= shape.num_tokens - int(schedule.lengths.sum()) < bucket
    for value in (
        *twins.window_losses(model, data, users, num_held_out, MAX_LEN, 5),
        model.loss(schedule.batch(shape, inputs)),
    ):
        model.zero_grad()
        value.backward()
        found.append([value.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    for whole, padded in zip(*found, strict=True):
        torch.testing.assert_close(padded, whole, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("bucket", [1, 10, 25])
def test_padding_has_sequences_of_its_own(bucket: int) -> None:
    data, users = sequences([9, 3, 14]), torch.tensor([2, 0])
    num_held_out = torch.ones(3, dtype=torch.int64)
    schedule = windows_of(make("sasrec"), data, num_held_out, max_len=10, bucket=bucket)
    ((shape, inputs),) = schedule.steps(users)
    whole, padded = data.batch(users, num_held_out[users], 10), schedule.batch(shape, inputs)
    tokens = len(whole.item)
    assert len(padded.item) == shape.num_tokens == int(padded.offsets[-1])
    assert padded.token_mask is not None
    assert padded.token_mask.tolist() == [True] * tokens + [False] * (shape.num_tokens - tokens)
    for name in ("item", "timestamp", "next_item", "next_timestamp"):
        assert torch.equal(getattr(padded, name)[:tokens], getattr(whole, name))
        assert not getattr(padded, name)[tokens:].any()
    assert torch.equal(padded.offsets[:3], whole.offsets)
    assert padded.offsets.diff().max() <= 10
    assert torch.equal(padded.last, whole.last)


def test_buckets_are_multiples_of_256_and_a_24th_of_the_largest_batch() -> None:
    lengths = torch.tensor([10, 190] * 50)  # 90 from their mean
    assert bucket_size(128, 200, lengths) == 1024
    assert bucket_size(16, 20, lengths) == 256


def test_buckets_of_long_windows_are_as_large_as_batches_differ() -> None:
    assert bucket_size(64, 4096, torch.tensor([100, 300] * 50)) == 1280  # 1.5 x 100 x 8 = 1200; a 24th is 10,923
    assert bucket_size(64, 4096, torch.full((9,), 300)) == 256


def test_gru4rec_has_the_same_events_in_static_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("gru4rec")
    assert isinstance(model, Sessions)
    data, order = sequences([9, 3, 14, 5, 5, 7, 2]), torch.tensor([6, 2, 0, 1, 5, 4, 3])
    num_held_out = torch.zeros(7, dtype=torch.int64)
    sampled = data.item[:30].clone()
    monkeypatch.setattr(torch, "multinomial", lambda *_, **__: sampled)
    monkeypatch.setattr(torch, "searchsorted", lambda *_, **__: sampled)
    schedule = schedule_of(model, data, num_held_out, max_len=10)
    steps = [(shape, part) for shape, group in schedule.steps(order) for part in schedule.micro_steps(group)]
    eager = list(twins.session_losses(model, data, order, num_held_out, 10, 3))
    assert len(eager) == len(steps)
    for value, (shape, inputs) in zip(eager, steps, strict=True):
        found = []
        for one in (value, model.loss(schedule.batch(shape, inputs))):
            model.zero_grad()
            one.backward()
            found.append([one.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
        for first, second in zip(*found, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("alpha", [0.5, 0.0])
def test_gru4rec_draws_by_popularity(alpha: float) -> None:
    model = make("gru4rec", samples=40_000, sample_alpha=alpha)
    data, num_held_out = sequences([200] * 5), torch.zeros(5, dtype=torch.int64)
    schedule = schedule_of(model, data, num_held_out, max_len=10)
    shape, group = schedule.steps(torch.arange(5))[0]
    seen: list[torch.Tensor] = []
    logits = model.logits
    model.logits = lambda hidden, candidates, *vectors: (
        seen.append(candidates[len(hidden) :]),
        logits(hidden, candidates, *vectors),
    )[1]
    model.loss(schedule.batch(shape, schedule.micro_steps(group)[0]))
    expected = data.counts(num_held_out).double() ** alpha
    expected[0] = 0  # no item
    share = torch.bincount(seen[0], minlength=len(expected)) / 40_000
    torch.testing.assert_close(share.double(), expected / expected.sum(), rtol=0, atol=0.004)


def test_adagrad_is_torchs() -> None:
    torch.manual_seed(0)
    start = torch.randn(5, 3)
    weights = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    options = {"lr": 0.05, "initial_accumulator_value": 1e-6, "eps": 0.0}
    optimizers = [torch.optim.Adagrad(weights[:1], **options), Adagrad(weights[1:], **options)]
    for _ in range(4):
        gradient = torch.randn(5, 3)
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)
    sums = [optimizer.state_dict()["state"][0]["sum"] for optimizer in optimizers]
    torch.testing.assert_close(*sums, rtol=0, atol=0)


@pytest.mark.parametrize("name", [*MODELS, "gru4rec"])
def test_low_precision_is_near_full_and_states_stay_float32(name: str) -> None:
    model, data = make(name, torch.float32), sequences([9, 30])
    batch = data.batch(torch.arange(2), torch.zeros(2, dtype=torch.int64), MAX_LEN)
    full = model.encode(batch)
    model.encoder.compute_dtype = torch.bfloat16
    low = model.encode(batch)
    assert low.dtype == torch.float32
    assert torch.equal(full, low) != model.encoder.supports_low_precision
    assert torch.nn.functional.cosine_similarity(full, low).mean() > 0.99
    schedule = schedule_of(model.train(), data, torch.zeros(2, dtype=torch.int64))
    shape, inputs = schedule.epoch()[0]
    model.loss(schedule.batch(shape, schedule.micro_steps(inputs)[0])).backward()
    assert all(parameter.grad is None or parameter.grad.dtype == torch.float32 for parameter in model.parameters())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_processed(tmp_path_factory.mktemp("data") / "t", [9 + user % 17 for user in range(60)], 80)


def training(data: Path, run: Path, device: str = "cpu", **options: Any) -> Training:
    settings = options.pop("settings", None) or config(epochs=3)
    found, digest = load_sequences(data, torch.device(device))
    return Training(settings, found, digest, run, **options)


def compare_compiled(
    model: Task,
    schedule: Schedule,
    shape: Any,
    inputs: torch.Tensor,
    tolerance: float,
) -> None:
    """Loss and gradients of the compiled blocks and of the eager ones; tolerance: a share of the largest gradient.

    Some gradients, as those of SASRec's key biases, are only rounding errors.
    """
    model.compile_blocks()
    compiled_batch = torch.compile(schedule.batch, dynamic=True) if schedule.compiles else schedule.batch
    for micro_step in schedule.micro_steps(inputs)[:3]:
        found = []
        for stance in ("default", "force_eager"):
            model.zero_grad()
            torch.manual_seed(1)
            with model.frozen(), torch.compiler.set_stance(stance):
                loss = model.loss(compiled_batch(shape, micro_step))
                loss.backward()
            found.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
        model.loss(schedule.batch(shape, micro_step))  # so that lanes have a state
        largest = max(float(eager.abs().max()) for eager in found[1])
        for ours, eager in zip(*found, strict=True):
            torch.testing.assert_close(ours, eager, rtol=0, atol=tolerance * largest)


def same(first: Training, second: Training) -> None:
    assert reproducible(first.history) == reproducible(second.history)
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name


def train(*runs: Training) -> dict[int, Exception]:
    """Train all to their end; returns the errors of those that failed, by index."""
    return {index: error for index, error in train_together(list(runs)) if error}


@pytest.mark.parametrize("name", ["hstu", "gru4rec", "bert4rec"])
def test_runs_together_end_as_alone(name: str, data: Path, tmp_path: Path) -> None:
    settings = [config(name, epochs=2) | {"seed": seed} for seed in (3, 4)]
    together = [training(data, tmp_path / f"t{index}", settings=one) for index, one in enumerate(settings)]
    assert train(*together) == {}
    for index, one in enumerate(settings):
        alone = training(data, tmp_path / f"a{index}", settings=one)
        train(alone)
        same(alone, together[index])


def test_a_rowwise_table_keeps_two_bytes_a_float_and_four_a_row(data: Path, tmp_path: Path) -> None:
    kept = []
    for name in ("hstu", "hstu-rowwise"):
        one = training(data, tmp_path / name, settings=config(name, epochs=1))
        train(one)
        kept.append([one.record()[key] for key in ("item_bytes_per_float", "parameters")])
    assert [row[0] for row in kept] == [pytest.approx(12, abs=0.01), 2 + 4 / 16]
    assert kept[0][1] == kept[1][1]  # whatever learns the items


def test_a_run_that_fails_does_not_stop_the_others(data: Path, tmp_path: Path) -> None:
    diverges = config(epochs=2, optimizer={"lr": 1e30, "betas": [0.9, 0.98], "weight_decay": 0.0})
    runs = [training(data, tmp_path / "a", settings=diverges), training(data, tmp_path / "b")]
    assert list(train(*runs)) == [0]
    assert len(runs[1].history) == 3


def test_a_run_that_ends_need_not_wait_for_the_others(data: Path, tmp_path: Path) -> None:
    runs = [training(data, tmp_path / str(epochs), settings=config(epochs=epochs)) for epochs in (4, 1)]
    assert next(train_together(runs)) == (1, None)
    assert runs[0].done < 4


def test_a_run_whose_steps_are_not_done_lets_the_others_queue_theirs(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, other = (training(data, tmp_path / name, settings=config(epochs=2)) for name in ("slow", "other"))
    idle = property(lambda stream: stream is not slow.stream or (other.done == 2 and bool(pauses)))
    monkeypatch.setattr(type(slow.stream), "is_idle", idle)
    pauses: list[float] = []
    monkeypatch.setattr("steps.training.loop.time.sleep", pauses.append)
    ends = train_together([slow, other])
    assert next(ends) == (1, None)
    assert (slow.done, other.done, pauses) == (0, 2, [])
    assert slow._validation._calls == 0  # it has not read its loss yet
    assert list(ends) == [(0, None)]
    assert len(pauses) == 1  # as no run was left that had steps to queue
    alone = training(data, tmp_path / "alone", settings=config(epochs=2))
    train(alone)
    same(alone, slow)


def test_a_run_whose_evaluation_is_not_done_lets_the_others_queue_theirs(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, other = (training(data, tmp_path / name, settings=config(epochs=2)) for name in ("slow", "other"))
    validation, evaluated = slow._validation, []
    queue, line = validation.queue, validation.line

    def queued(stream: RunStream | None) -> None:
        evaluated.append(False)
        queue(stream)

    def read() -> dict[str, Any]:
        assert other.done == 2  # a run that reads before its evaluation is done stops the other
        assert slow.done == len(evaluated) - 1  # no line is in the history without its metrics
        evaluated[-1] = True
        return line()

    busy = property(lambda stream: stream is not slow.stream or all(evaluated) or other.done == 2)
    monkeypatch.setattr(RunStream, "is_idle", busy)
    monkeypatch.setattr(validation, "queue", queued)
    monkeypatch.setattr(validation, "line", read)
    assert list(train_together([slow, other])) == [(1, None), (0, None)]
    alone = training(data, tmp_path / "alone", settings=config(epochs=2))
    train(alone)
    same(alone, slow)


def test_processes_that_share_a_run_take_no_turns(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices end at their own times: the processes would go on with different runs, each waiting for the others."""
    run = training(data, tmp_path / "run")
    monkeypatch.setattr(RunStream, "is_idle", property(lambda _: False))
    assert next(run._turns_until_idle()) is False
    run.processes = Processes(0, 2)
    assert next(run._turns_until_idle(), None) is None


def test_other_runs_take_compiled_steps_while_an_evaluation_is_not_done(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluation itself is not compiled, with whatever number of processes; it is captured for one alone."""
    stances: list[str] = []
    queued: list[RunStream | None] = []
    run = training(data, tmp_path / "run")
    run.execution.capture = run.execution.compiled = True

    def note() -> None:
        stances.append(torch._dynamo.eval_frame._stance.stance)

    def queue(stream: RunStream | None) -> None:
        queued.append(stream)
        note()

    monkeypatch.setattr(RunStream, "is_idle", property(lambda _: len(stances) % 2 == 0))
    monkeypatch.setattr(run._validation, "queue", queue)
    monkeypatch.setattr(run._validation, "line", lambda: {"valid/mrr": 0.5})
    line: dict[str, Any] = {"epoch": 1}
    for turn in run._validate(line):
        assert turn is False
        note()
    assert stances == ["force_eager", "default"]
    assert line == {"epoch": 1, "valid/mrr": 0.5}
    run.processes = Processes(0, 2)
    assert next(run._validate(line), None) is None
    assert stances[2:] == ["force_eager"]
    assert queued == [run.stream, None]


class Counted:
    """An evaluation whose metric is how often it was called."""

    calls = 0

    def __call__(self, model: Any) -> torch.Tensor:
        self.calls += 1
        return torch.tensor(float(self.calls))

    def named(self, result: torch.Tensor) -> dict[str, float]:
        return {"calls": float(result)}


class Captures:
    """A stream on which a capture is as on CUDA: work is seen once, and a replay puts its result where it was."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def capture(self, work: Any, pooled: bool, uses_random: bool) -> tuple[Any, torch.Tensor]:
        assert not pooled  # between queue and line the result has to last, whatever graphs run
        assert not uses_random
        self.captures += 1
        result = work()

        def replay() -> None:
            self.replays += 1
            result.fill_(100.0 + self.replays)

        return SimpleNamespace(replay=replay), result


def test_the_second_evaluation_is_captured_and_each_later_one_replayed() -> None:
    stream: Any = Captures()
    model: Any = None
    validation, found = Validation(model, Counted(), "valid"), []
    for _ in range(4):
        validation.queue(stream)
        found.append(validation.line()["valid/calls"])
    assert found == [1, 101, 102, 103]
    assert (stream.captures, stream.replays) == (1, 3)


def test_every_evaluation_has_its_own_seconds_until_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("steps.training.validation.time.perf_counter", lambda: clock[0])
    model: Any = None
    evaluation = Counted()
    named = evaluation.named
    validation = Validation(model, evaluation, "valid")

    def wait(result: torch.Tensor) -> dict[str, float]:
        clock[0] += 0.25  # for the device
        return named(result)

    monkeypatch.setattr(evaluation, "named", wait)
    for calls, others in ((1.0, 0.5), (2.0, 2.0)):
        validation.queue()
        clock[0] += others  # the turns of other runs
        assert validation.line() == {"valid/calls": calls, "valid/seconds": others + 0.25}
        clock[0] += 10.0  # the next epoch


def test_a_run_that_fails_is_no_matter_to_one_that_waits(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, failing, third = (training(data, tmp_path / name, settings=config(epochs=2)) for name in ("a", "b", "c"))
    ended: list[int] = []

    def idle(stream: RunStream) -> bool:
        if stream is failing.stream:
            raise RuntimeError("the device is lost")  # as CUDA says it of the first call after an error
        return stream is not slow.stream or 1 in ended

    monkeypatch.setattr(RunStream, "is_idle", property(idle))
    errors = {}
    for index, error in train_together([slow, failing, third]):
        ended.append(index)
        errors[index] = error
    assert str(errors[1]) == "the device is lost"
    assert (errors[0], errors[2]) == (None, None)
    alone = training(data, tmp_path / "alone", settings=config(epochs=2))
    monkeypatch.undo()
    train(alone)
    same(alone, slow)
    same(alone, third)


def resumes_to_the_same_end(data: Path, folder: Path, device: str, settings: dict[str, Any]) -> None:
    whole = training(data, folder / "whole", device, settings=settings)
    train(whole)
    broken = training(data, folder / "broken", device, settings=settings)
    steps = broken.epochs()
    while len(broken.history) < 2:
        with broken.stream.active():
            next(steps)
    broken._states.finish()
    resumed = training(data, folder / "broken", device, settings=settings)
    assert len(resumed.history) == 2
    train(resumed)
    same(whole, resumed)
    assert resumed.record()["step_ms"] > 0
    assert resumed.record()["captured"] is (device == "cuda")


@pytest.mark.parametrize("name", ["hstu", "hstu-rowwise", "gru4rec"])
def test_a_resumed_training_ends_as_an_uninterrupted_one(name: str, data: Path, tmp_path: Path) -> None:
    resumes_to_the_same_end(data, tmp_path, "cpu", config(name, epochs=3))


def test_a_finished_state_still_says_how_long_a_step_took(data: Path, tmp_path: Path) -> None:
    one = training(data, tmp_path / "run", settings=config(epochs=2))
    train(one)
    again = training(data, tmp_path / "run", settings=config(epochs=2))
    train(again)
    assert again.record() == one.record()


def test_training_stops_when_validation_no_longer_improves(data: Path, tmp_path: Path) -> None:
    settings = config(epochs=50)
    settings["training"]["patience"] = 2
    stopped = training(data, tmp_path / "run", settings=settings)
    train(stopped)
    values = [line["valid/ndcg@10"] for line in stopped.history]
    best = values.index(max(values))
    assert len(values) < 50
    assert len(values) == best + 1 + 2
    assert stopped.record()["stopped_early"] == len(values)


def test_a_run_of_the_fixed_schedule_has_no_patience(data: Path, tmp_path: Path) -> None:
    settings = config(epochs=6)
    settings["training"]["patience"] = 1
    settings["protocol"] = settings["protocol"] | {"report": "last"}
    one = training(data, tmp_path / "run", settings=settings)
    train(one)
    assert len(one.history) == 6


def test_evaluating_less_often_changes_only_the_history(data: Path, tmp_path: Path) -> None:
    settings = config(epochs=7)
    settings["protocol"] = settings["protocol"] | {"report": "last"}
    often = training(data, tmp_path / "often", settings=settings)
    fewer = settings | {"training": settings["training"] | {"eval_every": 3}}
    seldom = training(data, tmp_path / "seldom", settings=fewer)
    train(often, seldom)
    assert [line["epoch"] for line in seldom.history] == [3, 6, 7]
    for name, tensor in often.model.state_dict().items():
        assert torch.equal(tensor, seldom.model.state_dict()[name])
    means = [line["train/loss"] for line in often.history]
    for line, expected in zip(seldom.history, (means[:3], means[3:6], means[6:]), strict=True):
        assert line["train/loss"] == pytest.approx(sum(expected) / len(expected), abs=2e-6)
        assert line["test/hr@10"] == often.history[line["epoch"] - 1]["test/hr@10"]


@pytest.mark.parametrize(
    ("device", "long", "exact", "mode"),
    [
        ("cpu", True, False, "eager"),
        ("cuda", False, False, "graph"),
        ("cuda", True, False, "compiled"),
        ("cuda", True, True, "graph"),
    ],
)
def test_a_training_takes_the_fastest_mode(
    device: str, long: bool, exact: bool, mode: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = training(data, tmp_path / "run")
    modes = []
    monkeypatch.setattr(run, "device", torch.device(device))
    monkeypatch.setattr("steps.training.loop.Execution", lambda *given: modes.append(given[-1]))
    monkeypatch.setattr("steps.training.loop._COMPILE_FROM_STEPS", 3 * run.schedule.num_updates + (not long))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: exact)
    run._execution(None)
    assert modes == [mode]


@pytest.mark.parametrize("on_cuda", [False, True])
@pytest.mark.parametrize("name", ["adamw", "adagrad"])
def test_on_cuda_the_optimiser_is_one_kernel_and_a_graph_can_hold_it(name: str, on_cuda: bool) -> None:
    task: Any = SimpleNamespace(
        optimizer=name,
        optimizer_config=SimpleNamespace(lr=0.1, betas=(0.9, 0.98), weight_decay=0.0),
        items=SimpleNamespace(weight=SimpleNamespace(is_cuda=on_cuda)),
        parameters=lambda: [torch.nn.Parameter(torch.ones(2))],
    )
    optimizer = make_optimizer(task)
    if name == "adagrad":
        assert isinstance(optimizer, Adagrad)
    else:
        assert [bool(optimizer.defaults[key]) for key in ("fused", "capturable")] == [on_cuda] * 2


def test_matrix_products_are_in_bfloat16_on_cuda() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert pick_precision(None, cuda) == ("bf16", torch.bfloat16)
    assert pick_precision("tf32", cuda) == ("tf32", None)
    assert pick_precision("bf16", cpu) == ("float32", None)


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic")  # as AdamW makes much of gradients that are nothing but rounding
@pytest.mark.parametrize("name", [*MODELS, "gru4rec", "hstu-rowwise"])
def test_captured_steps_are_eager_steps(name: str, data: Path, tmp_path: Path) -> None:
    settings = config(name, epochs=2)
    runs = [
        training(data, tmp_path / mode, "cuda", settings=settings, mode=mode, compute_dtype=torch.bfloat16)
        for mode in ("graph", "eager")
    ]
    for run in runs:
        train(run)
    assert runs[0].record()["captured"]
    for name, tensor in runs[0].model.state_dict().items():
        torch.testing.assert_close(tensor, runs[1].model.state_dict()[name], rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("name", ["hstu", "sasrec", "gru4rec"])
def test_captured_runs_together_end_as_alone(name: str, data: Path, tmp_path: Path) -> None:
    settings = [config(name, epochs=2) | {"seed": seed} for seed in (3, 4, 5)]
    together = [training(data, tmp_path / f"t{i}", "cuda", settings=one) for i, one in enumerate(settings)]
    assert train(*together) == {}
    for index, one in enumerate(settings):
        alone = training(data, tmp_path / f"a{index}", "cuda", settings=one)
        train(alone)
        same(alone, together[index])


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("name", ["hstu", "sasrec", "gru4rec", "bert4rec", "hstu-rowwise"])
def test_a_resumed_captured_training_ends_as_an_uninterrupted_one(
    name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_MIN_INTERVAL_S", 0.0)
    resumes_to_the_same_end(data, tmp_path, "cuda", config(name, epochs=3))


def validated(run: Training) -> dict[str, Any]:
    """The metrics of the run's model, from a new validation without a graph."""
    with run.stream.active():
        held_out = run.split.held_out[run.split.eval_part]
        evaluation = RetrievalEvaluation(run.config, run.sequences, held_out)
        validation = Validation(run.model, evaluation, run.split.eval_part)
        validation.queue()
        return validation.line()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", [*MODELS, "gru4rec", "hstu-rowwise"])
def test_the_last_line_of_a_history_is_what_the_model_scores(
    name: str, device: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On CUDA the evaluation is a graph that was captured after an earlier epoch."""
    settings = config(name, epochs=5) | {"protocol": PAPER}
    run = training(data, tmp_path / "run", device, settings=settings)
    train(run)
    assert run.history[1]["test/mrr"] != run.history[4]["test/mrr"]
    for key, value in validated(run).items():
        if "seconds" not in key:
            assert run.history[-1][key] == pytest.approx(value, abs=2e-6), key
    assert "without a CUDA graph" not in capsys.readouterr().out
    assert (run._validation._replay is not None) == (device == "cuda")


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic")
def test_a_run_continues_where_no_graph_can_hold_its_evaluation(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = training(data, tmp_path / "whole", "cuda")
    train(whole)

    def waits(ranks: Ranks) -> torch.Tensor:
        assert int(ranks.best.min()) >= 1
        return metric_values(ranks)

    monkeypatch.setattr("steps.evaluation.retrieval.metric_values", waits)
    broken = training(data, tmp_path / "broken", "cuda")
    train(broken)
    assert capsys.readouterr().out.count("without a CUDA graph") == 1
    same(whole, broken)


def test_all_models_but_the_gru_of_cudnn_have_blocks_to_compile() -> None:
    assert [name for name in MODELS if not make(name).compiled_modules] == ["gru"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*(name for name in MODELS if name != "gru"), "gru4rec"])
def test_compiled_blocks_are_eager_blocks(name: str) -> None:
    """Of all but the GRU of a kernel of cuDNN's, which has no blocks to compile."""
    model, on_cpu = make(name, torch.float32).cuda(), sequences([9, 3, 14, 5, 5, 7, 2])
    data = Sequences(on_cpu.offsets.cuda(), on_cpu.item.cuda(), on_cpu.timestamp.cuda(), on_cpu.num_items)
    schedule = schedule_of(model, data, torch.zeros(7, dtype=torch.int64, device="cuda"), batch=7)
    shape, inputs = schedule.steps(torch.arange(7))[0]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compare_compiled(model, schedule, shape, inputs, 1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize("name", ["bert4rec", "gru4rec"])
def test_what_torch_compile_does_not_take_runs_without_it(
    name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: refuse)
    run = training(data, tmp_path, settings=config(name), mode="compiled")
    for shape, inputs in run.schedule.epoch()[:2]:
        run.execution._warm_up(shape, run.schedule.micro_steps(inputs)[0])
    assert not run.execution.compiled
    assert capsys.readouterr().out.count("training without torch.compile") == 1


@pytest.mark.parametrize(
    ("name", "read", "compiled"),
    [("hstu", None, True), ("hstu", {"alpha": 1.2, "rule": "random"}, False), ("gru4rec", None, False)],
)
def test_what_makes_a_batch_is_compiled_where_it_draws_nothing(
    name: str, read: dict[str, Any] | None, compiled: bool, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.compile numbers draws in its own way: a compiled run would read other tokens by Stochastic Length."""
    given: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda call, **_: given.append(call) or call)
    settings = config(name)
    if read:
        settings["training"]["stochastic_length"] = read
    run = training(data, tmp_path, settings=settings, mode="compiled")
    assert (run.schedule.batch in given) is compiled
    assert given  # blocks are compiled in any case


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["hstu", "bert4rec", "gru4rec", "hstu-rowwise"])
def test_compiled_steps_are_captured_and_learn_alike(name: str, data: Path, tmp_path: Path) -> None:
    betas = [0.0, 0.0] if name == "gru4rec" else [0.9, 0.98]  # it trains with Adagrad
    settings = config(name, epochs=3, optimizer={"lr": 0.02, "betas": betas, "weight_decay": 0.0})
    settings["training"]["dropout"] = 0.0  # whose draws torch.compile numbers in its own way
    runs = [training(data, tmp_path / str(way), "cuda", settings=settings, mode=way) for way in ("compiled", "graph")]
    moved = []
    for run, compiled in zip(runs, (True, False), strict=True):
        before = run.model.items.weight.detach().clone().float()
        train(run)
        moved.append(float((run.model.items.weight.detach().float() - before).norm()))
        assert run.record()["compiled"] is compiled
        assert run.record()["captured"]
    losses, others = ([line["train/loss"] for line in run.history] for run in runs)
    assert losses == pytest.approx(others, rel=0.02)
    assert moved[0] == pytest.approx(moved[1], rel=0.1)
    assert moved[0] > 1


@pytest.mark.gpu
def test_cuda_trains_the_model_that_the_cpu_evaluates(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_json(run / "config.json", planned(config(epochs=3), data))
    reports = []
    for step, device in (("train", "cuda"), ("evaluate", "cuda"), ("evaluate", "cpu")):
        command = [sys.executable, "-m", f"steps.{step}", "--run", run, "--data", data, "--device", device]
        subprocess.run(command, check=True, cwd=ROOT)
        reports += [read_json(run / "metrics.json")] if step == "evaluate" else []
    assert reports[0]["test"]["mrr"] == pytest.approx(reports[1]["test"]["mrr"], abs=0.01)
    assert reports[0]["peak_bytes"] > 0


@pytest.mark.parametrize("name", ["sasrec", "transformer++", "ligr", "fuxi-alpha", "fuxi-gamma", "bert4rec", "gru4rec"])
def test_torch_compile_takes_the_blocks_once_for_all_sizes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real, graphs = torch.compile, CompileCounterWithBackend("aot_eager")
    left = name in ("sasrec", "transformer++", "ligr", "bert4rec")  # whose attention it leaves to torch
    fixed = {"backend": graphs, "fullgraph": not left}
    monkeypatch.setattr(torch, "compile", lambda *model, **options: real(*model, **options | fixed))
    torch._dynamo.reset()
    model, data = make(name).train(), sequences([9, 3, 14, 5, 5, 7, 2])
    schedule = schedule_of(model, data, torch.zeros(7, dtype=torch.int64))
    if isinstance(schedule, Windows):
        schedule.bucket = 8
    counts = []
    for order in (torch.tensor([6, 2, 0]), torch.tensor([1, 5, 4]), torch.tensor([0, 1, 3])):
        ((shape, inputs), *_) = schedule.steps(order)
        compare_compiled(model, schedule, shape, inputs, 1e-9)
        counts.append(graphs.frame_count)
    # With the batch's one. Where attention is left out, a block is two: before it and behind it. Of bert4rec the masks
    # are one and the output two, besides the blocks' four.
    assert 1 <= counts[0] <= (8 if name == "bert4rec" else 5 if left else 4)
    assert counts == counts[:1] * 3  # other sizes add none


class Dropped(torch.nn.Module):
    """A block that drops a share of its own."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(x, self.share)


def test_runs_of_more_settings_than_eight_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's limit by default, behind which the others would run uncompiled."""
    real, graphs = torch.compile, CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", lambda *model, **options: real(*model, **options | {"backend": graphs}))
    torch._dynamo.reset()
    blocks = [Dropped(number / 20) for number in range(1, 11)]
    with torch._dynamo.config.patch(recompile_limit=8):  # until compile_modules says otherwise
        compile_modules(blocks)
        for block in blocks:
            block(torch.ones(3))
    assert graphs.frame_count == 10


def test_what_torch_would_leave_uncompiled_is_refused() -> None:
    with pytest.raises(TypeError, match="torch compiles no Sequential in place: call it from a module of your own"):
        compile_modules([torch.nn.Sequential(torch.nn.Linear(2, 2))])


@pytest.mark.parametrize("name", [*(name for name in MODELS if name != "gru"), "gru4rec"])
def test_compiled_blocks_reckon_with_no_number_on_the_host(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a float that it takes as an input torch makes a kernel in C++, in half a minute."""
    found = []

    def look(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        of_type = {one.dtype for one in inputs if isinstance(one, torch.Tensor)} & {torch.float64}
        targets = {node.target for node in graph.graph.nodes} & {"item", torch.scalar_tensor}
        found.append(of_type | targets)
        return graph.forward

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *model, **options: real(*model, **options | {"backend": look}))
    torch._dynamo.reset()
    model, data = make(name, torch.float32).train(), sequences([9, 3, 14, 5, 5, 7, 2])
    schedule = schedule_of(model, data, torch.zeros(7, dtype=torch.int64))
    ((shape, inputs), *_) = schedule.steps(torch.arange(3))
    with torch._dynamo.config.patch(specialize_float=False):  # until compile_blocks says otherwise
        model.compile_blocks()
        model.loss(schedule.batch(shape, schedule.micro_steps(inputs)[0]))
    # Of gru4rec the shares by which items are drawn are float64.
    assert found == [{torch.float64} if name == "gru4rec" else set()] * len(found)
    assert found


@pytest.mark.gpu
def test_ranking_does_not_wait_for_the_device_and_agrees_with_the_cpu(data: Path, tmp_path: Path) -> None:
    one = training(data, tmp_path / "run", "cuda")
    held_out = one.split.held_out["valid"]
    rules = [Rules("rated", "history"), Rules("catalogue", "window")]
    ranker = Ranker(one.sequences, held_out, rules, 20, 16)
    assert len(ranker._batches) == 1  # of 16 users at once on a CPU
    ranker.rank(one.model)  # kernels are compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        finite, whole = ranker.rank(one.model)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert finite
    small = rank(
        one.model.cpu(),
        load_sequences(data, torch.device("cpu"))[0],
        HeldOut(held_out.users.cpu(), held_out.num_after.cpu()),
        rules,
        20,
        16,
    )
    for first, second in zip(whole, small, strict=True):
        assert (first.ranks.best.cpu() - second.ranks.best).double().abs().mean() < 0.5


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["bert4rec", "sasrec"])
def test_attention_in_low_precision_is_fused_and_not_cudnns(name: str, data: Path, tmp_path: Path) -> None:
    settings = config(name, dim=50, heads=1)
    run = training(data, tmp_path / "run", "cuda", settings=settings, compute_dtype=torch.bfloat16, mode="eager")
    with run.stream.active():
        users = torch.arange(5, device="cuda")
        batch = run.sequences.batch(users, torch.zeros_like(users), 20)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run.model.train().loss(batch).backward()
            torch.cuda.synchronize()
    kernels = " ".join(event.key for event in profile.key_averages())
    assert "flash_fwd" in kernels
    assert "cudnn" not in kernels
