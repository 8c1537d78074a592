"""Where a result came from: commit, device and library versions; and whether files are those that a result names."""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from steps.common.cli import StepError
from steps.common.files import read_json, sha256

_ROOT = Path(__file__).resolve().parents[2]
_LIBRARIES = ("torch", "triton", "numpy", "safetensors", "fbgemm-gpu", "fbgemm-gpu-cpu")
#: The files of a run whose hashes its metrics.json holds, and those that may be absent: not all are brought from a
#: machine with a GPU.
_OF_RUN = {
    "history.jsonl": "history_sha256",
    "model.safetensors": "weights_sha256",
    "outcomes.safetensors": "outcomes_sha256",
}
_LEFT_OUT = ("model.safetensors", "outcomes.safetensors")


def commit() -> str:
    """The commit of this checkout, with `-dirty` when tracked files differ from it.

    Reports are no code, and what DVC lists changes no result.
    On a machine that received the files without git, or with another commit's, the environment variable
    `HSTU_COMMIT` says it; with neither, `unknown`.
    """
    if "HSTU_COMMIT" in os.environ:
        return os.environ["HSTU_COMMIT"]
    try:
        head = _git("rev-parse", "HEAD")
        dirty = _git("status", "--porcelain", "--untracked-files=no", "--", ":!reports", ":!workflow/runs.yaml")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("-dirty" if dirty else "")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries a result can depend on, those that are installed."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def utc_now() -> str:
    """The time in UTC as ISO 8601 writes it, to the millisecond: `2024-02-17T09:30:00.123+00:00`."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def content_sha256(content: Any) -> str:
    """The SHA-256 of JSON values: the same for files that differ in white space and the order of keys alone."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def require_files(folder: Path, hashes: Mapping[str, str], source: Path, remedy: str) -> None:
    """Raise StepError naming the first file of `folder` that is missing or not as `source` says (path: SHA-256)."""
    for name, expected in hashes.items():
        path = folder / name
        if not path.is_file():
            raise StepError(
                f"{path}, which {source} names, {'is no file' if path.exists() else 'is missing'}; {remedy}"
            )
        if sha256(path) != expected:
            raise StepError(f"{path} is not the file that {source} describes (its sha256 is another); {remedy}")


def require_trained(run: Path, config: dict[str, Any], about: dict[str, Any], source: Path) -> None:
    """Raise StepError unless config.json, history and weights of a run are those that `about`, of `source`, names."""
    remedy = f"{run} holds files of two trainings, or an edited one: train and evaluate it again"
    if about.get("config_sha256") != content_sha256(config):
        raise StepError(f"{run / 'config.json'} is not the config that {source} was made with; {remedy}")
    wanted = {name: str(about.get(key)) for name, key in _OF_RUN.items() if key != "outcomes_sha256" or key in about}
    present = {name: digest for name, digest in wanted.items() if name not in _LEFT_OUT or (run / name).exists()}
    require_files(run, present, source, remedy)


def check_run(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Config and metrics of an evaluated run's folder, which may lack weights and outcomes.

    Raises StepError naming the file that does not belong to the others.
    """
    config, metrics = read_json(run / "config.json"), read_json(run / "metrics.json", remedy="evaluate again")
    if "outcomes_sha256" not in metrics:
        raise StepError(f"{run / 'metrics.json'} does not say which outcomes it was made of; evaluate {run} again")
    require_trained(run, config, metrics, run / "metrics.json")
    if (run / "training.json").exists():
        trained = read_json(run / "training.json", remedy="train again")
        other = next((key for key, value in trained.items() if metrics.get(key) != value), None)
        if other is not None:
            raise StepError(f"{run / 'metrics.json'} and training.json differ in {other}; evaluate {run} again")
    return config, metrics


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
