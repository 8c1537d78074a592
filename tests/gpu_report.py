"""`pytest --gpu-report FILE`: what the tests that need a GPU said, for a commit.

With `--gpu-report-again`, only the failures that FILE names are run, after their tests were mended, and FILE has their
outcomes in place of the old ones. The code that is tested must be the same. Tests that are no longer in their files are
withdrawn: FILE says which, and if no others failed, no GPU is needed.

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
    if not config.getoption("--gpu-report-again"):
        _require_cuda()
    chosen = any(config.getoption(name) for name in ("keyword", "markexpr", "deselect"))
    if chosen or any("::" in argument for argument in config.args):
        raise pytest.UsageError("--gpu-report is of whole files: leave -k, -m, --deselect and names of tests out")
    path, before = config.invocation_params.dir / path, None
    if config.getoption("--gpu-report-again"):
        before = json.loads(path.read_text(encoding="utf-8"))
        if problem := _not_again(before):
            raise pytest.UsageError(f"--gpu-report-again: {path} {problem}; run all tests")
    config.pluginmanager.register(_Report(path, before))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--gpu-report-again"):
        return
    path = config.invocation_params.dir / config.getoption("--gpu-report")
    before = json.loads(path.read_text(encoding="utf-8"))
    # The name of a file is that of one that did not load.
    failures, files = set(before["failures"]), {_file_of(item.nodeid) for item in items}
    kept = [item for item in items if {item.nodeid, _file_of(item.nodeid)} & failures]
    withdrawn = {name for name in failures - {item.nodeid for item in items} - files if _file_of(name) in files}
    if failures - withdrawn:
        _require_cuda()
        if problem := _of_another_machine(before):
            raise pytest.UsageError(f"--gpu-report-again: {path} {problem}; run all tests")
    for plugin in config.pluginmanager.get_plugins():
        if isinstance(plugin, _Report):
            plugin.withdrawn = withdrawn
    items[:] = kept


def _file_of(test: str) -> str:
    return test.partition("::")[0]


def _require_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise pytest.UsageError("--gpu-report needs a CUDA device, and there is none here")


def _not_again(report: dict[str, Any]) -> str | None:
    """Why the failures of a report cannot be looked at by themselves, if so."""
    from steps.common.gpu_record import ROOT, contents

    if problem := _differing(contents(ROOT), report["sha256"]):
        return problem
    return None if report["failures"] else "names no failure"


def _of_another_machine(report: dict[str, Any]) -> str | None:
    import torch

    from steps.common.provenance import versions

    return _differing({"device": torch.cuda.get_device_name(), "versions": versions()}, report)


def _differing(now: dict[str, Any], then: dict[str, Any]) -> str | None:
    others = sorted(key for key in now if key != "tests/kernels" and now[key] != then.get(key))
    return f"is of another state of {', '.join(others)}" if others else None


class _Report:
    """before: the report whose failures alone are run. withdrawn: those of its tests that are there no more."""

    def __init__(self, path: Path, before: dict[str, Any] | None) -> None:
        self.path, self.before, self.begun = path, before, time.monotonic()
        self.outcomes: dict[str, str] = {}
        self.withdrawn: set[str] = set()

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
        if exitstatus == pytest.ExitCode.USAGE_ERROR:
            return
        import torch

        from steps.common.gpu_record import ROOT, contents
        from steps.common.provenance import commit, versions

        counts = Counter(self.outcomes.values())
        failures = sorted(name for name, outcome in self.outcomes.items() if outcome == "failed")
        seconds = round(time.monotonic() - self.begun, 1)
        content: dict[str, Any]
        if self.before:
            # A failure that was not run once more remains one, unless its test is there no more.
            failures = sorted({*failures, *(set(self.before["failures"]) - set(self.outcomes) - self.withdrawn)})
            again = {"commit": commit(), "tests": self.before["failures"], "seconds": seconds}
            if self.withdrawn:
                again["withdrawn"] = sorted(self.withdrawn)
            if not failures and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
                exitstatus = 0
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
