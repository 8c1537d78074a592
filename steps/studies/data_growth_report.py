"""How time and memory grow with a log: a table of sizes, and lines of both."""

from typing import Any

from matplotlib.figure import Figure
from tabulate import tabulate as render

from steps.studies.data_growth import OURS
from steps.studies.rows import Row, cases

_NOTE = (
    "From a generated file to sequences: checked row by row, filtered, counted, sorted, written. Seconds without "
    "imports; memory is the process's peak, with its libraries. Within a data set the last column is the time a row, "
    "against the first line. pandas makes the same sequences, to the byte; `lists as text` also writes a list per user "
    "into a CSV file, as published code of recommenders does."
)


def report(rows: list[Row], study: dict[str, Any]) -> tuple[str, Figure, list[Row]]:
    """Markdown, two panels, and a line per case."""
    lines = cases(rows)
    ours = {(line["dataset"], line["rows"], line["device"]): line for line in lines if line["implementation"] == OURS}
    table = []
    for line in lines:
        same = [
            other
            for other in lines
            if all(other[key] == line[key] for key in ("dataset", "implementation", "device", "cores"))
        ]
        against = ours.get((line["dataset"], line["rows"], line["device"]), line)["total"]
        table.append(
            [
                line["dataset"],
                f"{line['rows']:,}",
                line["implementation"],
                *(f"{line[part]:.1f}" if part in line else "" for part in ("validate", "preprocess", "total")),
                f"{line['total'] / against:.1f}" if line["implementation"] != OURS else "",
                f"{line['peak'] / 1e9:.2f}",
                f"{line['total'] / line['rows'] / (same[0]['total'] / same[0]['rows']):.2f}" if line != same[0] else "",
                f"{line['device']}, {line['cores']} cores",
                line["commit"][:9],
            ]
        )
    headers = ["form", "rows", "by", "validate, s", "preprocess, s", "total, s", "times ours", "peak, GB", "a row"]
    markdown = render(table, [*headers, "device", "commit"], tablefmt="github", disable_numparse=True)
    return f"# {study['title']}\n\n{_NOTE}\n\n{markdown}\n", _draw(lines), lines


def _draw(lines: list[dict[str, Any]]) -> Figure:
    """Time and memory over rows, on logarithmic axes: a line that is straight and steep as the grid grows linearly."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    panels = figure.subplots(1, 2)
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault(f"{line['dataset']}, {line['implementation']}", []).append(line)
    for panel, (metric, scale, label) in zip(
        panels, [("total", 1, "seconds"), ("peak", 1e9, "peak memory, GB")], strict=True
    ):
        for name, group in groups.items():
            ordered = sorted(group, key=lambda line: line["rows"])
            panel.plot(
                [line["rows"] for line in ordered], [line[metric] / scale for line in ordered], marker="o", label=name
            )
        panel.set(xscale="log", yscale="log", xlabel="rows", ylabel=label)
        panel.grid(alpha=0.3)
    panels[0].legend(frameon=False)
    return figure
