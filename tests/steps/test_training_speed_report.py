"""The report on training steps: which row stands where, the floor, and what is left to waiting."""

from typing import Any

import pytest

from steps.studies.rows import row
from steps.studies.training_speed_report import floor, parts_table, report, speed_table, steps_of, trainings_table

ROOFS = {"H200": {"copy": 2e12, "product": 5e14}}
ORIGIN = {"device": "H200", "commit": "0123456789"}


def step(captured: bool, compiled: bool, ms: float, **changes: Any) -> dict[str, Any]:
    line = {"kind": "step", "model": "hstu", "blocks": 2, "dim": 50, "heads": 1, "dqk": 50, "dv": 50, "max_len": 200}
    line |= {"items": 3883, "negatives": 128, "batch": 128, "captured": captured, "compiled": compiled, "step": ms}
    line |= {"peak": 300 * 2**20, "part: loss": 0.5, "part: matrix products": 0.25, **ORIGIN}
    return line | {"least operations": 1e11, "least bytes": 1e9} | changes


def test_the_floor_is_the_slower_of_products_and_bytes() -> None:
    assert floor(step(True, True, 1.0), ROOFS) == pytest.approx(0.5)  # 1e9 bytes at 2e12 a second
    assert floor(step(True, True, 1.0) | {"least operations": 1e12}, ROOFS) == pytest.approx(2.0)
    assert floor(step(True, True, 1.0, device="H100"), ROOFS) is None
    uncounted = {name: value for name, value in step(True, True, 1.0).items() if not name.startswith("least")}
    assert floor(uncounted, ROOFS) is None


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


def test_a_case_is_a_line_with_its_ways_in_order() -> None:
    lines = [step(True, True, 1.0), step(False, False, 12.0), step(True, False, 2.0)]
    found = steps_of([*lines, step(True, False, 3.0, model="sasrec")])
    assert len(found) == 2
    first, second = cells(speed_table(found, ROOFS))
    assert first[0].startswith("hstu, 2 blocks, d 50")
    assert first[1:] == ["12.00", "2.00", "1.00", "300", "0.50", "2.0", "H200"]
    assert second[1:4] == ["", "3.00", ""]


def test_what_is_no_kernel_s_time_is_waiting() -> None:
    (case,) = steps_of([step(False, False, 12.0), step(True, False, 0.7)])
    lines = {line[0]: line[1:] for line in cells(parts_table(case))}
    assert lines["GPU idle"] == ["11.250", "0.000"]  # graphs can overlap kernels
    assert lines["whole step"] == ["12.000", "0.700"]


def test_whole_trainings_say_how_many_shared_the_device() -> None:
    line = {"experiment": "t", "data": "ml-1m", "protocol": "strict", "models": "hstu, sasrec", "runs_at_once": 4}
    line |= {"longest": 40.0, "epochs": 101, "epochs/low": 80, "epochs/high": 101, "peak": 2**30, **ORIGIN}
    alone = line | {"models": "hstu", "runs_at_once": 1, "longest": 9.0, "epochs/low": 101}
    assert cells(trainings_table([line, alone])) == [
        ["t", "ml-1m", "strict", "hstu, sasrec", "80 to 101", "4", "40.0", "1,024", "H200", "012345678"],
        ["t", "ml-1m", "strict", "hstu", "101", "1", "9.0", "1,024", "H200", "012345678"],
    ]


def test_the_report_names_commits_and_leaves_single_kernels_to_the_rows() -> None:
    line = step(True, True, 1.0)
    axes = {name: value for name, value in line.items() if name not in ("step", "peak", *ORIGIN) and ":" not in name}
    axes = {name: value for name, value in axes.items() if not name.startswith("least")}
    rows = [row(axes, "step", 1.0, "ms") | ORIGIN, row(axes, "kernel: softmax", 0.25, "ms") | ORIGIN]
    text, _, lines = report(rows, {"title": "Steps"})
    assert "Commits 012345678." in text
    assert [name for name in lines[0] if name.startswith("kernel")] == []
