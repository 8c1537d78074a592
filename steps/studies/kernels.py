"""Times of the kernels beside what one would use without them, and the roofs of the device."""

import itertools
from pathlib import Path
from typing import Any

import torch

from kernels.tools import benchmark
from steps.studies.rows import ROOFS, Row, row

_UNITS = {"ms": "ms", "flops": "FLOP", "bytes": "B", "peak_bytes": "B"}


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


def measure(case: dict[str, Any], plan: dict[str, Any], data: Path) -> list[Row]:
    """Rows of a case: of each implementation and pass its time, its operations and bytes as counted, and its peak."""
    shape = dict(case)
    operation, device = shape.pop("operation"), plan["device"]
    if device == "cuda":
        torch.cuda.empty_cache()
    if operation == ROOFS:
        return roofs({"operation": ROOFS}, device, shape)
    found = []
    for measured in benchmark.OPERATIONS[operation](device, **shape):
        axes = {name: value for name, value in measured.items() if name not in _UNITS}
        found += [
            row({"operation": operation, **axes}, name, measured[name], unit)
            for name, unit in _UNITS.items()
            if measured[name] is not None
        ]
    return found


def roofs(case: dict[str, Any], device: str, sizes: dict[str, int]) -> list[Row]:
    """Rows of what the device reaches in a copy and in a matrix product, whose sizes these are."""
    copy, product = benchmark.ceilings(device, **sizes)
    return [row(case, "copy", copy, "B/s"), row(case, "product", product, "FLOP/s")]
