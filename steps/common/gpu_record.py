"""What the tests that need a GPU said, as reports/tests/gpu.json has it: of which kernels, and which tests failed.

tests/gpu_report.py writes it. Needs nothing beside Python.
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from steps.common.cli import StepError
from steps.common.files import read_json

ROOT = Path(__file__).resolve().parents[2]
REPORT = "reports/tests/gpu.json"
#: What is tested on a GPU.
TESTED = (
    "tests/kernels",
    "tests/steps/test_training.py",
    "tests/steps/test_history_cache.py",
    "tests/steps/test_ranking.py",
    "tests/steps/test_rankers.py",
)
#: Folders whose content a report names. It is older than the kernels where the first has another content since.
HASHED = ("kernels", "steps/models", "steps/tasks", "steps/training", "tests/kernels")
COMMAND = f"pytest -o addopts= --gpu-report {REPORT} {' '.join(TESTED)}"
#: Files of tests of one operation that are not called after it.
_OPERATIONS = {"tests/kernels/test_attention_triton.py": "hstu_attention"}
_TESTS_FAILED = 1  # pytest's status where all ran and some failed


def contents(root: Path) -> dict[str, str]:
    """The hash of each folder's Python and JSON files, of the folders that exist."""
    return {name: _content(root / name) for name in HASHED if (root / name).is_dir()}


def problems(path: Path, root: Path) -> Iterator[str]:
    """Why the report at `path` does not show that the kernels in `root` work on a GPU, if so."""
    if not path.is_file():
        yield "is missing"
        return
    report = read_json(path)
    if report["failed"] or report["exit"]:
        yield f"has {report['failed']} failures (pytest ended with {report['exit']}): {', '.join(report['failures'])}"
    yield from _of_other_code(report, root)


def require_passed(operations: Iterable[str], path: Path, root: Path) -> None:
    """Raise StepError unless the report at `path` is of the kernels in `root`, and no test of these operations failed.

    A failure in a file of tests that is another operation's does not count; any other does.
    """
    remedy = f"run {COMMAND}"
    report = read_json(path, remedy=remedy)
    for problem in _of_other_code(report, root):
        raise StepError(f"{path} {problem}, so nothing is measured; {remedy}")
    if report["exit"] not in (0, _TESTS_FAILED):
        raise StepError(f"{path} is of tests that did not end (pytest said {report['exit']}); {remedy}")
    for operation in operations:
        failures = [name for name in report["failures"] if _operation_of(name, root) in (operation, None)]
        if failures:
            raise StepError(
                f"{operation} is not measured, as its tests failed on a GPU: {', '.join(failures)} ({path}); "
                "mend it, or measure others with --only operation=NAME"
            )


def _of_other_code(report: dict[str, Any], root: Path) -> Iterator[str]:
    """Why a report is not of all tests of the kernels in `root`, if so."""
    if not report["passed"] or sorted(report["tested"]) != sorted(TESTED):
        yield f"is of {report['passed']} passed tests of {' '.join(report['tested'])}, not of all"
    if report["sha256"]["kernels"] != contents(root)["kernels"]:
        yield f"is older than kernels/, whose files have changed since {report['commit'][:9]}"


def _operation_of(test: str, root: Path) -> str | None:
    """The operation that a test is of alone, if so."""
    file = test.partition("::")[0]
    name = Path(file).stem.removeprefix("test_")
    return _OPERATIONS.get(file, name if (root / "kernels" / name).is_dir() else None)


def _content(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for ending in ("*.py", "*.json") for path in folder.rglob(ending)):
        digest.update(f"{path.relative_to(folder).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()
