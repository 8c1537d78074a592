"""The convergence log: MLPerf's form, the figures of the history, and one coherent clock, also after a kill."""

import json
from pathlib import Path
from typing import Any

import pytest

from steps.common.files import read_json, read_jsonl
from steps.training.mllog import mllog
from tests.conftest import ROOT, step, write_processed
from tests.steps.runs import PAPER, config, states
from tests.steps.test_train import finish, make_run

PREFIX = ":::MLLOG "
#: Of MLPerf's rules for every training: what a log has exactly once.
ONCE = {
    *("submission_benchmark", "submission_division", "submission_org", "submission_platform", "submission_status"),
    *("seed", "global_batch_size", "train_samples", "eval_samples", "init_start", "init_stop", "run_start", "run_stop"),
}


def events(text: str) -> list[dict[str, Any]]:
    lines = text.splitlines()
    assert all(line.startswith(PREFIX) for line in lines)
    return [json.loads(line.removeprefix(PREFIX)) for line in lines]


def check(found: list[dict[str, Any]]) -> None:
    """Every event is whole, time never goes back, intervals are closed in turn, and nothing is said twice."""
    keys = [event["key"] for event in found]
    assert {key for key in keys if keys.count(key) == 1} >= ONCE
    times = [event["time_ms"] for event in found]
    assert times == sorted(times)
    open_, seen = [], set()
    for event in found:
        assert list(event) == ["namespace", "time_ms", "event_type", "key", "value", "metadata"]
        name, _, end = event["key"].rpartition("_")
        if event["event_type"] == "INTERVAL_START":
            assert end == "start"
            open_.append((name, event["metadata"]))
        elif event["event_type"] == "INTERVAL_END":
            begun, about = open_.pop()
            assert (begun, end) == (name, "stop")
            assert about.items() <= event["metadata"].items()
        else:
            assert event["event_type"] == "POINT_IN_TIME"
            place = event["key"], event["metadata"].get("epoch_num")
            assert place not in seen
            seen.add(place)
    assert open_ == []


def values(found: list[dict[str, Any]], key: str) -> list[Any]:
    return [event["value"] for event in found if event["key"] == key]


LINES = [
    {
        "epoch": 2,
        "train/loss": 3.5,
        "train/seconds": 1.25,
        "valid/seconds": 0.5,
        "valid/ndcg@10": 0.2,
        "valid/mrr": 0.1,
    },
    {
        "epoch": 3,
        "train/loss": 3.0,
        "train/seconds": 0.75,
        "valid/seconds": 0.25,
        "valid/ndcg@10": 0.5,
        "valid/mrr": 0.4,
    },
]
ABOUT = {"epoch": 3, "device": "abacus", "precision": "bf16", "config_sha256": "c", "data_sha256": "d", "commit": "e"}
ABOUT |= {"started": "2024-02-17T09:30:00.500+00:00", "ended": "2024-02-17T09:40:00.000+00:00"}
BEGAN = 1708162200500  # of `date -d 2024-02-17T09:30:00.5Z +%s%3N`


def test_a_log_says_what_the_history_says_and_when() -> None:
    found = events(mllog(config("hstu"), LINES, ABOUT, 7, 5, "adamw"))
    check(found)
    about = {event["key"]: event["value"] for event in found if event["time_ms"] == BEGAN}
    assert (about["seed"], about["global_batch_size"], about["train_samples"], about["eval_samples"]) == (3, 16, 7, 5)
    assert (about["opt_name"], about["opt_base_learning_rate"], about["opt_adamw_beta_2"]) == ("adamw", 1e-3, 0.98)
    assert about["lowest_numerical_precision_in_linear"] == "bfloat16"
    assert about["submission_benchmark"] == "t/hstu/strict"
    timed = [(event["time_ms"] - BEGAN, event["key"]) for event in found]
    assert timed[timed.index((0, "run_start")) :] == [
        (0, "run_start"),
        (0, "block_start"),  # of two epochs, whose bound was not measured
        (1250, "train_loss"),
        (1250, "block_stop"),
        (1250, "eval_start"),
        (1750, "eval_accuracy"),
        (1750, "eval_stop"),
        (1750, "block_start"),
        (1750, "epoch_start"),
        (2500, "train_loss"),
        (2500, "epoch_stop"),
        (2500, "block_stop"),
        (2500, "eval_start"),
        (2750, "eval_accuracy"),
        (2750, "eval_stop"),
        (2750, "run_stop"),
    ]
    assert values(found, "eval_accuracy") == [0.2, 0.5]
    assert values(found, "train_loss") == [3.5, 3.0]
    blocks = [event["metadata"] for event in found if event["key"] == "block_start"]
    assert blocks == [{"first_epoch_num": 1, "epoch_count": 2}, {"first_epoch_num": 3, "epoch_count": 1}]
    last = [event["metadata"] for event in found if event["key"] == "eval_accuracy"][-1]
    assert last == {"epoch_num": 3, "metric": "ndcg@10", "split": "valid", "others": {"mrr": 0.4}}


def test_a_training_whose_start_is_not_known_ends_when_it_ended() -> None:
    found = events(mllog(config("hstu"), LINES, ABOUT | {"started": None}, 7, 5, "adamw"))
    check(found)
    assert found[-1]["time_ms"] == BEGAN + 599_500  # ten minutes after half past, without the half second


@pytest.mark.parametrize("model", ["popular", "gru4rec"])
def test_every_kind_of_model_has_a_log(model: str, tmp_path: Path) -> None:
    data = write_processed(tmp_path / "data", [9 + user % 17 for user in range(60)], 80)
    run = make_run(tmp_path / "run", config(model, PAPER, epochs=2), data)
    finish(run, data)
    found = events((run / "mllog.txt").read_text())
    check(found)
    history = read_jsonl(run / "history.jsonl")
    assert values(found, "eval_accuracy") == [line["test/ndcg@10"] for line in history]
    assert values(found, "opt_name") == ([] if model == "popular" else ["adagrad"])
    assert values(found, "eval_samples") == [60]
    assert values(found, "config_sha256") == [read_json(run / "training.json")["config_sha256"]]


def test_a_resumed_training_has_one_coherent_log(tmp_path: Path) -> None:
    data = write_processed(tmp_path / "data", [9 + user % 17 for user in range(60)], 80)
    settings = config(epochs=4)
    run = make_run(tmp_path / "run", settings, data)
    states(run, settings, data)
    assert "resuming after epoch 2" in step("train", "--run", run, "--data", data, "--device", "cpu", cwd=ROOT).stdout
    found = events((run / "mllog.txt").read_text())
    check(found)
    assert [event["metadata"]["epoch_num"] for event in found if event["key"] == "eval_accuracy"] == [1, 2, 3, 4]
    history = read_jsonl(run / "history.jsonl")
    measured = sum(line["train/seconds"] + line["valid/seconds"] for line in history)
    run_start, run_stop = (next(event for event in found if event["key"] == f"run_{end}") for end in ("start", "stop"))
    assert run_stop["time_ms"] - run_start["time_ms"] == pytest.approx(1000 * measured, abs=1)
