"""Cases of a study that several processes measure together: torchrun starts them, with a GPU each."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from steps.common.cli import StepError
from steps.common.files import read_json, write_json
from steps.common.processes import Processes, device_of_process, joined
from steps.common.torchrun import first_to_end

_SAID = "measured: "  # before what a process that fails says


def require_devices(cases: list[dict[str, Any]], plan: dict[str, Any]) -> None:
    """Raise StepError unless there is a GPU for every process of the cases."""
    most, found = max(case["processes"] for case in cases), torch.cuda.device_count()
    if plan["device"] == "cuda" and most > found:
        raise StepError(
            f"{most} processes need a CUDA device each, and this machine shows {found}; measure cases of fewer, as by "
            "--only processes=1"
        )


def found_by_processes(module: str, case: dict[str, Any], plan: dict[str, Any], data: Path) -> dict[str, Any]:
    """What the first of the case's processes found: what `measured(asked, device, processes)` of the study's module
    returns there. asked: `case`, `plan` and `data`. Raises StepError if a process fails."""
    with tempfile.TemporaryDirectory() as folder:
        asked, told = Path(folder, "case.json"), Path(folder, "found.json")
        write_json(asked, {"case": case, "plan": plan, "data": str(data)})
        start = ["torch.distributed.run", "--standalone", f"--nproc-per-node={case['processes']}", "--no-python", "--"]
        code = f"from steps.studies import {module}, started; started.take_part({module}.measured)"
        command = [sys.executable, "-m", *start, sys.executable, "-c", code, str(asked), str(told)]
        ended = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if ended.returncode:
            said = [line.removeprefix(_SAID) for line in ended.stderr.splitlines() if line.startswith(_SAID)]
            raised = [line for line in ended.stderr.splitlines() if re.match(r"\w*Error: ", line)]  # by an import
            why = [*said, *raised, "nothing; it may have been killed"][0]
            raise StepError(f"study of {case}: a process ended with an error; it said: {why}")
        return dict(read_json(told, remedy="measure again"))


def take_part(measured: Any) -> None:
    """What one process of a case does: measures what torchrun was given, and the first writes what was found."""
    try:
        _take_part(measured)
    except Exception as error:
        if not first_to_end():
            sys.exit(1)
        why = str(error) if isinstance(error, StepError) else f"{type(error).__name__}: {error}"
        print(_SAID + " ".join(why.split()), file=sys.stderr)
        sys.exit(1)


def _take_part(measured: Any) -> None:
    asked = read_json(Path(sys.argv[1]), remedy="measure again")
    device = device_of_process(torch.device(asked["plan"]["device"]))
    torch.backends.cuda.matmul.allow_tf32 = True  # as in training
    processes: Processes
    with joined(device) as processes:
        found = measured(asked, device, processes)
        if processes.writes:
            write_json(Path(sys.argv[2]), found)
