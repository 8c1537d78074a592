"""Bring an experiment's finished runs into an MLflow store, to compare them in its UI.

One MLflow experiment per experiment, one MLflow run per (dataset, model, protocol, seed). A run that is
already there with the same content is left alone; one whose content changed is replaced. Tracking after
training, under a lock, keeps SQLite's single writer from losing records when trainings run in parallel.
"""

import argparse
import hashlib
import os
import sys
from pathlib import Path
from typing import Any

from filelock import FileLock

from steps.common.cli import StepError, run_step
from steps.common.files import atomic_path, write_json
from steps.reporting.records import Record, read_records

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

_REPORTS = ("table.md", "table.html", "curves.svg", "curves.png", "comparisons.md", "intervals.svg")
_CARD = ("card.html", "card.json", "croissant.json")
_BATCH = 1000  # metrics that MLflow takes in one call


def track(experiment: str, runs: Path, reports: Path, cards: Path, store: Path) -> dict[str, str]:
    """Log every finished run; returns the MLflow run id of each, by the run's path.

    reports: the experiment's tables and figures. cards: the folder of the data sets' cards.
    """
    records, _ = read_records(experiment, runs)
    attached = _attached(records, reports, cards)
    with FileLock(store.with_name(f".{store.name}.writer.lock")):
        client = _open(store)
        found = client.get_experiment_by_name(experiment)
        artifacts = (store.parent / "mlartifacts" / experiment).resolve().as_uri()
        experiment_id = found.experiment_id if found else client.create_experiment(experiment, artifacts)
        return {
            str(record.run.path): _track_run(
                client, experiment_id, record, runs / record.run.path, attached[record.run.dataset]
            )
            for record in records
        }


def _open(store: Path) -> Any:
    """A client of the SQLite file `store`, which is made beside its place first if it is not there.

    MLflow never opens a store again whose tables it was making when it was killed.
    """
    from mlflow import MlflowClient  # 1.2 s: only when needed
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    if not store.exists():
        with atomic_path(store) as temporary:
            MlflowClient(f"sqlite:///{temporary}").search_experiments()
    try:
        client = MlflowClient(f"sqlite:///{store}")
        client.search_experiments(max_results=1)
    except (MlflowException, SQLAlchemyError) as error:
        what = str(error).splitlines()[0]
        raise StepError(
            f"MLflow cannot open {store} ({what}); move it away and run the same command again, which makes a new one "
            "and tracks this experiment's runs in it"
        ) from error
    return client


def _attached(records: list[Record], reports: Path, cards: Path) -> dict[str, list[tuple[Path, str]]]:
    """By data set, the files that a run has beside its own, each with its folder there.

    Records can be tracked where their data are not to be had, and then without a card.
    """
    attached = {}
    for dataset in dict.fromkeys(record.run.dataset for record in records):
        card = [cards / dataset / name for name in _CARD if (cards / dataset / name).is_file()]
        if len(card) < len(_CARD):
            print(f"track: {cards / dataset} lacks its data card; to attach it, run card and track", file=sys.stderr)
        attached[dataset] = [(reports / name, "report") for name in _REPORTS] + [(path, "dataset") for path in card]
    return attached


def _track_run(client: Any, experiment_id: str, record: Record, folder: Path, attached: list[tuple[Path, str]]) -> str:
    run, result = record.run, record.metrics
    weights = folder / "model.safetensors"
    digest = hashlib.sha256("".join(record.texts.values()).encode())
    if weights.is_file():  # records have none
        digest.update(weights.read_bytes())
    content = digest.hexdigest()
    key = str(run.path)
    known = client.search_runs([experiment_id], f"tags.run = '{key}' and attributes.status = 'FINISHED'")
    for old in known:
        if old.data.tags["content"] == content:
            _attach(client, old.info.run_id, attached)
            return old.info.run_id
    tags = {"run": key, "content": content, "mlflow.source.git.commit": result["commit"]}
    tags |= {name: str(result[name]) for name in ("commit", "data_sha256", "device")}
    tags |= {f"version.{name}": version for name, version in result["versions"].items()}
    name = f"{run.model}/{run.protocol}/seed-{run.seed}"
    run_id = client.create_run(experiment_id, tags=tags, run_name=name).info.run_id
    _log_params(client, run_id, record.config)
    _log_metrics(client, run_id, record.history, result)
    _log_dataset(client, run_id, run.dataset, result["data_sha256"])
    for file, text in record.texts.items():
        client.log_text(run_id, text, file)
    if weights.is_file():
        client.log_artifact(run_id, str(weights))
    _attach(client, run_id, attached)
    client.set_terminated(run_id)
    for old in known:
        client.delete_run(old.info.run_id)
    return run_id


def _log_params(client: Any, run_id: str, config: dict[str, Any]) -> None:
    from mlflow.entities import Param

    client.log_batch(run_id, params=[Param(name, str(value)) for name, value in _flatten(config)])


def _log_metrics(client: Any, run_id: str, history: list[dict[str, Any]], result: dict[str, Any]) -> None:
    """Every epoch's metrics, and the reported epoch's test metrics."""
    from mlflow.entities import Metric

    def metric(name: str, value: float, epoch: int) -> Any:
        return Metric(name.replace("@", "_at_"), value, 0, epoch)

    points = [metric(name, line[name], line["epoch"]) for line in history for name in line if name != "epoch"]
    for part in ("test", "valid", "test_best"):
        points += [
            metric(f"reported/{part}/{name}", value, result["epoch"])
            for name, value in result.get(part, {}).items()
            if name != "epoch"
        ]
    points.append(metric("reported/train_seconds", result["train_seconds"], result["epoch"]))
    if result["peak_bytes"] is not None:
        points.append(metric("reported/peak_bytes", result["peak_bytes"], result["epoch"]))
    for first in range(0, len(points), _BATCH):
        client.log_batch(run_id, metrics=points[first : first + _BATCH])


def _log_dataset(client: Any, run_id: str, name: str, digest: str) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(name=name, digest=digest[:36], source_type="local", source=f'{{"uri": "data/processed/{name}"}}')
    client.log_inputs(run_id, datasets=[DatasetInput(dataset, [InputTag("mlflow.data.context", "train and test")])])


def _attach(client: Any, run_id: str, files: list[tuple[Path, str]]) -> None:
    for path, folder in files:
        client.log_artifact(run_id, str(path), folder)


def _flatten(content: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat = []
    for name, value in content.items():
        flat += _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return flat


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--experiment", required=True)
    parser.add_argument("--runs", required=True, type=Path, help="runs/<experiment> or reports/<experiment>/records")
    parser.add_argument("--reports", required=True, type=Path, help="the tables and figures to attach")
    parser.add_argument("--cards", type=Path, default=Path("reports/datasets"), help="the data sets' cards to attach")
    parser.add_argument("--store", type=Path, default=Path("mlflow.db"), help="SQLite file (default: mlflow.db)")
    parser.add_argument("--output", required=True, type=Path, help="json to write: the MLflow id of every run")


def main(args: argparse.Namespace) -> None:
    missing = [name for name in _REPORTS if not (args.reports / name).is_file()]
    if missing:
        raise StepError(f"{args.reports} lacks {', '.join(missing)}; run tabulate and compare first")
    ids = track(args.experiment, args.runs, args.reports, args.cards, args.store)
    write_json(args.output, {"store": f"sqlite:///{args.store}", "experiment": args.experiment, "runs": ids})


if __name__ == "__main__":
    run_step("track", __doc__, add_arguments, main)
