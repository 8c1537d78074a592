"""Registered models: of each data set and row, the seed that validation says is best, one version for each such run.

Not every seed, as a model of MovieLens-1M takes megabytes and an experiment has hundreds of runs; and none of a
protocol without validation, as only its test set could choose the seed.
"""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steps.common import params
from steps.evaluation.names import SELECTIONS
from steps.reporting.records import Record, by_row
from steps.serving.mlflow_model import save_model
from steps.tracking.store import logged

_SELECTION = SELECTIONS["retrieval"].metric
_VALID_TAG = f"valid.{logged(_SELECTION)}"


@dataclass(frozen=True)
class _Candidate:
    """A run to register, with its folder, its processed data, and its run in MLflow."""

    record: Record
    folder: Path
    data: Path
    run_id: str

    @property
    def name(self) -> str:
        return f"{self.record.run.dataset}.{self.record.run.model}"

    @property
    def valid(self) -> float:
        return float(self.record.metrics["valid"][_SELECTION])


def register(
    client: Any, experiment_id: str, records: list[Record], runs: Path, data: Path, ids: dict[str, str]
) -> dict[str, list[str]]:
    """Register the best run of every row that has weights; returns the versions of each name that these runs are.

    runs: the experiment's folder. data: the folder of the processed data sets. ids: of MLflow's runs, by their paths.
    The alias `best` is the best version on validation; `best-<protocol>` that of further protocols.
    """
    chosen = [
        _Candidate(best, runs / best.run.path, data / best.run.dataset, ids[str(best.run.path)])
        for row in by_row(records).values()
        if "valid" in row[0].metrics and row[0].task == "retrieval"  # what ranks recommends nothing by itself
        for best in [max(row, key=lambda record: record.metrics["valid"][_SELECTION])]
    ]
    chosen = [
        one for one in chosen if (one.folder / "model.safetensors").is_file() and (one.data / "manifest.json").is_file()
    ]
    found: dict[str, list[str]] = {}
    for candidate in chosen:
        version = _version(client, experiment_id, candidate)
        found.setdefault(candidate.name, []).append(version)
    protocols = list(dict.fromkeys(one.record.run.protocol for one in chosen))
    for candidate in chosen:
        _set_alias(client, candidate, first=candidate.record.run.protocol == protocols[0])
    return found


def _version(client: Any, experiment_id: str, candidate: _Candidate) -> str:
    """The version of this run's model, which is made if there is none."""
    weights = candidate.record.metrics["weights_sha256"]
    for known in client.search_model_versions(f"name = '{candidate.name}'"):
        if known.tags.get("weights_sha256") == weights and known.tags.get("run") == str(candidate.record.run.path):
            number: str = str(known.version)
            return number
    _make_name(client, candidate)
    model_id = _logged_model(client, experiment_id, candidate)
    tags = _tags(candidate)
    made = client.create_model_version(
        candidate.name, f"models:/{model_id}", run_id=candidate.run_id, model_id=model_id, tags=tags
    )
    return str(made.version)


def _make_name(client: Any, candidate: _Candidate) -> None:
    from mlflow.exceptions import MlflowException

    run = candidate.record.run
    title = params.entry("datasets", run.dataset)["title"]
    about = f"{params.label(run.model)} on {title}. The input is a history of titles, the output the next ones."
    try:
        client.create_registered_model(candidate.name, description=about)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _logged_model(client: Any, experiment_id: str, candidate: _Candidate) -> str:
    """The id of the run's model in the experiment; one that a killed process left unfinished is made anew."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Metric

    run, result = candidate.record.run, candidate.record.metrics
    key = f"tags.weights_sha256 = '{result['weights_sha256']}' AND tags.run = '{run.path}'"
    for known in client.search_logged_models([experiment_id], key):
        if known.status == LoggedModelStatus.READY:
            done: str = known.model_id
            return done
        client.delete_logged_model(known.model_id)
    about = {"row": run.model, "protocol": run.protocol, "seed": str(run.seed)}
    name = re.sub(r"[/:.%\"']", "_", f"{candidate.name}-{run.protocol}")  # which MLflow refuses
    model = client.create_logged_model(
        experiment_id, name, candidate.run_id, tags=_tags(candidate), params=about, model_type="recommender"
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "model")
        save_model(candidate.folder, candidate.data, folder)
        client.log_model_artifacts(model.model_id, str(folder))
    client.log_outputs(candidate.run_id, [LoggedModelOutput(model.model_id, result["epoch"])])
    moment = client.get_run(candidate.run_id).info.end_time
    points = [
        Metric(f"reported/{part}/{logged(name)}", value, moment, 0, model_id=model.model_id)
        for part in ("valid", "test")
        for name, value in result[part].items()
    ]
    client.log_batch(candidate.run_id, metrics=points)  # as the run has them: this adds them to the model
    client.finalize_logged_model(model.model_id, "READY")
    model_id: str = model.model_id
    return model_id


def _tags(candidate: _Candidate) -> dict[str, str]:
    run, result = candidate.record.run, candidate.record.metrics
    tags = {"run": str(run.path), "experiment": run.experiment, "protocol": run.protocol, "seed": str(run.seed)}
    tags |= {name: str(result[name]) for name in ("weights_sha256", "data_sha256", "commit")}
    return tags | {_VALID_TAG: str(candidate.valid)}


def _set_alias(client: Any, candidate: _Candidate, first: bool) -> None:
    """Point the alias at the best version of this protocol on the same data, of whatever experiment."""
    run, data = candidate.record.run, candidate.record.metrics["data_sha256"]
    versions = [
        one
        for one in client.search_model_versions(f"name = '{candidate.name}'")
        if one.tags.get("protocol") == run.protocol and one.tags.get("data_sha256") == data
    ]
    best = max(versions, key=lambda one: (float(one.tags[_VALID_TAG]), -int(one.version)))
    alias = "best" if first else f"best-{run.protocol}"
    if client.get_registered_model(candidate.name).aliases.get(alias) != str(best.version):
        client.set_registered_model_alias(candidate.name, alias, str(best.version))
