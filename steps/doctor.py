"""Check that this machine's torch, triton, fbgemm_gpu and CUDA fit together, and try every fbgemm operation in use.

Of TorchRec, which only trainings on several devices use, it says whether it fits where it is installed.

Prints one line per finding; exits with 1 if anything does not fit, naming what to install.
"""

import argparse
import importlib.metadata
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steps.common.cli import StepError, run_step

#: Which release of fbgemm loads with which of torch, by their first two numbers; torch 2.15 has none.
PAIRS = {"1.6": "2.11", "1.7": "2.12", "1.8": "2.13", "1.9": "2.14"}
CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"


def pinned(name: str, constraints: Path = CONSTRAINTS) -> str:
    """The version of the package `name` in constraints.txt."""
    found = re.search(rf"^{re.escape(name)}==(\S+)$", constraints.read_text(), re.MULTILINE | re.IGNORECASE)
    if found is None:
        raise StepError(f"{constraints} has no pin of {name}")
    return found.group(1)


def check_versions() -> list[str]:
    """What is not as pinned: Python, torch, triton, and exactly one fbgemm build."""
    problems = []
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        problems.append(f"Python {platform.python_version()} does not fit; install Python 3.11 or 3.12")
    for name in ("torch", "triton"):
        version, wanted = _version(name), pinned(name)
        if version is None or version.split("+")[0] != wanted:
            problems.append(f"{name} {version or 'is missing'} does not fit; install {name}=={wanted}")
    cuda = _has_cuda()
    right, wrong = _build(), "fbgemm-gpu-cpu" if cuda else "fbgemm-gpu"
    wanted = pinned(right)
    if _version(wrong) is not None:
        problems.append(f"{wrong} does not fit a machine {'with' if cuda else 'without'} CUDA; uninstall it")
    if _version(right) != wanted:
        problems.append(f"{right} {_version(right) or 'is missing'} does not fit; install {right}=={wanted}")
    return problems


def check_pair() -> list[str]:
    """Whether the fbgemm installed loads with the torch installed; tried in another process, which may crash."""
    installed = [f"{name} {_version(name)}" for name in ("fbgemm-gpu", "fbgemm-gpu-cpu") if _version(name) is not None]
    if not installed:
        return []  # check_versions reports it
    code = "import torch, fbgemm_gpu; torch.ops.fbgemm.jagged_to_padded_dense"
    tried = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if tried.returncode == 0:
        return []
    pairs = ", ".join(f"{fbgemm} goes with torch {torch}" for fbgemm, torch in PAIRS.items())
    remedy = f"install torch=={pinned('torch')} and {_build()}=={pinned(_build())}"
    return [
        f"{' and '.join(installed)} does not load with torch {_version('torch')} ({_why(tried)}): "
        f"{pairs}, none with 2.15; {remedy}"
    ]


def check_torchrec() -> list[str]:
    """Whether TorchRec, if it is installed, is the one pinned, and loads; tried in another process, which may crash."""
    version = _version("torchrec")
    if version is None:
        return []
    wanted = pinned("torchrec")
    remedy = f"install torchrec=={wanted} as docs/distributed.md says"
    if version != wanted:
        return [f"torchrec {version} does not fit {_build()} {pinned(_build())}; {remedy}"]
    code = "import torchrec.distributed.embedding"
    tried = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return [] if tried.returncode == 0 else [f"torchrec {version} does not load ({_why(tried)}); {remedy}"]


def check_operations() -> list[str]:
    """fbgemm operations whose result differs from their torch twin, or that fail, on each device here."""
    import torch

    from kernels.jagged import fbgemm, naive

    if not fbgemm.available():
        return [f"fbgemm_gpu lacks operations that this project uses; install {_build()}=={pinned(_build())}"]
    problems = []
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        lengths = torch.tensor([2, 0, 3], device=device)
        offsets = naive.offsets_from_lengths(lengths)
        values = torch.arange(10.0, device=device).view(5, 2)
        if not fbgemm.fits(values):
            said = f"fbgemm's operations are not used on {device}, though installed"
            problems.append(f"{said}; install {_build()}=={pinned(_build())}")
            continue
        padded = naive.to_padded(values, offsets, 4)
        cases: dict[str, tuple[Callable[..., torch.Tensor], tuple[Any, ...], torch.Tensor]] = {
            "asynchronous_complete_cumsum": (fbgemm.offsets_from_lengths, (lengths,), offsets),
            "jagged_to_padded_dense": (fbgemm.to_padded, (values, offsets, 4), padded),
            "dense_to_jagged": (fbgemm.to_jagged, (padded, offsets), values),
            "jagged_index_select": (
                lambda *inputs: fbgemm.select_rows(*inputs)[0],
                (values, offsets, lengths.new_tensor([2, 0])),
                values[[2, 3, 4, 0, 1]],
            ),
        }
        for name in fbgemm.OPERATIONS:
            operation, arguments, expected = cases[name]
            try:
                fits = torch.equal(operation(*arguments), expected)
            except (RuntimeError, AttributeError):
                fits = False
            if not fits:
                problems.append(f"fbgemm's {name} fails on {device}; install {_build()}=={pinned(_build())}")
    return problems


def _why(tried: subprocess.CompletedProcess[str]) -> str:
    """Why a process failed: its signal, or its last word."""
    said = [line.strip() for line in tried.stderr.splitlines() if line.strip()]
    return f"ended by signal {-tried.returncode}" if tried.returncode < 0 else said[-1] if said else "no word why"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _build() -> str:
    """The build of fbgemm for this machine."""
    return "fbgemm-gpu" if _has_cuda() else "fbgemm-gpu-cpu"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser  # nothing to choose


def main(args: argparse.Namespace) -> None:
    del args
    if _version("torch") is None:
        raise StepError(f"torch is missing; install torch=={pinned('torch')}")
    try:
        import torch
    except (ImportError, OSError) as error:
        raise StepError(
            f"torch {_version('torch')} does not load ({error}); install torch=={pinned('torch')}"
        ) from error
    problems = check_versions() + (check_pair() or (check_operations() if _version(_build()) else []))
    problems += check_torchrec()
    if problems:
        raise StepError("; ".join(problems))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    of_fbgemm = [f"{name} {_version(name)}" for name in (_build(), "torchrec") if _version(name)]
    print(f"doctor: torch {torch.__version__}, triton {_version('triton')}, {', '.join(of_fbgemm)}, {device}: all fit")


if __name__ == "__main__":
    run_step("doctor", __doc__, add_arguments, main)
