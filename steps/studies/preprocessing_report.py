"""How long preprocessing takes: seconds of its parts, in every repetition."""

import statistics
from typing import Any

from matplotlib.figure import Figure
from tabulate import tabulate as render

from steps.studies.rows import Row, cases

_PARTS = {"parse_validate": "parse, validate", "sort_split_write": "sort, split, write"}


def report(rows: list[Row], study: dict[str, Any]) -> tuple[str, Figure, list[Row]]:
    """Markdown, bars of the repetitions, and a line per repetition."""
    lines = cases(rows)
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for line in lines:
        machine = line.get("processor", line["device"])
        groups.setdefault((line["dataset"], machine, line["cores"], line["commit"]), []).append(line)
    table = []
    for (dataset, machine, cores, commit), repetitions in groups.items():
        middle = [f"{statistics.median(line[part] for line in repetitions):.3f}" for part in (*_PARTS, "total")]
        first = f"{repetitions[0]['total']:.3f}"
        table.append([dataset, str(len(repetitions)), first, *middle, f"{machine}, {cores} cores", commit[:9]])
    headers = ["data", "repetitions", "first, s", *(f"{part}, s" for part in _PARTS.values()), "total, s"]
    note = (
        "Seconds from raw files to sequences, medians over the repetitions; and of the first, which also loads "
        "libraries that are imported late."
    )
    markdown = render(table, [*headers, "device", "commit"], tablefmt="github", disable_numparse=True)
    return f"# {study['title']}\n\n{note}\n\n{markdown}\n", _draw(groups), lines


def _draw(groups: dict[tuple[Any, ...], list[Row]]) -> Figure:
    """A bar per repetition, of its two parts, a panel per data set and machine."""
    figure = Figure(figsize=(4 * len(groups), 3), layout="constrained")
    axes = figure.subplots(1, len(groups), squeeze=False)[0]
    for axis, ((dataset, machine, cores, _), repetitions) in zip(axes, groups.items(), strict=True):
        bottom = [0.0] * len(repetitions)
        for part, label in _PARTS.items():
            heights = [line[part] for line in repetitions]
            axis.bar([str(line["repetition"]) for line in repetitions], heights, bottom=bottom, label=label)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        axis.set(title=f"{dataset}, {machine}, {cores} cores", xlabel="repetition", ylabel="seconds")
    axes[0].legend(frameon=False)
    return figure
