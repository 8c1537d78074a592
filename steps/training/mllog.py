"""A run's convergence log in the lines that MLPerf's tools read: `:::MLLOG {...}`, an event each.

A view of what a run's other files say. Its clock begins when the first epoch did, and goes on by the seconds that
`history.jsonl` measured: what a training lost by a kill is no part of them, the turns of other runs on its GPU are. An
event is at a millisecond of UTC. Initialisation is not measured: its start and stop have the time of the run's start.
"""

import json
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

from steps.common.config import task_of
from steps.evaluation.names import SELECTIONS

_PRECISIONS = {"bf16": "bfloat16", "tf32": "tf32", "float32": "fp32"}  # MLPerf's names
_ORGANISATION = "The HSTU reproduction maintainers"


def mllog(
    config: dict[str, Any],
    history: list[dict[str, Any]],
    training: dict[str, Any],
    train_samples: int,
    eval_samples: int,
    optimizer: str | None,
) -> str:
    """The log of a run, a line an event.

    config, history, training: what config.json, history.jsonl and training.json hold. train_samples: sequences that an
    epoch goes over; eval_samples: targets of an evaluation. optimizer: None of a model that counts.
    """
    seconds = [line["train/seconds"] + _evaluation(line)[1] for line in history]
    if training["started"] is not None:
        start = datetime.fromisoformat(training["started"])
    else:
        start = datetime.fromisoformat(training["ended"]) - timedelta(seconds=sum(seconds))
    first = round(start.timestamp() * 1000)
    lines = [_line(first, "POINT_IN_TIME", key, value) for key, value in _pinned(config, training, optimizer).items()]
    lines += [_line(first, "POINT_IN_TIME", "train_samples", train_samples)]
    lines += [_line(first, "POINT_IN_TIME", "eval_samples", eval_samples)]
    lines += [_line(first, "INTERVAL_START", "init_start"), _line(first, "INTERVAL_END", "init_stop")]
    lines.append(_line(first, "INTERVAL_START", "run_start"))
    for before, line in enumerate(history):
        done = history[before - 1]["epoch"] if before else 0
        lines += _epochs(
            line, done, first + 1000 * sum(seconds[:before]), SELECTIONS[task_of(config["protocol"])].metric
        )
    about = {"status": "success", "epoch_num": training["epoch"]}
    lines.append(_line(first + 1000 * sum(seconds), "INTERVAL_END", "run_stop", **about))
    return "".join(lines)


def _pinned(config: dict[str, Any], training: dict[str, Any], optimizer: str | None) -> dict[str, Any]:
    """What MLPerf wants pinned, under its names where it has one."""
    settings = config["training"]
    found = {
        "submission_benchmark": f"{config['dataset']}/{config['row']}/{config['protocol']['name']}",
        "submission_division": "open",
        "submission_org": _ORGANISATION,
        "submission_platform": training["device"],
        "submission_status": "research",
        "cache_clear": False,
        "seed": config["seed"],
        "global_batch_size": settings["batch"],
        "max_sequence_length": settings["max_len"],
        "lowest_numerical_precision_in_linear": _PRECISIONS[training["precision"]],
        "config_sha256": training["config_sha256"],
        "data_sha256": training["data_sha256"],
        "commit": training["commit"],
    }
    if optimizer is not None:
        values = config["model"]["optimizer"]
        found |= {"opt_name": optimizer, "opt_base_learning_rate": values["lr"]}
        if optimizer == "adamw":
            found |= {"opt_adamw_beta_1": values["betas"][0], "opt_adamw_beta_2": values["betas"][1]}
            found |= {"opt_adamw_weight_decay": values["weight_decay"]}
    return found


def _epochs(line: dict[str, Any], before: int, time: float, selection: str) -> Iterator[str]:
    """The events of a line of the history, whose first epoch begins at `time` (ms) after so many epochs. selection: the
    metric that chooses an epoch."""
    part, evaluating = _evaluation(line)
    last, trained = line["epoch"], time + 1000 * line["train/seconds"]
    block = {"first_epoch_num": before + 1, "epoch_count": last - before}
    yield _line(time, "INTERVAL_START", "block_start", **block)
    if last == before + 1:  # where several are trained at once, their bounds are not measured
        yield _line(time, "INTERVAL_START", "epoch_start", epoch_num=last)
    if "train/loss" in line:
        yield _line(trained, "POINT_IN_TIME", "train_loss", line["train/loss"], epoch_num=last)
    if last == before + 1:
        yield _line(trained, "INTERVAL_END", "epoch_stop", epoch_num=last)
    yield _line(trained, "INTERVAL_END", "block_stop", **block)
    yield _line(trained, "INTERVAL_START", "eval_start", epoch_num=last)
    evaluated = trained + 1000 * evaluating
    metrics = {name.partition("/")[2]: value for name, value in line.items() if name.startswith(f"{part}/")}
    metrics.pop("seconds")
    value = metrics.pop(selection)
    about = {"epoch_num": last, "metric": selection, "split": part, "others": metrics}
    yield _line(evaluated, "POINT_IN_TIME", "eval_accuracy", value, **about)
    yield _line(evaluated, "INTERVAL_END", "eval_stop", epoch_num=last)


def _evaluation(line: dict[str, Any]) -> tuple[str, float]:
    """The split that a line of the history was evaluated on, and the seconds that took."""
    part = "valid" if "valid/seconds" in line else "test"
    return part, line[f"{part}/seconds"]


def _line(time: float, kind: str, key: str, value: Any = None, **metadata: Any) -> str:
    content = {"namespace": "", "time_ms": round(time), "event_type": kind, "key": key, "value": value}
    return f":::MLLOG {json.dumps(content | {'metadata': metadata}, allow_nan=False)}\n"
