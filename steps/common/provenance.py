"""Where a result came from: commit, device and library versions."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_LIBRARIES = ("torch", "triton", "numpy", "safetensors", "fbgemm-gpu", "fbgemm-gpu-cpu")


def commit() -> str:
    """The commit of this checkout, with `-dirty` when tracked files differ from it.

    On a machine that received the files without git, or with another commit's, the environment variable
    `HSTU_COMMIT` says it; with neither, `unknown`.
    """
    if "HSTU_COMMIT" in os.environ:
        return os.environ["HSTU_COMMIT"]
    try:
        head = _git("rev-parse", "HEAD")
        dirty = _git("status", "--porcelain", "--untracked-files=no", "--", ":!reports")
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


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
