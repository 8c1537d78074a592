"""The report on training steps: which row stands where, the floor, and what is left to waiting."""

from pathlib import Path
from typing import Any

import pytest

from steps.speed_report import cases, floor, markdown, parts_table, speed_table, trainings_table
from tests.steps.runs import add_record

CEILINGS = {"device": "H200", "copy_bytes_per_second": 2e12, "matmul_flops_per_second": 5e14}


def row(captured: bool, compiled: bool, step_ms: float, **changes: Any) -> dict[str, Any]:
    shape = {"blocks": 2, "dim": 50, "heads": 1, "dqk": 50, "dv": 50, "max_len": 200, "items": 3883, "negatives": 128}
    return {
        "model": "hstu",
        "shape": shape,
        "batch": 128,
        "captured": captured,
        "compiled": compiled,
        "step_ms": step_ms,
        "peak_bytes": 300 * 2**20,
        "parts_ms": {"loss": 0.5, "matrix products": 0.25},
        "least": {"flops": 1e11, "bytes": 1e9},
        "device": "H200",
        "commit": "0123456789",
    } | changes


def test_the_floor_is_the_slower_of_products_and_bytes() -> None:
    assert floor(row(True, True, 1.0), CEILINGS) == pytest.approx(0.5)  # 1e9 bytes at 2e12 a second
    assert floor(row(True, True, 1.0, least={"flops": 1e12, "bytes": 1e9}), CEILINGS) == pytest.approx(2.0)
    assert floor(row(True, True, 1.0, device="H100"), CEILINGS) is None
    assert floor(row(True, True, 1.0, least=None), CEILINGS) is None


def test_a_case_is_a_line_with_its_ways_in_order() -> None:
    rows = [row(True, True, 1.0), row(False, False, 12.0), row(True, False, 2.0), row(True, False, 3.0, model="sasrec")]
    found = cases(rows)
    assert len(found) == 2
    first, second = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in speed_table(found, CEILINGS).splitlines()[2:]
    )
    assert first[0].startswith("hstu, 2 blocks, d 50")
    assert first[1:] == ["12.00", "2.00", "1.00", "300", "0.50", "2.0", "H200"]
    assert second[1:4] == ["", "3.00", ""]


def test_what_is_no_kernel_s_time_is_waiting() -> None:
    (case,) = cases([row(False, False, 12.0), row(True, False, 0.7)])
    lines = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in parts_table(case).splitlines()[2:]}
    assert [cell.strip() for cell in lines["GPU idle"]] == ["11.250", "0.000"]  # graphs can overlap kernels
    assert [cell.strip() for cell in lines["whole step"]] == ["12.000", "0.700"]


def record(folder: Path, row: str, seed: int, at_once: int, **changes: Any) -> None:
    settings = {"experiment": folder.name, "dataset": "ml-1m", "row": row, "protocol": {"name": "strict"}}
    metrics = {"captured": True, "runs_at_once": at_once, "train_seconds": 40.0 - seed, "peak_bytes": 2**30}
    metrics |= {"stopped_early": None, "device": "H200", "commit": "0123456789"} | changes
    add_record(folder / "records", row, seed, settings | {"training": {"epochs": 101}}, metrics)


def lines_of(records: Path) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in trainings_table(records).splitlines()[2:]]


def test_runs_trained_at_once_share_a_line(tmp_path: Path) -> None:
    """Four at once, of two models; and one that was launched from Python, of which the table does not speak."""
    for row, seed in (("hstu", 0), ("hstu", 1), ("sasrec", 2), ("sasrec", 3)):
        record(tmp_path / "t", row, seed, 4, stopped_early=80 if seed == 3 else None)
    record(tmp_path / "t", "gru4rec", 0, 4, captured=False)
    expected = ["t", "ml-1m", "strict", "hstu, sasrec", "80 to 101", "4", "40.0", "1,024", "H200", "012345678"]
    assert lines_of(tmp_path) == [expected]


def test_models_trained_one_after_the_other_have_lines_of_their_own(tmp_path: Path) -> None:
    for row in ("hstu", "sasrec"):
        for seed in range(2):
            record(tmp_path / "t", row, seed, 2, train_seconds=10.0 if row == "sasrec" else 5.0)
    assert [[line[3], line[5], line[6]] for line in lines_of(tmp_path)] == [
        ["hstu", "2", "5.0"],
        ["sasrec", "2", "10.0"],
    ]


def test_the_report_names_commits(tmp_path: Path) -> None:
    assert "Commits 012345678." in markdown([row(True, True, 1.0)], CEILINGS, tmp_path)
