"""The kernels' report, from a few rows whose figures are worked out by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from steps.common.cli import run_step
from steps.common.files import write_json
from steps.kernel_report import add_arguments, main
from tests.conftest import ROOT, step

MACHINE = {"device": "NVIDIA H200", "commit": "a" * 40}
CEILINGS = {**MACHINE, "copy_bytes_per_second": 4e12, "matmul_flops_per_second": 8e14}


def attention(
    implementation: str, part: str, bias: str, n: int, ms: float, tflops: float | None, **other: Any
) -> dict[str, Any]:
    row = {"implementation": implementation, "pass": part, "bias": bias, "n": n, "ms": ms, "tflops": tflops}
    row |= {"dtype": "bfloat16", "batch": 65536 // n, "heads": 4, "dqk": 64, "dv": 64, "lengths": "full"}
    row |= {"bytes": 10**8, "peak_bytes": None, "flops": None if tflops is None else tflops * ms * 1e9, **MACHINE}
    return row | other


def gate(implementation: str, part: str, tokens: int, ms: float, peak: float | None) -> dict[str, Any]:
    row = {"implementation": implementation, "pass": part, "dtype": "bfloat16", "tokens": tokens, "dim": 256}
    return row | {"ms": ms, "tflops": None, "bytes": 10**8, "peak_bytes": peak, "flops": None, **MACHINE}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    rows = [
        attention("dense torch", "fwd", "none", 1024, 4.0, None),
        attention("ours", "bwd", "none", 1024, 0.5, 170.0),
        attention("ours", "fwd", "both", 1024, 0.1755, 195.44),
        attention("ours", "fwd", "none", 1024, 0.117, 293.14),
        attention("ours", "fwd", "both", 2048, 0.36, 200.0),
        attention("ours", "fwd", "none", 2048, 0.3, 240.0),
        attention("ours, deterministic", "bwd", "none", 1024, 0.625, 136.0),
        attention("ours", "fwd", "none", 1024, 0.08, 260.0, lengths="ragged"),
    ]
    write_json(folder / "hstu_attention.json", rows)
    rows = [
        gate("torch", "fwd", 1000, 0.9, 40e6),
        gate("torch, compiled", "fwd", 1000, 0.6, 20e6),
        gate("ours", "fwd", 1000, 0.3, 10e6),
        gate("ours", "fwd", 65536, 12.25, None),  # without a reference
    ]
    write_json(folder / "norm_gate.json", rows)
    row = gate("ours", "fwd+bwd", 4096, 2.0, 1e6) | {"negatives": 512, "items": 100_000, "flops": 5e10}
    write_json(folder / "sampled_softmax.json", [row])
    write_json(folder / "ceilings.json", CEILINGS)
    return folder


def report(results: Path, output: Path) -> dict[str, list[list[str]]]:
    """The tables of a report by title: the cells of every line, headers first."""
    run_step("kernel_report", "", add_arguments, main, ["--results", str(results), "--output", str(output)])
    tables: dict[str, list[list[str]]] = {}
    for section in (output / "table.md").read_text().split("\n## ")[1:]:
        title, *lines = section.splitlines()
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
        tables[title] = [cells[0], *cells[2:]]
    return tables


def test_attention_has_a_table_per_case_and_what_the_biases_cost(results: Path, tmp_path: Path) -> None:
    tables = report(results, tmp_path / "out")
    case = "HSTU attention, {} lengths, bfloat16, dqk 64, dv 64, 4 heads, NVIDIA H200: ms (TFLOP/s)"
    assert tables[case.format("full")] == [
        ["implementation", "bias", "pass", "N 1,024 (B 64)", "N 2,048 (B 32)"],
        ["dense torch", "none", "fwd", "4.00", ""],
        ["ours", "none", "fwd", "0.117 (293.1)", "0.300 (240.0)"],
        ["ours", "none", "bwd", "0.500 (170.0)", ""],
        ["ours", "both", "fwd", "0.175 (195.4)", "0.360 (200.0)"],
        ["ours, deterministic", "none", "bwd", "0.625 (136.0)", ""],
    ]
    assert tables[case.format("ragged")][1:] == [["ours", "none", "fwd", "0.0800 (260.0)"]]
    ratios = tables["HSTU attention, what both biases cost: time with both / time without, ours, NVIDIA H200"]
    # 0.1755 / 0.117 and 0.36 / 0.3; the backward pass has no row with both.
    assert ratios[1:] == [["full", "bfloat16", "64", "64", "4", "fwd", "1.50", "1.20"]]


def test_other_operations_stand_beside_the_slowest_reference(results: Path, tmp_path: Path) -> None:
    tables = report(results, tmp_path / "out")
    assert tables["Norm gate, NVIDIA H200"] == [
        ["implementation", "tokens", "dim", "dtype", "pass", "ms", "speed-up", "peak MB", "share of reference"],
        ["torch", "1,000", "256", "bfloat16", "fwd", "0.900", "1.00x", "40.0", "100.0%"],
        ["torch, compiled", "1,000", "256", "bfloat16", "fwd", "0.600", "1.50x", "20.0", "50.0%"],
        ["ours", "1,000", "256", "bfloat16", "fwd", "0.300", "3.00x", "10.0", "25.0%"],
        ["ours", "65,536", "256", "bfloat16", "fwd", "12.2", "", "", ""],
    ]
    (row,) = tables["Sampled softmax, NVIDIA H200"][1:]
    # 5e10 operations in 2 ms are 25 TFLOP/s.
    assert row == ["ours", "4,096", "512", "100,000", "256", "bfloat16", "fwd+bwd", "2.00", "25.0", "", "1.00", ""]


def test_devices_never_share_a_table_and_points_stand_under_their_own_roof(results: Path, tmp_path: Path) -> None:
    rows = json.loads((results / "hstu_attention.json").read_text())
    other = {"device": "NVIDIA H100", "commit": "b" * 40}
    write_json(results / "hstu_attention.json", rows + [row | other | {"ms": 2 * row["ms"]} for row in rows])
    tables = report(results, tmp_path / "out")
    assert len([title for title in tables if "full lengths" in title]) == 2
    text = (tmp_path / "out/table.md").read_text()
    assert "Commit aaaaaaaaa." in text
    assert "Commit bbbbbbbbb." in text
    write_json(results / "hstu_attention.json", rows)
    report(results, tmp_path / "alone")
    assert (tmp_path / "out/roofline.svg").read_bytes() == (tmp_path / "alone/roofline.svg").read_bytes()


def test_published_figures_stand_beside_ours(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"implementation": "theirs", "source": "a paper", "device": "H100", "dqk": 64, "batch": 16}
    rows = [entry | {"pass": "fwd", "n": 1024, "tflops": 400}, entry | {"pass": "fwd", "n": 512, "tflops": 350}]
    write_json(tmp_path / "params/kernels.yaml", {"rows": rows})  # JSON is YAML
    monkeypatch.chdir(tmp_path)
    tables = report(results, tmp_path / "out")
    assert tables["Attention measured by others, beside ours on NVIDIA H200"][1:] == [
        ["theirs", "H100", "fwd", "64", "1,024", "16", "400.0", "293.1 (B 64, 4 heads, bfloat16)", "a paper"],
        ["theirs", "H100", "fwd", "64", "512", "16", "350.0", "", "a paper"],
    ]


def test_a_second_run_writes_the_same_bytes(results: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        step("kernel_report", "--results", results, "--output", tmp_path / name, cwd=tmp_path, PYTHONPATH=str(ROOT))
    names = {"roofline.png", "roofline.svg", "table.md"}
    assert {path.name for path in (tmp_path / "first").iterdir()} == names
    for name in names:
        content = (tmp_path / "first" / name).read_bytes()
        assert len(content) > 500
        assert content == (tmp_path / "second" / name).read_bytes()


ROW = attention("ours", "fwd", "none", 1024, 0.117, 293.1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("hstu_attention", [ROW, {key: value for key, value in ROW.items() if key != "ms"}], "row 2: 'ms' is a req"),
        ("hstu_attention", [ROW | {"ms": 0}], "row 1, key ms: 0 is less than or equal to"),
        ("hstu_attention", [ROW | {"pass": "forward"}], "row 1, key pass: 'forward' is not one of"),
        ("hstu_attention", [ROW, ROW | {"n": 512}, ROW | {"ms": 1}], "row 3 measures the same as row 1"),
        ("hstu_attention", {"rows": [ROW]}, "should be a list"),
        ("norm_gate", ["ours"], "row 1: 'ours' is not of type 'object'"),
        ("ceilings", {**CEILINGS, "copy_bytes_per_second": None}, "key copy_bytes_per_second"),
    ],
)
def test_what_does_not_fit_is_one_line_and_nothing_is_written(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: Any, message: str
) -> None:
    write_json(results / f"{name}.json", content)
    fails(results, tmp_path / "out", capsys, f"{results / name}.json", message)


def test_missing_files_are_one_line(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(tmp_path / "nowhere", tmp_path / "out", capsys, f"{tmp_path / 'nowhere'} is no folder")
    (results / "norm_gate.json").write_text("[{")
    fails(results, tmp_path / "out", capsys, f"{results / 'norm_gate.json'} is not JSON")
    for path in results.glob("*.json"):
        path.unlink()
    fails(results, tmp_path / "out", capsys, f"{results / 'ceilings.json'} does not exist")
    write_json(results / "ceilings.json", CEILINGS)
    fails(results, tmp_path / "out", capsys, "holds no results")


def fails(results: Path, output: Path, capsys: pytest.CaptureFixture[str], *messages: str) -> None:
    with pytest.raises(SystemExit) as stop:
        report(results, output)
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(message in error for message in messages), error
    assert not output.exists()
