"""`pytest --gpu-report FILE`: what the tests that need a GPU said, for a commit.

With `--gpu-report-again`, only the failures that FILE names are run, after their tests were mended, and FILE has their
outcomes in place of the old ones. The code that is tested must be the same. Tests that are no longer in their files are
withdrawn, and FILE says which. Where the whole function is gone and no other test failed, no GPU is needed. Parameters
may depend on the machine: they are withdrawn on the one that FILE is of.

With `--gpu-report-add`, FILE keeps what it has of other files' tests: for a machine that is there for minutes at a
time. Commit, device and versions must be the same. Of tests that do not end nothing is added.

A plugin, which tests/conftest.py names. CI has no GPU: there a test reads the committed report.
"""

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

_ENDED = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-report", metavar="FILE", type=Path, help="write what the tests said on this GPU")
    parser.addoption("--gpu-report-again", action="store_true", help="run what failed once more, and correct FILE")
    parser.addoption("--gpu-report-add", action="store_true", help="add the tests of other files to FILE")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # of pytest-xdist, whose controller hears of every test
        return
    path = config.getoption("--gpu-report")
    changes = [option for option in ("--gpu-report-again", "--gpu-report-add") if config.getoption(option)]
    if path is None and changes:
        raise pytest.UsageError(f"{changes[0]} wants --gpu-report FILE, which it changes")
    if path is None:
        return
    if len(changes) == 2:
        raise pytest.UsageError(f"{' and '.join(changes)} exclude each other")
    if "--gpu-report-again" not in changes and (problem := _no_cuda()):
        raise pytest.UsageError(f"--gpu-report {problem}")
    chosen = any(config.getoption(name, None) for name in ("keyword", "markexpr", "deselect", "lf", "stepwise"))
    if chosen or any("::" in argument for argument in config.args):
        raise pytest.UsageError(
            "--gpu-report is of whole files: leave -k, -m, --deselect, --lf, --sw and names of tests out"
        )
    path, before, others = config.invocation_params.dir / path, None, None
    if changes and not path.is_file():
        raise pytest.UsageError(f"{changes[0]}: {path} is missing; leave the option out to begin it")
    if changes == ["--gpu-report-again"]:
        before = json.loads(path.read_text(encoding="utf-8"))
        problem = _not_again(before)
    elif changes:
        others = json.loads(path.read_text(encoding="utf-8"))
        problem = _not_added_to(others, config.args, config.invocation_params.dir)
    if changes and problem:
        raise pytest.UsageError(f"{changes[0]}: {path} {problem}")
    config.pluginmanager.register(_Report(path, before, others))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--gpu-report-again"):
        return
    path = config.invocation_params.dir / config.getoption("--gpu-report")
    before = json.loads(path.read_text(encoding="utf-8"))
    # The name of a file is that of one that did not load.
    failures, files = set(before["failures"]), {_file_of(item.nodeid) for item in items}
    kept = [item for item in items if {item.nodeid, _file_of(item.nodeid)} & failures]
    withdrawn = {name for name in failures - {item.nodeid for item in items} - files if _file_of(name) in files}
    functions = {_function_of(item.nodeid) for item in items}
    problem = None
    if failures - withdrawn or any(_function_of(name) in functions for name in withdrawn):
        problem = _no_cuda() or _of_another_machine(before)
        problem = problem and f"--gpu-report-again: {path} {problem}"
    items[:] = [] if problem else kept
    if hasattr(config, "workeroutput"):  # of pytest-xdist, whose controller collects nothing itself
        config.workeroutput["gpu_report"] = sorted(withdrawn), problem
    elif problem:
        raise pytest.UsageError(problem)
    for plugin in config.pluginmanager.get_plugins():
        if isinstance(plugin, _Report):
            plugin.withdrawn = withdrawn


def _file_of(test: str) -> str:
    return test.partition("::")[0]


def _function_of(test: str) -> str:
    return test.partition("[")[0]


def _no_cuda() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "needs a CUDA device, and there is none here"


def _not_again(report: dict[str, Any]) -> str | None:
    """Why the failures of a report cannot be looked at by themselves, if so."""
    from steps.common.gpu_record import ROOT, contents

    if problem := _differing(contents(ROOT), report["sha256"]):
        return problem
    if report["exit"] not in _ENDED:
        return f"is of tests that did not end (pytest said {report['exit']}); run all tests"
    return None if report["failures"] else "names no failure; run all tests"


def _not_added_to(report: dict[str, Any], tests: list[str], folder: Path) -> str | None:
    """Why tests of other files cannot stand in a report, if so."""
    from steps.common.gpu_record import ROOT, contents
    from steps.common.provenance import commit

    if report["exit"] not in _ENDED:
        return f"is of tests that did not end (pytest said {report['exit']}); run them first"
    tested = [(folder / name).resolve() for name in report["tested"]]
    if both := sorted(test for test in tests if any(_overlap((folder / test).resolve(), path) for path in tested)):
        return f"has tests of {' '.join(both)} already"
    if report["commit"] != commit() or report["sha256"] != contents(ROOT):
        return f"is of {report['commit'][:9]}, not of the code as it is here; run all tests"
    return _of_another_machine(report)


def _overlap(path: Path, other: Path) -> bool:
    """Whether both are one file or folder, or one is within the other."""
    return path.is_relative_to(other) or other.is_relative_to(path)


def _of_another_machine(report: dict[str, Any]) -> str | None:
    import torch

    from steps.common.provenance import versions

    return _differing({"device": torch.cuda.get_device_name(), "versions": versions()}, report)


def _differing(now: dict[str, Any], then: dict[str, Any]) -> str | None:
    others = sorted(key for key in now if key != "tests/kernels" and now[key] != then.get(key))
    return f"is of another state of {', '.join(others)}; run all tests" if others else None


class _Report:
    """before: the report whose failures alone are run. others: the one of other files' tests, which are kept.
    withdrawn: those of its tests that are there no more. problem: why they cannot be run, as a worker of pytest-xdist
    found."""

    def __init__(self, path: Path, before: dict[str, Any] | None, others: dict[str, Any] | None) -> None:
        self.path, self.before, self.others, self.begun = path, before, others, time.monotonic()
        self.outcomes: dict[str, str] = {}
        self.withdrawn: set[str] = set()
        self.problem: str | None = None

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        withdrawn, problem = getattr(node, "workeroutput", {}).get("gpu_report", ((), None))
        self.withdrawn |= set(withdrawn)
        self.problem = self.problem or problem

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
        if self.problem:
            print(f"ERROR: {self.problem}")
            session.exitstatus = pytest.ExitCode.USAGE_ERROR
            return
        ended = (*_ENDED, pytest.ExitCode.NO_TESTS_COLLECTED)
        if exitstatus == pytest.ExitCode.USAGE_ERROR or (self.before and exitstatus not in ended):
            return  # FILE remains as it is
        if self.others and exitstatus not in _ENDED:
            print(f"ERROR: nothing was added to {self.path}: these tests did not end (pytest says {int(exitstatus)})")
            return
        import torch

        from steps.common.gpu_record import ROOT, contents
        from steps.common.provenance import commit, versions

        counts = Counter(self.outcomes.values())
        failures = sorted(name for name, outcome in self.outcomes.items() if outcome == "failed")
        seconds = round(time.monotonic() - self.begun, 1)
        content: dict[str, Any]
        if self.before:
            # A failure that was not run once more remains one, unless its test is there no more, or its file loads now.
            loaded = {_file_of(name) for name in self.outcomes if name != _file_of(name)}
            others = set(self.before["failures"]) - set(self.outcomes) - self.withdrawn - loaded
            failures = sorted({*failures, *others})
            again = {"commit": commit(), "tests": self.before["failures"], "seconds": seconds}
            if self.withdrawn:
                again["withdrawn"] = sorted(self.withdrawn)
            session.exitstatus = exitstatus = int(bool(failures))
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
            if self.others:
                for name in ("tested", "passed", "failed", "skipped"):
                    content[name] = self.others[name] + content[name]
                content["failures"] = sorted(self.others["failures"] + failures)
                content["seconds"] = round(self.others["seconds"] + seconds, 1)
                content = self.others | content | {"exit": max(int(exitstatus), self.others["exit"])}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
