"""Runs as MLflow shows them: an experiment's parent with its tables, and a child for each training.

A run whose content is there already is left alone. One whose content changed is logged beside the earlier one, so that
both can be compared; the tag `state` says which is the newest.
"""

import getpass
import hashlib
import json
import subprocess
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import polars as pl

from steps.common import params
from steps.common.files import read_json
from steps.evaluation.names import OF_TASK
from steps.reporting.records import Record
from steps.tracking.store import NEWEST, here, logged, mark_newest, search

#: What a data set's card is.
CARD = ("card.html", "card.json", "croissant.json")
_BATCH = 1000  # metrics that MLflow takes in one call
_PARENT = "all"  # the key of an experiment's parent
_GIB = 2**30
#: One a row, so that its seeds and protocols look alike; the UI's own are by chance the same for two rows.
_COLOURS = (
    "#7f7f7f",
    "#1f77b4",
    "#d62728",
    "#2ca02c",
    "#9467bd",
    "#ff7f0e",
    "#17becf",
    "#8c564b",
    "#e377c2",
    "#bcbd22",
)
#: MLflow's names of a column's type, by Croissant's.
_TYPES = {"sc:Integer": "long", "sc:Float": "double", "sc:Text": "string", "sc:Boolean": "boolean"}


@dataclass
class _Content:
    """What a run of MLflow is to hold. times: its first and last millisecond since 1970."""

    key: str
    name: str
    digest: str
    times: tuple[int, int]
    tags: dict[str, str]
    params: dict[str, Any] = field(default_factory=dict)
    metrics: list[Any] = field(default_factory=list)
    datasets: list[Any] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    files: list[tuple[Path, str]] = field(default_factory=list)
    tables: dict[str, pl.DataFrame] = field(default_factory=dict)


def log_experiment(
    client: Any, experiment_id: str, records: list[Record], reports: list[Path], cards: Path
) -> tuple[str, dict[str, str]]:
    """Log the parent and its children; returns the parent's id, and the children's by the run's path.

    reports: the files to attach, of which each csv becomes a table too. cards: the folder of the data sets' cards.
    """
    datasets = {name: _dataset(name, records, cards) for name in dict.fromkeys(one.run.dataset for one in records)}
    several = len(datasets) > 1
    rows = list(dict.fromkeys(record.run.model for record in records))
    children = [
        _child(record, datasets[record.run.dataset], several, _COLOURS[rows.index(record.run.model) % len(_COLOURS)])
        for record in records
    ]
    parent_id = _log(client, experiment_id, _parent(records, children, reports, cards, list(datasets.values())))
    ids = {}
    for child in children:
        child.tags["mlflow.parentRunId"] = parent_id
        ids[child.key] = _log(client, experiment_id, child)
    return parent_id, ids


def _log(client: Any, experiment_id: str, content: _Content) -> str:
    """The id of the run with this content, which is logged if it is not there, and marked as the newest of its key."""
    known = search(client, experiment_id, f"tags.key = '{content.key}' and attributes.status = 'FINISHED'")
    for one in known:
        if one.data.tags["content"] == content.digest:
            run_id: str = one.info.run_id
            parent = content.tags.get("mlflow.parentRunId")
            if one.data.tags.get("mlflow.parentRunId") != parent:
                client.set_tag(run_id, "mlflow.parentRunId", parent)
            mark_newest(client, run_id, known)
            return run_id
    tags = content.tags | {"key": content.key, "content": content.digest, "state": NEWEST, "tracked_from": here()}
    start, end = content.times
    run = client.create_run(experiment_id, start_time=start, tags=tags, run_name=content.name)
    run_id = run.info.run_id
    _log_content(client, run_id, content)
    client.set_terminated(run_id, end_time=end)
    mark_newest(client, run_id, known)
    return run_id


def _log_content(client: Any, run_id: str, content: _Content) -> None:
    from mlflow.entities import Param

    client.log_batch(run_id, params=[Param(name, str(value)) for name, value in content.params.items()])
    for first in range(0, len(content.metrics), _BATCH):
        client.log_batch(run_id, metrics=content.metrics[first : first + _BATCH])
    if content.datasets:
        client.log_inputs(run_id, datasets=content.datasets)
    for name, text in content.texts.items():
        client.log_text(run_id, text, name)
    for path, folder in content.files:
        client.log_artifact(run_id, str(path), folder)
    for name, table in content.tables.items():
        client.log_table(run_id, table.to_dict(as_series=False), f"{name}.json")


def _parent(
    records: list[Record], children: list[_Content], reports: list[Path], cards: Path, datasets: list[Any]
) -> _Content:
    experiment = records[0].run.experiment
    title = params.load(f"experiments/{experiment}")["title"]
    files = [(path, "report") for path in reports]
    for dataset in datasets:
        name = dataset.dataset.name
        files += [(path, f"dataset/{name}") for path in _card(cards / name)]
    digest = hashlib.sha256(title.encode())
    for path, _ in files:
        digest.update(path.read_bytes())
    for child in children:
        digest.update(child.digest.encode())
    return _Content(
        key=_PARENT,
        name=f"{experiment}: all runs",
        digest=digest.hexdigest(),
        times=(min(child.times[0] for child in children), max(child.times[1] for child in children)),
        tags={
            "kind": "experiment",
            "mlflow.note.content": f"{title}. Tables and figures of {len(children)} runs, which are below.",
            "mlflow.source.name": "steps/tabulate.py",
            "mlflow.source.type": "LOCAL",
            "mlflow.user": _user(),
        },
        datasets=datasets,
        files=files,
        tables={path.stem: _filled(pl.read_csv(path)) for path in reports if path.suffix == ".csv"},
    )


def _child(record: Record, dataset: Any, several: bool, colour: str) -> _Content:
    """A training's run. several: whether the experiment has more than one data set, which names then say."""
    run, result = record.run, record.metrics
    start, end, said = _times(record)
    label = params.label(run.model)
    group = f"{f'{run.dataset}, ' if several else ''}{label}, {run.protocol}"
    tags = {
        "kind": "run",
        "dataset": run.dataset,
        "protocol": run.protocol,
        "model": label,
        "group": group,
        "seed": str(run.seed),
        "times": said,
        "mlflow.runColor": colour,
        "mlflow.user": _user(),
        "mlflow.source.name": "steps/train.py",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": _first_commit(result["commit"]),
    }
    tags |= {
        name: str(result[name]) for name in ("commit", "data_sha256", "weights_sha256", "device") if name in result
    }
    tags |= {f"version.{name}": version for name, version in result["versions"].items()}
    variants = [{"rule": rule, **values} for rule, values in result.get("variants", {}).items()]
    return _Content(
        key=str(run.path),
        name=f"{group}, seed {run.seed}",
        digest=hashlib.sha256("".join(record.light_texts().values()).encode()).hexdigest(),
        times=(start, end),
        tags=tags,
        params=dict(_flatten(record.config)),
        metrics=_metrics(record, start, end),
        datasets=[dataset],
        texts=record.texts,
        tables={"variants": pl.DataFrame(variants)} if variants else {},
    )


def _times(record: Record) -> tuple[int, int, str]:
    """When the training began and ended, in milliseconds since 1970, and how that is known."""
    result = record.metrics
    if result.get("started"):
        return _milliseconds(result["started"]), _milliseconds(result["ended"]), "of the training"
    took = round(1000 * (sum(map(_seconds_of, record.history)) or result["train_seconds"]))
    if result.get("ended"):
        end = _milliseconds(result["ended"])
        return end - took, end, "the end is the training's, the start the sum of its epochs before"
    commit = _commit_time(_first_commit(result["commit"]))
    if commit is None:
        now = round(time.time() * 1000)
        return now, now + took, "not recorded: the start is when it was tracked, the duration that of its epochs"
    return commit, commit + took, "not recorded: the start is its commit's time, the duration that of its epochs"


def _metrics(record: Record, start: int, end: int) -> list[Any]:
    """Every epoch's metrics at the time of its end; what is reported once at step 0, which the UI draws as bars."""
    from mlflow.entities import Metric

    def metric(name: str, value: float, moment: int, step: int) -> Any:
        return Metric(logged(name), value, moment, step)

    result, points, moment = record.metrics, [], float(start)
    metrics = OF_TASK[record.task]
    for line in record.history:
        moment += 1000 * _seconds_of(line)
        about = {name: line[name] for name in line if name == "train/loss" or name.partition("/")[2] in metrics}
        points += [
            metric(name, value, round(moment), line["epoch"]) for name, value in {**about, **_system(line)}.items()
        ]
    for part in ("test", "valid", "test_best"):
        values = {name: value for name, value in result.get(part, {}).items() if name != "epoch"}
        points += [metric(f"reported/{part}/{name}", value, end, 0) for name, value in values.items()]
    once = {"epoch": result["epoch"], "train_seconds": result["train_seconds"], "peak_bytes": result["peak_bytes"]}
    points += [metric(f"reported/{name}", value, end, 0) for name, value in once.items() if value is not None]
    return points


def _system(line: dict[str, Any]) -> dict[str, float]:
    """What an epoch took, from its line of the history; the UI has a page of its own for names of this prefix."""
    seconds, steps = line.get("train/seconds"), line.get("train/steps")
    found = {"seconds": seconds, "evaluation_seconds": _seconds_of(line) - (seconds or 0) or None}
    if seconds and steps:
        found["step_milliseconds"] = 1000 * seconds / steps
    if seconds and "train/cpu_seconds" in line:
        found["cpu_utilization_percent"] = 100 * line["train/cpu_seconds"] / seconds
    for name, key in (("resident", "train/resident_peak_bytes"), ("gpu", "train/peak_bytes")):
        if key in line:
            found[f"{name}_memory_peak_gib"] = line[key] / _GIB
    return {f"system/{name}": value for name, value in found.items() if value is not None}


def _seconds_of(line: dict[str, Any]) -> float:
    """Of an epoch and its evaluation."""
    return sum(line.get(f"{part}/seconds", 0.0) for part in ("train", "valid", "test"))


def _dataset(name: str, records: list[Record], cards: Path) -> Any:
    """The processed data of the records' runs as an input: hash, where its raw files come from, columns, counts."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    digest = next(record.metrics["data_sha256"] for record in records if record.run.dataset == name)
    entry = params.entry("datasets", name)
    origin = entry["source"][0] if isinstance(entry["source"], list) else entry["source"]
    address = origin.get("publisher")
    kind, source = ("http", {"url": address}) if address else ("local", {"uri": f"data/processed/{name}"})
    about: dict[str, str] = {}
    card = cards / name
    if (card / "card.json").is_file():
        about["profile"] = json.dumps(read_json(card / "card.json")["counts"])
    if (card / "croissant.json").is_file():
        tables = read_json(card / "croissant.json").get("recordSet", [])
        columns = [
            {"name": column["@id"], "type": _TYPES.get(column.get("dataType"), "string"), "required": True}
            for table in tables
            for column in table.get("field", [])
        ]
        about["schema"] = json.dumps({"mlflow_colspec": columns})
    # MLflow takes 36 characters. Its own digest of a table sees neither the order of rows nor all types.
    dataset = Dataset(name=name, digest=digest[:36], source_type=kind, source=json.dumps(source), **about)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "train, validation and test")])


def _card(folder: Path) -> list[Path]:
    return [folder / name for name in CARD if (folder / name).is_file()]


def _flatten(content: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat = []
    for name, value in content.items():
        flat += _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return flat


def _filled(table: pl.DataFrame) -> pl.DataFrame:
    """The table without columns that are empty."""
    return table.select(column for column in table if column.null_count() < len(column))


def _milliseconds(moment: str) -> int:
    return round(datetime.fromisoformat(moment).timestamp() * 1000)


def _first_commit(commits: str) -> str:
    """The first of those that a training was made at, without `-dirty`."""
    return commits.split("+")[0].removesuffix("-dirty")


def _commit_time(commit: str) -> int | None:
    """In milliseconds since 1970; None where git does not have the commit."""
    command = ["git", "show", "--no-patch", "--format=%ct", f"{commit}^{{commit}}", "--"]
    try:
        return 1000 * int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # of a process whose user has no name
        return "unknown"
