"""What the tests share: where the project is, how its steps are run, and a small data set."""

import hashlib
import io
import os
import runpy
import shutil
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from steps.common.files import sha256, write_json
from tests.browser import CHROMIUM

# Before CUDA starts: without the first, deterministic mode refuses matrix products; without the second, every process
# of pytest-xdist starts as many compilers as there are cores.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # likewise for what computes on the CPU, here and in the steps that tests start
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

pytest_plugins = ["tests.browser", "tests.clusters", "tests.gpu_report"]
_matmul = torch.backends.cuda.matmul
ROOT = Path(__file__).resolve().parents[1]


# The files that take longest, longest first: each starts before any other, so that no worker of pytest-xdist is left
# with one of them at the end.
LONGEST = (
    "test_pipeline.py",
    "test_distributed.py",
    "test_distributed_faults.py",
    "test_several_machines.py",
    "test_orchestrators.py",
    "test_clusters.py",
    "test_train.py",
    "test_attention_triton.py",
    "test_compilation.py",
    "test_training.py",
    "test_project.py",
    "test_track.py",
    "test_reporting.py",
    "test_studies.py",
    "test_recommend.py",
    "test_ranking_runs.py",
    "test_ranking.py",
    "test_both_paths.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("browser") and CHROMIUM is None:
            item.add_marker(pytest.mark.skip(reason="needs Chromium"))


def run(*command: str, cwd: Path, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command with this environment's Python first on the PATH; on failure its output is the message."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("HSTU_DATA_MIRROR", None)
    environment |= {"PYTHONPATH": str(cwd)} | variables
    result = subprocess.run(command, cwd=cwd, env=environment, text=True, capture_output=True, check=False)
    if check and result.returncode:
        pytest.fail(
            f"{' '.join(command)} ended with {result.returncode}:\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
        )
    return result


def step(
    name: str, *arguments: object, cwd: Path, check: bool = True, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Do what `python -m steps.<name>` does in the project copy `cwd`, in this process, where libraries load once.

    The code is this checkout's, and so is the commit that it finds.
    """
    printed, failed = io.StringIO(), io.StringIO()
    before, code = os.getcwd(), 0
    settings = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), _matmul.allow_tf32
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(printed),
        redirect_stderr(failed),
        warnings.catch_warnings(),
    ):
        patch.delenv("HSTU_DATA_MIRROR", raising=False)
        for variable, value in variables.items():
            patch.setenv(variable, value)
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        os.chdir(cwd)
        warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)  # tests import steps too
        try:
            runpy.run_module(f"steps.{name}", run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except Exception:
            traceback.print_exc()
            code = 1
        finally:
            os.chdir(before)
            torch.set_num_threads(settings[0])
            torch.use_deterministic_algorithms(settings[1])
            _matmul.allow_tf32 = settings[2]
    result = subprocess.CompletedProcess([name, *map(str, arguments)], code, printed.getvalue(), failed.getvalue())
    if check and code:
        pytest.fail(f"steps.{name} ended with {code}:\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}")
    return result


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """A test draws the same numbers whichever tests its process did before."""
    torch.manual_seed(0)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project's files whose demo is reduced: 120 users, 3 epochs, one seed."""
    return copy_project(tmp_path)


def copy_project(folder: Path) -> Path:
    """Make what the fixture `project` gives, in `folder`."""
    # Here, because tests/kernels also run where there is little more than torch.
    from steps.common import yaml_files
    from steps.data.generators.demo import synthesize

    copy = folder / "project"
    for name in (
        "steps",
        "kernels",
        "params",
        "workflow",
        "Snakefile",
        "CITATION.cff",
        "dvc.yaml",
        ".dvc",
        ".dvcignore",
        ".gitignore",
        "environment.yml",
    ):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source, copy / name, ignore=shutil.ignore_patterns("__pycache__", "tmp", "cache", "dvc.lock")
            )
        else:
            copy.mkdir(exist_ok=True)
            shutil.copyfile(source, copy / name)
    path = copy / "params" / "datasets.yaml"
    datasets = yaml_files.read(path)
    demo = datasets["demo"]
    demo["synthesize"] |= {"users": 120, "movies": 200}
    settings = {key: value for key, value in demo["synthesize"].items() if key != "form"}
    demo["source"]["sha256"] = hashlib.sha256(synthesize(**settings)).hexdigest()
    demo["training"]["epochs"] = 3
    path.write_text(yaml_files.dump(datasets))
    return copy


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Sums in one order, as with --deterministic. On a CPU too: there torch's gradient of a large indexing adds from
    several threads at once."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def write_processed(folder: Path, lengths: list[int], num_items: int, seed: int = 0, ratings: bool = False) -> Path:
    """Random processed sequences, without repeated items in one user's sequence. ratings: from 1 to 5."""
    random = np.random.default_rng(seed)
    tensors = {
        "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "item": np.concatenate([random.permutation(num_items)[:n] + 1 for n in lengths]).astype(np.int32),
        "timestamp": np.concatenate([np.sort(random.integers(0, 10**7, n)) for n in lengths]).astype(np.int64),
    }
    if ratings:
        tensors["rating"] = random.integers(1, 6, sum(lengths)).astype(np.float32)
    folder.mkdir(parents=True)
    (folder / "sequences.safetensors").write_bytes(save(tensors))
    digest = sha256(folder / "sequences.safetensors")
    write_json(folder / "manifest.json", {"catalogue_items": num_items, "sequences_sha256": digest})
    return folder
