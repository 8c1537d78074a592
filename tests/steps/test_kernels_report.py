"""The kernels' report, from a few rows whose figures are worked out by hand."""

from pathlib import Path
from typing import Any

import pytest

from steps.common.cli import StepError
from steps.reporting.figures import save_figure
from steps.studies.kernels_report import report
from steps.studies.rows import Row, row

MACHINE = {"device": "NVIDIA H200", "commit": "a" * 40}
UNITS = {"ms": "ms", "captured": "of 1", "flops": "FLOP", "bytes": "B", "peak_bytes": "B"}


def rows_of(operation: str, line: dict[str, Any], machine: dict[str, str] = MACHINE) -> list[Row]:
    axes = {"operation": operation} | {name: value for name, value in line.items() if name not in UNITS}
    seen = axes.pop("seen", None)
    found = [row(axes, name, line[name], unit) for name, unit in UNITS.items() if line.get(name) is not None]
    if seen:
        found = [row(axes, "failed", 1, "of 1", seen=seen)]
    return [one | machine for one in found]


def roofs(machine: dict[str, str] = MACHINE) -> list[Row]:
    case = {"operation": "roofs"}
    return [one | machine for one in (row(case, "copy", 4e12, "B/s"), row(case, "product", 8e14, "FLOP/s"))]


def attention(
    implementation: str, part: str, bias: str, n: int, ms: float, tflops: float | None, **other: Any
) -> dict[str, Any]:
    line = {"implementation": implementation, "pass": part, "bias": bias, "n": n, "ms": ms, "dtype": "bfloat16"}
    line |= {"batch": 65536 // n, "heads": 4, "dqk": 64, "dv": 64, "lengths": "full", "bytes": 10**8}
    return line | {"flops": None if tflops is None else tflops * ms * 1e9} | other


def gate(implementation: str, part: str, tokens: int, ms: float, peak: float | None) -> dict[str, Any]:
    line = {"implementation": implementation, "pass": part, "dtype": "bfloat16", "tokens": tokens, "dim": 256}
    return line | {"ms": ms, "bytes": 10**8, "peak_bytes": peak}


ATTENTION = [
    attention("dense torch", "fwd", "none", 1024, 4.0, None),
    attention("ours", "bwd", "none", 1024, 0.5, 170.0),
    attention("ours", "fwd", "both", 1024, 0.1755, 195.44),
    attention("ours", "fwd", "none", 1024, 0.117, 293.14),
    attention("ours", "fwd", "both", 2048, 0.36, 200.0),
    attention("ours", "fwd", "none", 2048, 0.3, 240.0),
    attention("ours, deterministic", "bwd", "none", 1024, 0.625, 136.0),
    attention("ours", "fwd", "none", 1024, 0.08, 260.0, lengths="ragged"),
]
GATES = [
    gate("torch", "fwd", 1000, 0.9, 40e6),
    gate("torch, compiled", "fwd", 1000, 0.6, 20e6),
    gate("ours", "fwd", 1000, 0.3, 10e6),
    gate("ours", "fwd", 65536, 12.25, None),  # without a reference
]
LOSS = gate("ours", "fwd+bwd", 4096, 2.0, 1e6) | {"negatives": 512, "items": 100_000, "flops": 5e10}


def measured(machine: dict[str, str] = MACHINE) -> list[Row]:
    found = [*roofs(machine)]
    for operation, lines in (("hstu_attention", ATTENTION), ("norm_gate", GATES), ("sampled_softmax", [LOSS])):
        found += [one for line in lines for one in rows_of(operation, line, machine)]
    return found


def tables_of(rows: list[Row], **study: Any) -> dict[str, list[list[str]]]:
    """The tables of a report by title: the cells of every line, headers first."""
    text, _, _ = report(rows, {"title": "Kernels", **study})
    tables: dict[str, list[list[str]]] = {}
    for section in text.split("\n## ")[1:]:
        title, *lines = section.splitlines()
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
        tables[title] = [cells[0], *cells[2:]]
    return tables


def test_attention_has_a_table_per_case_and_what_the_biases_cost() -> None:
    tables = tables_of(measured())
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


def test_ours_stands_beside_causal_softmax_of_the_same_run() -> None:
    lines = [
        attention("ours", "fwd", "none", 1024, 0.2, 300.0),
        attention("cuDNN (sdpa)", "fwd", "none", 1024, 0.3, 200.0),
        attention("FlexAttention", "fwd", "none", 1024, 0.5, 120.0, captured=0),
        attention("ours", "bwd", "both", 1024, 0.5, 170.0),
        attention("FlexAttention", "bwd", "both", 1024, 0.0, None, seen="torch 2.11.0: `int` is no `float`"),
        attention("ours", "fwd", "both", 1024, 0.4, 150.0),
        attention("FlexAttention", "fwd", "both", 1024, 0.6, 100.0, captured=1),
    ]
    card = MACHINE | {"card": "0a1b2c3d"}
    rows = [one for line in lines for one in rows_of("hstu_attention", line, card)]
    title = "HSTU attention beside causal softmax: their time / ours with the same bias, full lengths, NVIDIA H200"
    tables = tables_of([*roofs(), *rows])
    assert tables[title] == [
        ["dtype", "dqk", "heads", "pass", "theirs", "bias", "N 1,024 (B 64)"],
        ["bfloat16", "64", "4", "fwd", "cuDNN (sdpa)", "none", "1.50"],
        ["bfloat16", "64", "4", "fwd", "FlexAttention", "none", "2.50*"],
        ["bfloat16", "64", "4", "fwd", "FlexAttention", "both", "1.50"],
        ["bfloat16", "64", "4", "bwd", "FlexAttention", "both", "failed"],
    ]
    text, _, _ = report([*roofs(), *rows], {"title": "Kernels"})
    assert text.count("Failed: FlexAttention, bias both, bwd: `torch 2.11.0: 'int' is no 'float'`.") == 2
    assert text.count("launches included, as no CUDA graph was made") == 2
    assert "| 0.500 (120.0)* " in text
    # Ours of another card, or of another commit, is no measure; nor is one whose card is not known.
    for other in (MACHINE | {"card": "ffffffff"}, card | {"commit": "b" * 40}, MACHINE):
        theirs = [one for line in lines[1:3] for one in rows_of("hstu_attention", line, other)]
        assert title not in tables_of([*roofs(), *rows_of("hstu_attention", lines[0], card), *theirs])


def test_other_operations_stand_beside_the_slowest_reference() -> None:
    tables = tables_of(measured())
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


def test_devices_never_share_a_table_and_points_stand_under_their_own_roof(tmp_path: Path) -> None:
    other = {"device": "NVIDIA H100", "commit": "b" * 40}
    both = [*measured(), *(one for line in ATTENTION for one in rows_of("hstu_attention", line, other))]
    assert len([title for title in tables_of(both) if "full lengths" in title]) == 2
    text, _, _ = report(both, {"title": "Kernels"})
    assert "Commit aaaaaaaaa." in text
    assert "Commit bbbbbbbbb." in text
    save_figure(lambda: report(both, {"title": "Kernels"})[1], tmp_path / "both")
    save_figure(lambda: report(measured(), {"title": "Kernels"})[1], tmp_path / "alone")
    assert (tmp_path / "both.svg").read_bytes() == (tmp_path / "alone.svg").read_bytes()


def test_published_figures_stand_beside_ours() -> None:
    entry = {"implementation": "theirs", "source": "a paper", "device": "H100", "dqk": 64, "batch": 16}
    rows = [entry | {"pass": "fwd", "n": 1024, "tflops": 400}, entry | {"pass": "fwd", "n": 512, "tflops": 350}]
    tables = tables_of(measured(), published={"sources": {}, "rows": rows})
    assert tables["Attention measured by others, beside ours on NVIDIA H200"][1:] == [
        ["theirs", "H100", "fwd", "64", "1,024", "16", "400.0", "293.1 (B 64, 4 heads, bfloat16)", "a paper"],
        ["theirs", "H100", "fwd", "64", "512", "16", "350.0", "", "a paper"],
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (rows_of("hstu_attention", ATTENTION[3] | {"ms": None}), "rows of hstu_attention, ours: 'ms' is a required"),
        (rows_of("hstu_attention", ATTENTION[3] | {"ms": 0}), "ours, key ms: 0 is less than or equal to"),
        (rows_of("norm_gate", GATES[2] | {"pass": "forward"}), "rows of norm_gate, ours, key pass: 'forward' is not"),
        (roofs()[:1], "rows of roofs, NVIDIA H200: 'product' is a required property"),
    ],
)
def test_what_does_not_fit_is_named(rows: list[Row], message: str) -> None:
    with pytest.raises(StepError, match=message):
        report(rows, {"title": "Kernels"})


def test_without_roofs_there_is_no_roofline() -> None:
    with pytest.raises(StepError, match="no rows of roofs"):
        report(measured()[2:], {"title": "Kernels"})
