"""`pytest --gpu-report FILE`: what the tests that need a GPU said, for a commit.

With `--gpu-report-again`, only the failures that FILE names are run, after their tests were mended, and FILE has their
outcomes in place of the old ones. The code that is tested must be the same.

A plugin, which tests/conftest.py names. CI has no GPU: there a test reads the committed report.
"""

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-report", metavar="FILE", type=Path, help="write what the tests said on this GPU")
    parser.addoption("--gpu-report-again", action="store_true", help="run what failed once more, and correct FILE")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--gpu-report")
    if path is None or hasattr(config, "workerinput"):  # of pytest-xdist, whose controller hears of every test
        return
    import torch

    if not torch.cuda.is_available():
        raise pytest.UsageError("--gpu-report needs a CUDA device, and there is none here")
    if any(config.getoption(name) for name in ("keyword", "markexpr", "deselect")):
        raise pytest.UsageError("--gpu-report is of whole files: leave -k, -m and --deselect out")
    path, before = config.invocation_params.dir / path, None
    if config.getoption("--gpu-report-again"):
        before = json.loads(path.read_text(encoding="utf-8"))
        if problem := _not_again(before):
            raise pytest.UsageError(f"--gpu-report-again: {path} {problem}; run all tests")
    config.pluginmanager.register(_Report(path, before))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--gpu-report-again"):
        path = config.invocation_params.dir / config.getoption("--gpu-report")
        failures = json.loads(path.read_text(encoding="utf-8"))["failures"]
        # The name of a file is that of one that did not load.
        items[:] = [item for item in items if {item.nodeid, item.nodeid.partition("::")[0]} & set(failures)]


def _not_again(report: dict[str, Any]) -> str | None:
    """Why the failures of a report cannot be run by themselves, if so."""
    import torch

    from steps.common.gpu_record import ROOT, contents
    from steps.common.provenance import versions

    now = contents(ROOT) | {"device": torch.cuda.get_device_name(), "versions": versions()}
    then = report["sha256"] | {key: report[key] for key in ("device", "versions")}
    others = sorted(key for key in {*now, *then} - {"tests/kernels"} if now.get(key) != then.get(key))
    if others:
        return f"is of another state of {', '.join(others)}"
    return None if report["failures"] else "names no failure"


class _Report:
    """before: the report whose failures alone are run."""

    def __init__(self, path: Path, before: dict[str, Any] | None) -> None:
        self.path, self.before, self.begun = path, before, time.monotonic()
        self.outcomes: dict[str, str] = {}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.outcomes[report.nodeid] = "failed"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # Set-up, call and tear-down each report; a test fails with any of them.
        before = self.outcomes.get(report.nodeid)
        if report.failed or before == "failed":
            self.outcomes[report.nodeid] = "failed"
        elif report.skipped or report.when == "call":
            self.outcomes[report.nodeid] = report.outcome

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        import torch

        from steps.common.gpu_record import ROOT, contents
        from steps.common.provenance import commit, versions

        counts = Counter(self.outcomes.values())
        failures = sorted(name for name, outcome in self.outcomes.items() if outcome == "failed")
        seconds = round(time.monotonic() - self.begun, 1)
        content: dict[str, Any]
        if self.before:
            # A failure that was not run once more remains one.
            failures = sorted({*failures, *(set(self.before["failures"]) - set(self.outcomes))})
            again = {"commit": commit(), "tests": self.before["failures"], "seconds": seconds}
            content = self.before | {
                "sha256": contents(ROOT),
                "exit": int(exitstatus),
                "passed": self.before["passed"] + counts["passed"],
                "failed": len(failures),
                "skipped": self.before["skipped"] + counts["skipped"],
                "failures": failures,
                "again": [*self.before.get("again", []), again],
            }
        else:
            content = {
                "commit": commit(),
                "sha256": contents(ROOT),
                "device": torch.cuda.get_device_name(),
                "versions": versions(),
                "tested": [str(argument) for argument in session.config.args],
                "exit": int(exitstatus),
                **{outcome: counts[outcome] for outcome in ("passed", "failed", "skipped")},
                "failures": failures,
                "seconds": seconds,
            }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
