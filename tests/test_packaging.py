"""The wheel: the kernels under a name of their own, usable beside a public package called `kernels`."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    result = subprocess.run(command, text=True, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by the setuptools installed, from a copy: setuptools leaves a folder `build` behind."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "kernels", folder / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copyfile(ROOT / name, folder / name)
    pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder / "out", folder)
    (built,) = (folder / "out").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--no-index", "--target", folder, wheel)
    return folder


def python(code: str, *path: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run code outside the clone, with these folders first on the path, and Triton's interpreter."""
    environment = {"PYTHONPATH": ":".join(map(str, path)), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=cwd, env=environment, text=True, capture_output=True, check=False)


def test_the_wheel_holds_the_kernels_and_nothing_else(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {path.relative_to(ROOT / "kernels") for path in (ROOT / "kernels").rglob("*.py")}
    expected = {f"hstu_kernels/{path}" for path in sources if path.parts[0] != "tools"}
    assert held == expected | {"hstu_kernels/configurations.json"}


def test_its_own_description_is_of_the_kernels(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = archive.read(name).decode()
    needed = re.findall(r"^Requires-Dist: ([\w.-]+)[^;\n]*$", metadata, re.MULTILINE)
    assert needed == ["torch", "triton"]
    assert "from hstu_kernels.hstu_attention import hstu_attention" in metadata


def test_installed_it_works_beside_a_public_package_of_the_folders_name(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("def get_kernel(): ...\n")
    code = """
import importlib, math, pkgutil
import kernels
import torch
import hstu_kernels
from hstu_kernels import common
from hstu_kernels.hstu_attention import hstu_attention

for module in pkgutil.walk_packages(hstu_kernels.__path__, "hstu_kernels."):
    importlib.import_module(module.name)
q = torch.ones(1, 1, 4)  # one token, which sees itself: silu(q . k) v
output = hstu_attention(q, q, q, torch.tensor([0, 1]), 1)
assert torch.allclose(output, torch.full((1, 1, 4), 4 / (1 + math.exp(-4)))), output
assert common.table_entry("layer_norm_forward", "64", "default")
assert hasattr(kernels, "get_kernel")
print(hstu_kernels.__file__)
"""
    result = python(code, tmp_path, installed, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()) == installed / "hstu_kernels" / "__init__.py"


@pytest.mark.parametrize("names", [("kernels", "hstu_kernels"), ("hstu_kernels", "kernels")], ids="-".join)
def test_both_names_in_one_process_are_refused_in_words(
    names: tuple[str, str], installed: Path, tmp_path: Path
) -> None:
    code = f"import {names[0]}.layer_norm.triton_op\nimport {names[1]}.layer_norm.triton_op"
    result = python(code, ROOT, installed, cwd=tmp_path)
    assert result.returncode == 1
    assert f"ImportError: {names[1]} is {names[0]} under another name" in result.stderr


def test_kernels_import_each_other_by_relative_names() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.split(".")[0] in {"kernels", "hstu_kernels"}], path


@pytest.mark.parametrize(
    ("extra", "package", "versions", "taken"),
    [
        (None, "torch", ["2.10.0", "2.11.0", "2.13.0", "2.15.0", "3.0.0"], ["2.11.0", "2.13.0", "2.15.0"]),
        (None, "triton", ["3.5.1", "3.6.0", "3.7.1", "4.0.0"], ["3.6.0", "3.7.1"]),
        ("cpu", "torch", ["2.12.1", "2.13.0", "2.14.1", "2.15.0"], ["2.13.0"]),
        ("cpu", "fbgemm-gpu-cpu", ["1.7.0", "1.8.0", "1.9.0"], ["1.8.0"]),
        ("cuda", "torch", ["2.12.1", "2.13.0", "2.14.1", "2.15.0"], ["2.13.0"]),
        ("cuda", "fbgemm-gpu", ["1.7.0", "1.8.0", "1.9.0"], ["1.8.0"]),
        ("distributed", "torchrec", ["1.6.1", "1.8.0", "1.9.2"], ["1.8.0"]),
        ("reproduce", "numpy", ["1.26.4", "2.4.6", "3.0.0"], ["2.4.6"]),
    ],
)
def test_an_install_without_the_constraints_takes_versions_that_fit(
    extra: str | None, package: str, versions: list[str], taken: list[str]
) -> None:
    from packaging.requirements import Requirement

    listed = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    (wanted,) = (found for found in map(Requirement, listed) if found.name == package)
    assert [version for version in versions if version in wanted.specifier] == taken
