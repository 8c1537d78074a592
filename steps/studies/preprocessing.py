"""Seconds that a data set takes from its raw files to sequences: parse, validate, sort, split, write.

Imports are not counted. The first repetition, which also loads lazily imported modules, is a row like every other: it
is what a user waits for.
"""

import platform
import tempfile
import time
from pathlib import Path
from typing import Any

from steps.common.device import usable_cores
from steps.common.files import read_json, sha256
from steps.common.provenance import content_sha256
from steps.preprocess import write_sequences
from steps.studies.rows import Row, row
from steps.validate import write_valid


def cases(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """A case per data set."""
    return [{"dataset": name} for name in plan["data"]["raw"]]


def measure(case: dict[str, Any], plan: dict[str, Any], data: Path) -> list[Row]:
    """Rows of a data set: seconds of each part, in every repetition."""
    raw = data / "raw" / case["dataset"]
    digest = content_sha256(read_json(raw / "manifest.json", remedy="run download")["files"])
    axes = case | {"processor": _processor(), "cores": usable_cores()}
    found = []
    for repetition in range(1, plan["settings"]["repetitions"] + 1):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            valid, processed = Path(folder, "valid"), Path(folder, "processed")
            valid.mkdir()
            told = write_valid(raw, plan["data"]["raw"][case["dataset"]], valid)
            middle = time.perf_counter()
            processed.mkdir()
            files = {path.name: sha256(path) for path in sorted(valid.iterdir())}
            write_sequences(valid, told | {"files": files}, processed, "file-order")
            end = time.perf_counter()
        seconds = {"parse_validate": middle - start, "sort_split_write": end - middle, "total": end - start}
        found += [
            row(axes, name, round(value, 4), "s", repetition=repetition, data_sha256=digest)
            for name, value in seconds.items()
        ]
    return found


def _processor() -> str:
    """The processor's name, as far as the system says it: rows of another one stand beside its own."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
