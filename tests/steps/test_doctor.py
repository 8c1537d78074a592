"""The doctor says in one line what does not fit and what to install."""

import argparse
import importlib.metadata
from pathlib import Path

import pytest
import torch

from kernels.jagged import fbgemm
from steps import doctor
from steps.common.cli import StepError
from tests.conftest import ROOT, run, step


def test_a_good_environment_is_said_to_fit() -> None:
    assert "all fit" in step("doctor", cwd=ROOT).stdout


@pytest.mark.parametrize(
    ("package", "version", "said"),
    [
        ("torch", "2.11.0", "torch 2.11.0 does not fit; install torch=="),
        ("triton", None, "triton is missing does not fit; install triton=="),
        ("fbgemm-gpu-cpu", "1.6.0", "fbgemm-gpu-cpu 1.6.0 does not fit; install fbgemm-gpu-cpu=="),
        ("fbgemm-gpu", "1.8.0", "fbgemm-gpu does not fit a machine without CUDA; uninstall it"),
    ],
)
def test_a_wrong_version_is_named_with_its_remedy(
    package: str, version: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.metadata.version

    def installed(name: str) -> str:
        if name != package:
            return real(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(importlib.metadata, "version", installed)
    assert [problem for problem in doctor.check_versions() if problem.startswith(said)]


def test_torchrec_is_the_one_pinned_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torchrec": "1.6.1"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    (problem,) = doctor.check_torchrec()
    assert problem.startswith("torchrec 1.6.1 does not fit fbgemm-gpu")
    assert "; install torchrec==1.8.0 as docs/distributed.md says" in problem
    versions["torchrec"] = "1.8.0"
    (tmp_path / "torchrec.py").write_text("raise ImportError('cannot import name x')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (problem,) = doctor.check_torchrec()
    assert problem.startswith("torchrec 1.8.0 does not load (ImportError: cannot import name x); install")
    versions.clear()
    assert doctor.check_torchrec() == []


def test_an_operation_that_computes_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fbgemm, "to_jagged", lambda padded, offsets: padded[0] * 0)
    problems = doctor.check_operations()
    assert [problem for problem in problems if "dense_to_jagged fails on cpu; install fbgemm-gpu" in problem]
    assert len(problems) == 1


def test_a_device_that_fbgemm_is_never_used_on_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fbgemm, "_fits_device", lambda device: False)
    (problem,) = doctor.check_operations()
    assert problem.startswith("fbgemm's operations are not used on cpu, though installed; install fbgemm-gpu")


def test_every_operation_in_use_is_tried() -> None:
    source = (ROOT / "kernels/jagged/fbgemm.py").read_text()
    assert sorted(fbgemm.OPERATIONS) == sorted({name.split("(")[0] for name in source.split("torch.ops.fbgemm.")[1:]})


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise OSError('fbgemm_gpu_py.so: undefined symbol: _ZN3c10')", "undefined symbol: _ZN3c10"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended by signal 9"),
        ("", "has no attribute 'jagged_to_padded_dense'"),
    ],
    ids=["undefined symbol", "crash", "nothing registered"],
)
def test_a_pair_that_does_not_load_is_told_which_would(
    body: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fbgemm_gpu.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (problem,) = doctor.check_pair()
    for words in (
        "does not load with torch 2",
        "1.6 goes with torch 2.11",
        "1.8 goes with torch 2.13",
        "none with 2.15",
    ):
        assert words in problem
    assert said in problem


def test_the_pair_pinned_is_a_pair() -> None:
    def minor(version: str) -> str:
        return ".".join(version.split(".")[:2])

    for build in ("fbgemm-gpu", "fbgemm-gpu-cpu"):
        assert doctor.PAIRS[minor(doctor.pinned(build))] == minor(doctor.pinned("torch"))


def test_a_torch_that_does_not_load_is_named_with_its_remedy(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    command = ["python", "-m", "steps.doctor"]  # in a process of its own, as it loads what stands on the path
    result = run(*command, cwd=ROOT, check=False, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert result.returncode == 1
    assert "does not load (libcudart.so.13: cannot open shared object file); install torch==" in result.stderr


def test_a_missing_fbgemm_is_said_to_be_missing_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = importlib.metadata.version

    def installed(name: str) -> str:
        if name.startswith("fbgemm"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", installed)
    with pytest.raises(StepError) as refused:
        doctor.main(argparse.Namespace())
    assert "is missing does not fit; install fbgemm-gpu" in str(refused.value)
    assert "does not load" not in str(refused.value)
    assert "lacks" not in str(refused.value)


def test_a_package_without_a_pin_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "constraints.txt").write_text("torch==1\n")
    assert doctor.pinned("torch", tmp_path / "constraints.txt") == "1"
    with pytest.raises(StepError, match="no pin of triton"):
        doctor.pinned("triton", tmp_path / "constraints.txt")
