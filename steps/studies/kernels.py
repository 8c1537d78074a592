"""Times of the kernels beside what one would use without them, and the roofs of the device."""

import itertools
from pathlib import Path
from typing import Any

from kernels.tools import benchmark
from kernels.tools.timing import Unwritten
from steps.common import gpu_record
from steps.common.cli import StepError
from steps.studies.attempts import own_stream
from steps.studies.rows import FAILED, ROOFS, Row, row

_UNITS = {"ms": "ms", "captured": "of 1", "flops": "FLOP", "bytes": "B", "peak_bytes": "B"}


def cases(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """The roofs, then every operation at every shape; lists in a shape are crossed."""
    found = [{"operation": ROOFS, **plan["settings"]["ceilings"]}]
    for operation, shapes in plan["settings"]["operations"].items():
        for shape in shapes:
            axes = [value if isinstance(value, list) else [value] for value in shape.values()]
            found += [
                {"operation": operation, **dict(zip(shape, point, strict=True))} for point in itertools.product(*axes)
            ]
    return found


def require(cases: list[dict[str, Any]], plan: dict[str, Any]) -> None:
    """Raise StepError unless the operations of the cases have passed their tests on a GPU, as their code is now."""
    if plan["device"] == "cuda":
        operations = dict.fromkeys(case["operation"] for case in cases if case["operation"] != ROOFS)
        gpu_record.require_passed(operations, gpu_record.ROOT / gpu_record.REPORT, gpu_record.ROOT)


def measure(case: dict[str, Any], plan: dict[str, Any], data: Path) -> list[Row]:
    """Rows of a case: of each implementation and pass its time, whether that is a CUDA graph's, its operations and
    bytes as counted, and its peak; or what was seen in their place. Raises StepError if one wrote no outputs."""
    with own_stream(plan["device"]):
        return _rows(case, plan["device"])


def _rows(case: dict[str, Any], device: str) -> list[Row]:
    shape = dict(case)
    operation = shape.pop("operation")
    if operation == ROOFS:
        return roofs({"operation": ROOFS}, device, shape)
    try:
        lines = benchmark.OPERATIONS[operation](device, **shape)
    except Unwritten as error:
        raise StepError(f"{operation} {shape}: {error}; no time of it is kept") from error
    found = []
    for line in lines:
        axes = {"operation": operation} | {name: line[name] for name in line if name not in {*_UNITS, "seen"}}
        if "seen" in line:
            found.append(row(axes, FAILED, 1, "of 1", seen=line["seen"]))
        found += [
            row(axes, name, int(value) if isinstance(value, bool) else value, unit)
            for name, unit in _UNITS.items()
            if (value := line.get(name)) is not None
        ]
    return found


def roofs(case: dict[str, Any], device: str, sizes: dict[str, int]) -> list[Row]:
    """Rows of what the device reaches in a copy and in a matrix product, whose sizes these are."""
    copy, product = benchmark.ceilings(device, **sizes)
    return [row(case, "copy", copy, "B/s"), row(case, "product", product, "FLOP/s")]
