"""`pytest --gpu-report FILE`: what the tests that need a GPU said, for a commit.

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


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--gpu-report")
    if path is None or hasattr(config, "workerinput"):  # of pytest-xdist, whose controller hears of every test
        return
    import torch

    if not torch.cuda.is_available():
        raise pytest.UsageError("--gpu-report needs a CUDA device, and there is none here")
    if any(config.getoption(name) for name in ("keyword", "markexpr", "deselect")):
        raise pytest.UsageError("--gpu-report is of whole files: leave -k, -m and --deselect out")
    config.pluginmanager.register(_Report(path, config.invocation_params.dir))


class _Report:
    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.begun = folder / path, time.monotonic()
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
        content: dict[str, Any] = {
            "commit": commit(),
            "sha256": contents(ROOT),
            "device": torch.cuda.get_device_name(),
            "versions": versions(),
            "tested": [str(argument) for argument in session.config.args],
            "exit": int(exitstatus),
            **{outcome: counts[outcome] for outcome in ("passed", "failed", "skipped")},
            "failures": sorted(name for name, outcome in self.outcomes.items() if outcome == "failed"),
            "seconds": round(time.monotonic() - self.begun, 1),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
