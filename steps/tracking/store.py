"""The MLflow store: a SQLite file of this folder, or a server elsewhere, and what keeps its records whole.

Every run, an experiment's parent among them, has tags that say what it is:
`key` (its path in the experiment), `content` (the hash of what was logged), `state` (newest or earlier).
"""

import logging
import os
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock

from steps.common.cli import StepError
from steps.common.files import atomic_path

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# MLflow's own are seven tries of two minutes each.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

LOCAL = "sqlite:///mlflow.db"
#: What a run is in the comparison: its content is that of the files it was made of, or was before they changed.
NEWEST, EARLIER = "newest", "earlier"


class AwayError(Exception):
    """The server does not answer."""


def tracking_uri() -> str:
    """The address of the store: what MLFLOW_TRACKING_URI says, or the file mlflow.db of this folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or LOCAL


def is_server(uri: str) -> bool:
    return urlsplit(uri).scheme in ("http", "https")


def shown_uri(uri: str) -> str:
    """The address without the user and password that it may hold."""
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if "@" in parts.netloc else uri


@contextmanager
def opened(uri: str) -> Iterator[Any]:
    """A client of the store; one process of this folder at a time has it.

    Raises AwayError if a server does not answer, StepError if the store cannot be opened.
    """
    local = _file_of(uri)
    lock = local.with_name(f".{local.name}.writer.lock") if local else Path(".mlflow.writer.lock")
    with FileLock(lock):
        from mlflow.exceptions import MlflowException, RestException  # 1.2 s: only when needed
        from requests.exceptions import RequestException

        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # it reports every try
        client = _open_file(local) if local else _client(uri)
        try:
            yield client
        except RestException as error:
            raise StepError(f"the MLflow store {shown_uri(uri)} refuses: {_first_line(error, uri)}") from error
        except (MlflowException, RequestException) as error:
            if not is_server(uri):
                raise
            raise AwayError(_first_line(error, uri)) from error


def experiment_of(client: Any, uri: str, name: str) -> str:
    """The id of the experiment, which is made if it is not there, and restored if it was deleted."""
    found = client.get_experiment_by_name(name)
    if found is None:
        file = _file_of(uri)
        location = file.with_name("mlartifacts") / name if file else None
        made: str = client.create_experiment(name, str(location) if location else None)
        if location and _is_ours(uri):
            _make_relative(made, location)
        return made
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
        for run in search(client, found.experiment_id, "attributes.status = 'KILLED'"):  # restored with it
            client.delete_run(run.info.run_id)
    experiment_id: str = found.experiment_id
    return experiment_id


def remove_unfinished(client: Any, experiment_id: str, uri: str) -> None:
    """Mark as killed and delete the runs that an earlier process of this folder began and never ended.

    A server may have runs that others are logging.
    """
    for run in search(client, experiment_id, "attributes.status = 'RUNNING'"):
        if "key" in run.data.tags and (not is_server(uri) or run.data.tags.get("tracked_from") == here()):
            client.set_terminated(run.info.run_id, "KILLED")
            client.delete_run(run.info.run_id)


def search(client: Any, experiment_id: str, condition: str) -> list[Any]:
    """All runs of the experiment that fit the condition, the youngest first."""
    runs, token = [], None
    while True:
        page = client.search_runs([experiment_id], condition, page_token=token)
        runs += page
        token = page.token
        if not token:
            return runs


def mark_newest(client: Any, run_id: str, known: list[Any]) -> None:
    """Mark the run as the newest of those of its key, and the others as earlier."""
    for other in known:
        state = NEWEST if other.info.run_id == run_id else EARLIER
        if other.data.tags.get("state") != state:
            client.set_tag(other.info.run_id, "state", state)


def logged(metric: str) -> str:
    """A metric's name as MLflow takes it."""
    return metric.replace("@", "_at_")


def here() -> str:
    """This machine and folder."""
    return f"{socket.gethostname()}:{Path.cwd()}"


def _is_ours(uri: str) -> bool:
    return uri == LOCAL


def _file_of(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri)


def _open_file(store: Path) -> Any:
    """A client of the SQLite file `store`, which is made beside its place first if it is not there.

    MLflow never opens a store again whose tables it was making when it was killed.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    if not store.exists():
        with atomic_path(store) as temporary:
            _client(f"sqlite:///{temporary}").search_experiments()
    try:
        client = _client(f"sqlite:///{store.resolve()}")
        client.search_experiments(max_results=1)
    except (MlflowException, SQLAlchemyError) as error:
        raise StepError(
            f"MLflow cannot open {store} ({_first_line(error)}); move it away and run the same command again, which "
            "makes a new one and tracks this experiment's runs in it"
        ) from error
    return client


def _make_relative(experiment_id: str, location: Path) -> None:
    """Let the experiment's artifacts lie in this folder, wherever it is moved: MLflow writes whole paths alone."""
    store = _file_of(LOCAL)
    with closing(sqlite3.connect(str(store))) as connection, connection:
        connection.execute(
            "UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?", (str(location), experiment_id)
        )


def _first_line(error: Exception, uri: str = LOCAL) -> str:
    """What MLflow says, without the password that an address may hold."""
    return str(error).splitlines()[0].replace(uri.rstrip("/"), shown_uri(uri).rstrip("/"))
