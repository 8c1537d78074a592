"""What the tests share: where the project is, how its steps are run, and a small data set."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from steps.common.files import sha256, write_json

# Before CUDA starts: without the first, deterministic mode refuses matrix products; without the second, every process
# of pytest-xdist starts as many compilers as there are cores.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # likewise for what computes on the CPU, here and in the steps that tests start
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


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
    """Run `python -m steps.<name>` in the project copy `cwd`."""
    return run("python", "-m", f"steps.{name}", *map(str, arguments), cwd=cwd, check=check, **variables)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project's files whose demo is reduced: 120 users, 3 epochs, one seed."""
    # Here, because tests/kernels also run where there is little more than torch.
    from steps.common import yaml_files
    from steps.synthesize import synthesize

    copy = tmp_path / "project"
    for name in (
        "steps",
        "kernels",
        "params",
        "workflow",
        "Snakefile",
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
    demo["source"]["sha256"] = hashlib.sha256(synthesize(**demo["synthesize"])).hexdigest()
    demo["training"]["epochs"] = 3
    path.write_text(yaml_files.dump(datasets))
    return copy


def write_processed(folder: Path, lengths: list[int], num_items: int, seed: int = 0) -> Path:
    """Random processed sequences, without repeated items in one user's sequence."""
    random = np.random.default_rng(seed)
    tensors = {
        "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "item": np.concatenate([random.permutation(num_items)[:n] + 1 for n in lengths]).astype(np.int32),
        "timestamp": np.concatenate([np.sort(random.integers(0, 10**7, n)) for n in lengths]).astype(np.int64),
    }
    folder.mkdir(parents=True)
    (folder / "sequences.safetensors").write_bytes(save(tensors))
    digest = sha256(folder / "sequences.safetensors")
    write_json(folder / "manifest.json", {"catalogue_items": num_items, "sequences_sha256": digest})
    return folder
