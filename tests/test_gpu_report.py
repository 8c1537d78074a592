"""The report of the tests that need a GPU: the committed one holds, and reports say what pytest saw."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from steps.common import gpu_record
from steps.common.cli import StepError
from tests.conftest import ROOT, run

REMEDY = f"on a machine with a GPU run, and commit what it writes: {gpu_record.COMMAND}"


def test_the_kernels_have_passed_on_a_gpu_as_they_are() -> None:
    found = list(gpu_record.problems(ROOT / gpu_record.REPORT, ROOT))
    assert found == [], f"{gpu_record.REPORT} {'; '.join(found)}; {REMEDY}"


TORCH = """
import types
cuda = types.SimpleNamespace(is_available=lambda: {cuda}, get_device_name=lambda: "NVIDIA H0")
"""
# With a pause, as a report's seconds have one digit behind the point.
TESTS = """
import time
import pytest

def test_passes(): pass
def test_fails(): assert False
def test_skips(): pytest.skip()

@pytest.fixture
def broken():
    time.sleep(0.1)
    yield
    raise OSError

def test_fails_at_its_end(broken): pass

@pytest.mark.parametrize("n", range(5))
def test_passes_often(n): pass
"""


def reported(folder: Path, *arguments: str, tests: str = TESTS, cuda: bool = True) -> tuple[int, str, dict[str, Any]]:
    """pytest's exit status, what it said, and its report, where torch says that there is a GPU."""
    (folder / "torch.py").write_text(TORCH.format(cuda=cuda))
    (folder / "test_it.py").write_text(tests)
    command = ["python", "-m", "pytest", "-p", "xdist.plugin", "-p", "tests.gpu_report", "-c", "/dev/null"]
    command += ["--rootdir", ".", "--gpu-report", "out/gpu.json", *arguments, "test_it.py"]
    variables = {"PYTHONPATH": f"{folder}:{ROOT}", "HSTU_COMMIT": "a" * 40}
    variables |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    found = run(*command, cwd=folder, check=False, **variables)
    path = folder / "out/gpu.json"
    return found.returncode, found.stdout + found.stderr, json.loads(path.read_text()) if path.exists() else {}


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_report_has_each_test_once(workers: str, tmp_path: Path) -> None:
    code, _, report = reported(tmp_path, "-n", workers)
    assert (code, report["exit"]) == (1, 1)
    # A test that fails at its end has failed.
    assert (report["passed"], report["failed"], report["skipped"]) == (6, 2, 1)
    assert report["failures"] == ["test_it.py::test_fails", "test_it.py::test_fails_at_its_end"]
    assert (report["commit"], report["device"], report["tested"]) == ("a" * 40, "NVIDIA H0", ["test_it.py"])
    assert report["sha256"] == gpu_record.contents(ROOT)
    assert {"kernels", "steps/models", "steps/training", "tests/kernels"} <= set(report["sha256"])
    assert {"torch", "numpy"} <= set(report["versions"])
    assert report["seconds"] > 0


@pytest.mark.parametrize("workers", ["0", "2"])
def test_failures_alone_are_run_again_once_their_tests_are_mended(workers: str, tmp_path: Path) -> None:
    _, _, first = reported(tmp_path, "-n", workers)
    mended = TESTS.replace("assert False", "assert True").replace("def test_passes(): pass", "def test_passes(): 1 / 0")
    code, _, report = reported(tmp_path, "-n", workers, "--gpu-report-again", tests=mended)
    # Those that had passed are not run; the one that was not mended fails once more.
    assert (code, report["exit"], report["failures"]) == (1, 1, ["test_it.py::test_fails_at_its_end"])
    assert (report["passed"], report["failed"], report["skipped"]) == (7, 1, 1)
    assert [one["tests"] for one in report["again"]] == [first["failures"]]
    code, _, report = reported(tmp_path, "-n", workers, "--gpu-report-again", tests=mended.replace("raise OSError", ""))
    assert (code, report["exit"], report["failures"], report["passed"]) == (0, 0, [], 8)
    assert [one["commit"] for one in report["again"]] == ["a" * 40] * 2
    assert report["tested"] == first["tested"]

    code, printed, unchanged = reported(tmp_path, "--gpu-report-again")
    assert (code, unchanged) == (4, report)
    assert "gpu.json names no failure; run all tests" in printed
    first["sha256"]["kernels"] = "of another"
    (tmp_path / "out/gpu.json").write_text(json.dumps(first))
    code, printed, unchanged = reported(tmp_path, "--gpu-report-again")
    assert (code, unchanged) == (4, first)
    assert "gpu.json is of another state of kernels; run all tests" in printed


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_failure_whose_test_is_there_no_more_is_withdrawn_without_a_gpu(workers: str, tmp_path: Path) -> None:
    _, _, first = reported(tmp_path)
    again = "-n", workers, "--gpu-report-again"
    one, other = "test_it.py::test_fails", "test_it.py::test_fails_at_its_end"
    fewer = TESTS.replace("def test_fails(): assert False", "")
    code, printed, unchanged = reported(tmp_path, *again, tests=fewer, cuda=False)
    assert (code, unchanged) == (4, first)  # as the other one is still there
    assert "needs a CUDA device" in printed
    code, _, report = reported(tmp_path, *again, tests=fewer)
    assert (code, report["exit"], report["failures"], report["failed"]) == (1, 1, [other], 1)
    assert report["again"][-1]["withdrawn"] == [one]
    fewer = fewer.replace("def test_fails_at_its_end(broken): pass", "")
    code, _, report = reported(tmp_path, *again, tests=fewer, cuda=False)
    assert (code, report["exit"], report["failures"], report["failed"]) == (0, 0, [], 0)
    assert report["passed"] == first["passed"]
    assert [again.get("withdrawn") for again in report["again"]] == [[one], [other]]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_parameter_is_withdrawn_on_the_machine_of_the_report_alone(workers: str, tmp_path: Path) -> None:
    """Elsewhere it may be missing as the machine has no GPU, or not the library."""
    tests = """
import pytest, torch

@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_it(device): assert device == "cpu"
"""
    _, _, first = reported(tmp_path, tests=tests)
    assert first["failures"] == ["test_it.py::test_it[cuda]"]
    again = "-n", workers, "--gpu-report-again"
    code, printed, unchanged = reported(tmp_path, *again, tests=tests, cuda=False)
    assert (code, unchanged) == (4, first)
    assert "needs a CUDA device" in printed
    code, _, report = reported(tmp_path, *again, tests=tests.replace('["cuda"] if', "[] if"))
    assert (code, report["exit"], report["failures"]) == (0, 0, [])
    assert report["again"][-1]["withdrawn"] == first["failures"]


def test_failures_of_another_file_remain_where_one_is_withdrawn(tmp_path: Path) -> None:
    (tmp_path / "test_other.py").write_text("def test_other(): assert False")
    reported(tmp_path, "test_other.py", tests="def test_fails(): assert False")
    code, _, report = reported(tmp_path, "--gpu-report-again", tests="def test_passes(): pass")
    assert (code, report["exit"], report["failures"]) == (1, 1, ["test_other.py::test_other"])
    assert report["again"][-1]["withdrawn"] == ["test_it.py::test_fails"]


def test_a_file_that_loads_again_is_no_failure_and_its_tests_are_run(tmp_path: Path) -> None:
    _, _, first = reported(tmp_path, "-n", "2", tests="import nothing_of_this_name")
    assert (first["exit"], first["failures"]) == (1, ["test_it.py"])
    code, _, report = reported(tmp_path, "--gpu-report-again", tests="import nothing_of_this_name")
    assert (code, report) == (2, first)
    code, _, report = reported(tmp_path, "--gpu-report-again", tests="def test_passes(): pass")
    assert (code, report["exit"], report["failures"], report["passed"]) == (0, 0, [], 1)


def test_a_report_of_tests_that_did_not_end_is_made_anew(tmp_path: Path) -> None:
    _, _, first = reported(tmp_path, tests="import nothing_of_this_name")  # so pytest runs none of the others
    code, printed, unchanged = reported(tmp_path, "--gpu-report-again", tests="def test_passes(): pass")
    assert (first["exit"], code, unchanged) == (2, 4, first)
    assert "is of tests that did not end (pytest said 2); run all tests" in printed


@pytest.mark.parametrize("workers", ["0", "2"])
def test_the_tests_of_other_files_are_added(workers: str, tmp_path: Path) -> None:
    _, _, first = reported(tmp_path, "-n", workers)
    (tmp_path / "test_it.py").rename(tmp_path / "test_first.py")
    passing = "import time\ndef test_passes(): time.sleep(0.2)"
    code, printed, unchanged = reported(tmp_path, "--gpu-report-add", tests=passing)
    assert (code, unchanged) == (4, first)
    assert "has tests of test_it.py already" in printed
    path = tmp_path / "out/gpu.json"
    for change, why in (
        ({"commit": "b" * 40}, "is of bbbbbbbbb, not of the code as it is here"),
        ({"sha256": {}}, "is of aaaaaaaaa, not of the code as it is here"),
        ({"device": "NVIDIA H1"}, "is of another state of device"),
        ({"exit": 2}, "is of tests that did not end"),
        ({}, ""),
    ):
        other = first | {"tested": ["test_first.py"]} | change
        path.write_text(json.dumps(other))
        code, printed, report = reported(tmp_path, "-n", workers, "--gpu-report-add", tests=passing)
        assert why in printed
        assert (code, report == other) == ((4, True) if why else (0, False))
    assert report["tested"] == ["test_first.py", "test_it.py"]
    counts = (report["passed"], report["failed"], report["skipped"], report["exit"])
    assert counts == (first["passed"] + 1, first["failed"], first["skipped"], 1)
    assert report["failures"] == first["failures"]
    assert report["seconds"] > first["seconds"]


def test_what_cannot_be_added_leaves_a_report_as_it_is(tmp_path: Path) -> None:
    passing = "def test_passes(): pass"
    for option in ("--gpu-report-add", "--gpu-report-again"):
        code, printed, _ = reported(tmp_path, option, tests=passing)
        assert code == 4
        assert f"{option}: " in printed
        assert "gpu.json is missing; leave the option out to begin it" in printed
    _, _, first = reported(tmp_path)
    path = tmp_path / "out/gpu.json"
    for tested, options, tests, why in (
        ("./test_it.py", [], passing, "has tests of test_it.py already"),
        (".", [], passing, "has tests of test_it.py already"),
        ("test_first.py", ["--gpu-report-again"], passing, "exclude each other"),
        ("test_first.py", [], "def test_ends(): raise KeyboardInterrupt", "did not end (pytest says 2)"),
        ("test_first.py", [], "", "did not end (pytest says 5)"),
    ):
        other = first | {"tested": [tested]}
        path.write_text(json.dumps(other))
        code, printed, report = reported(tmp_path, "--gpu-report-add", *options, tests=tests)
        assert why in printed
        assert code
        assert report == other


def test_a_report_that_is_added_to_keeps_what_was_run_again(tmp_path: Path) -> None:
    _, _, first = reported(tmp_path)
    again = [{"commit": "b" * 40, "tests": ["test_a.py::test_b"], "seconds": 1.0}]
    other = first | {"tested": ["test_first.py"], "again": again, "failures": ["test_z.py::test_z"], "seconds": 0.3}
    (tmp_path / "out/gpu.json").write_text(json.dumps(other))
    _, _, report = reported(tmp_path, "--gpu-report-add")
    assert report["again"] == again
    assert report["failures"] == [*first["failures"], "test_z.py::test_z"]
    assert report["seconds"] == round(report["seconds"], 1)


@pytest.mark.parametrize("option", ["--gpu-report-again", "--gpu-report-add"])
def test_an_option_that_changes_a_report_wants_its_name(option: str, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    command = ["python", "-m", "pytest", "-p", "tests.gpu_report", "-c", "/dev/null", "--rootdir", ".", option]
    variables = {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    found = run(*command, cwd=tmp_path, check=False, **variables)
    assert (found.returncode, "wants --gpu-report FILE" in found.stderr) == (4, True)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_file_that_does_not_load_is_a_failure(workers: str, tmp_path: Path) -> None:
    code, _, report = reported(tmp_path, "-n", workers, tests="import nothing_of_this_name")
    assert code == report["exit"] != 0
    assert (report["failed"], report["failures"]) == (1, ["test_it.py"])


@pytest.mark.parametrize(
    ("arguments", "cuda", "said"),
    [
        ((), False, "needs a CUDA device"),
        (("-k", "passes"), True, "is of whole files: leave -k"),
        (("--lf",), True, "is of whole files: leave -k"),
        (("test_it.py::test_passes",), True, "is of whole files: leave -k"),
    ],
)
def test_what_would_be_no_report_of_a_gpu_is_refused(
    arguments: tuple[str, ...], cuda: bool, said: str, tmp_path: Path
) -> None:
    code, printed, report = reported(tmp_path, *arguments, cuda=cuda)
    assert (code, report) == (4, {})
    assert said in printed


def test_a_report_holds_while_the_kernels_stay_as_they_are(tmp_path: Path) -> None:
    for name in ("kernels", "steps/models"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    report = {"commit": "a" * 40, "sha256": gpu_record.contents(tmp_path), "tested": list(gpu_record.TESTED)}
    report |= {"exit": 0, "passed": 9, "failed": 0, "skipped": 1, "failures": []}

    def problems(**changes: Any) -> str:
        (tmp_path / "gpu.json").write_text(json.dumps(report | changes))
        return "; ".join(gpu_record.problems(tmp_path / "gpu.json", tmp_path))

    assert problems() == ""
    assert problems(exit=1, failed=1, failures=["a.py::b"]) == "has 1 failures (pytest ended with 1): a.py::b"
    assert "has 0 failures (pytest ended with 2)" in problems(exit=2)
    assert "is of 9 passed tests of tests/kernels, not of all" in problems(tested=["tests/kernels"])
    assert "is of 0 passed tests" in problems(passed=0)
    (tmp_path / "kernels/README.md").write_text("another text")
    (tmp_path / "steps/models/base.py").write_text("")
    assert problems() == ""
    for name, content in (("common.py", ""), ("configurations.json", "{}"), ("new.py", "")):
        kept = (tmp_path / "kernels" / name).read_bytes() if name != "new.py" else None
        (tmp_path / "kernels" / name).write_text(content)
        assert problems() == "is older than kernels/, whose files have changed since aaaaaaaaa"
        if kept is not None:
            (tmp_path / "kernels" / name).write_bytes(kept)
            assert problems() == ""


def test_a_missing_report_is_said_to_be_missing(tmp_path: Path) -> None:
    assert list(gpu_record.problems(tmp_path / "gpu.json", ROOT)) == ["is missing"]


def test_an_operation_is_measured_only_if_its_tests_passed_on_a_gpu(tmp_path: Path) -> None:
    for name in ("layer_norm", "hstu_attention"):
        (tmp_path / "kernels" / name).mkdir(parents=True)
    (tmp_path / "kernels/common.py").write_text("")
    report = {"commit": "a" * 40, "sha256": gpu_record.contents(tmp_path), "tested": list(gpu_record.TESTED)}
    report |= {"exit": 0, "passed": 9, "failed": 0, "skipped": 1, "failures": []}

    def require(operation: str, **changes: Any) -> None:
        (tmp_path / "gpu.json").write_text(json.dumps(report | changes))
        gpu_record.require_passed([operation], tmp_path / "gpu.json", tmp_path)

    def failed(*names: str) -> dict[str, Any]:
        return {"exit": 1, "failed": len(names), "failures": list(names)}

    require("layer_norm")
    require("layer_norm", **failed("tests/kernels/test_hstu_attention.py::test_a[1]"))
    require("layer_norm", **failed("tests/kernels/test_attention_triton.py"))
    for operation, name in (
        ("layer_norm", "tests/kernels/test_layer_norm.py::test_a"),
        ("hstu_attention", "tests/kernels/test_attention_triton.py::test_a"),
        ("layer_norm", "tests/kernels/test_compilation.py::test_a"),  # of all kernels
        ("layer_norm", "tests/steps/test_training.py::test_a"),
    ):
        with pytest.raises(StepError, match=f"^{operation} is not measured, as its tests failed on a GPU: {name}"):
            require(operation, **failed(name))
    with pytest.raises(StepError, match=r"gpu.json is of tests that did not end \(pytest said 2\); run pytest"):
        require("layer_norm", exit=2)
    with pytest.raises(StepError, match="is of 9 passed tests of tests/kernels, not of all"):
        require("layer_norm", tested=["tests/kernels"])
    (tmp_path / "kernels/common.py").write_text("another")
    with pytest.raises(
        StepError, match=r"is older than kernels/, .*since aaaaaaaaa, so nothing is measured; run pytest"
    ):
        require("layer_norm")
    with pytest.raises(StepError, match=r"none.json does not exist; run pytest"):
        gpu_record.require_passed(["layer_norm"], tmp_path / "none.json", tmp_path)
