"""A load test of a table: milliseconds of a step and its parts, by rows of the table and processes."""

from typing import Any

from matplotlib.figure import Figure
from tabulate import tabulate as render

from steps.studies.rows import PART, Row, cases
from steps.studies.table_load import OURS, PARTS

_WHOLE = "whole step"


def report(rows: list[Row], study: dict[str, Any]) -> tuple[str, Figure, list[Row]]:
    """Markdown, the parts of a step, and a line per case."""
    lines, given = cases(rows), study["measure"]["settings"]
    table = [
        [
            *(str(line[key]) for key in ("device", "data", "rows", "columns")),
            _by(line),
            str(line["processes"]),
            f"{line['table rows']:,.0f}",
            f"{line['table'] / 1e6:,.1f}",
            f"{line['ids']:,.0f}",
            f"{line['sent'] / 1e6:.3f}" if "sent" in line else "-",
            *(
                f"{line[name]:.3f}" if name in line else "-"
                for name in ("step", *(f"{PART}{part}" for part in PARTS), "making ids")
            ),
            line["commit"][:9],
        ]
        for line in lines
    ]
    headers = [
        "device",
        "data",
        "x users",
        "x items",
        "table of",
        "processes",
        "rows of the table",
        "MB a process",
        "ids a process",
    ]
    headers += ["MB sent", "step, ms", *(f"{part}, ms" for part in PARTS), "making ids, ms", "commit"]
    digests = ", ".join(dict.fromkeys(line["data_sha256"] for line in lines))
    note = (
        "A load test, no evaluation: ids of a fractal expansion, which has no times and no order that means anything. "
        f"Half-precision vectors of {given['dim']}, rowwise Adagrad; of the process that takes longest, the mean of a "
        "step. A step looks up the rows of some users' sequences, each once, and learns from a gradient of all. Its "
        "parts are timed apart, with the host waiting between them: their sum may be more than the step. Lookup has "
        "finding the owners, update has the adding up of gradients; making ids is not part of a step. Of fbgemm_gpu's "
        f"table, which TorchRec shares out, whole steps are timed alone. Hash of the data: {digests}."
    )
    markdown = render(table, headers, tablefmt="github", disable_numparse=True)
    return f"# {study['title']}\n\n{note}\n\n{markdown}\n", _draw(lines), lines


def _draw(lines: list[Row]) -> Figure:
    """A bar per case, of the parts of its step, or of the whole where they are not timed."""
    figure = Figure(figsize=(7, 1.2 + 0.3 * len(lines)), layout="constrained")
    axis = figure.subplots()
    left = [0.0] * len(lines)
    for part in (*PARTS, _WHOLE):
        values = [_length(line, part) for line in lines]
        axis.barh(range(len(lines)), values, left=left, label=part)
        left = [one + value for one, value in zip(left, values, strict=True)]
    names = [f"{line['table rows'] / 1e6:,.1f} M rows, {_by(line)}, {line['processes']} processes" for line in lines]
    axis.set_yticks(range(len(lines)), names)
    axis.set(xlabel="load test: ms of a step's parts, timed apart")
    axis.invert_yaxis()
    axis.legend(frameon=False, fontsize=8)
    return figure


def _length(line: Row, part: str) -> float:
    """Milliseconds of the part, or of the whole where no part was timed."""
    whole = line["step"] if part == _WHOLE and PART + PARTS[0] not in line else 0.0
    return float(line[PART + part]) if PART + part in line else whole


def _by(line: Row) -> str:
    return "ours" if line["by"] == OURS else "TorchRec" if line["processes"] > 1 else "fbgemm_gpu"
