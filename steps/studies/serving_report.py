"""How fast trained runs are served, as tables and a figure."""

from typing import Any

from matplotlib.figure import Figure
from tabulate import tabulate as render

from steps.studies.rows import Row, cases

_LOAD = ("data", "model", "through", "histories", "at_once")


def report(rows: list[Row], study: dict[str, Any]) -> tuple[str, Figure, list[Row]]:
    """Markdown, latencies by load, and a line per case."""
    lines = cases(rows)
    percentiles = [f"p{percentile}" for percentile in study["measure"]["settings"]["percentiles"]]
    loads = [line for line in lines if "through" in line]
    table = [
        [
            *(str(line[name]) for name in _LOAD),
            *(f"{line[name]:.1f}" for name in (*percentiles, "requests")),
            f"{line['requests'] * line['histories']:.1f}",
        ]
        for line in loads
    ]
    headers = ["data", "model", "through", "histories a request", "requests at once"]
    headers += [*(f"{name} ms" for name in percentiles), "requests a second", "histories a second"]
    hits: dict[tuple[str, ...], dict[str, float]] = {}
    for line in lines:
        if "times" in line:
            hits.setdefault((line["data"], line["model"], str(line["epochs"])), {})[line["times"]] = line["hr@10"]
    kinds = list(dict.fromkeys(kind for values in hits.values() for kind in values))
    tested = [[*key, *(f"{values[kind]:.4f}" for kind in kinds)] for key, values in hits.items()]
    cores = ", ".join(dict.fromkeys(str(line["cores"]) for line in loads))
    note = (
        f"`mlflow models serve` on a CPU, {cores} cores, with the client on the same machine; a request has whole "
        "histories of users, of which the model reads its window. Through Python: the loaded model, without HTTP."
    )
    text = [
        f"# {study['title']}",
        note,
        render(table, headers, tablefmt="github", disable_numparse=True),
        "The share of test users whose target is among ten recommendations: with the times that the data have, and "
        "with none, as typed histories are.",
        render(
            tested,
            ["data", "model", "epochs", *(f"times: {kind}" for kind in kinds)],
            tablefmt="github",
            disable_numparse=True,
        ),
    ]
    return "\n\n".join(text) + "\n", _draw(loads, percentiles), lines


def _draw(loads: list[Row], percentiles: list[str]) -> Figure:
    """The percentiles of every load's latencies, a line a load."""
    figure = Figure(figsize=(7, 0.3 * len(loads) + 1.2), layout="constrained")
    axis = figure.subplots()
    places = range(len(loads))
    low, high = percentiles[0], percentiles[-1]
    axis.hlines(places, [line[low] for line in loads], [line[high] for line in loads], color="grey")
    for marker, name in zip("o|x+", percentiles, strict=False):
        axis.plot([line[name] for line in loads], places, marker, label=name)
    names = [
        f"{line['data']}, {line['through']}, {line['histories']} a request, {line['at_once']} at once" for line in loads
    ]
    axis.set_yticks(list(places), names)
    axis.invert_yaxis()
    axis.set(xscale="log", xlabel="ms")
    axis.legend(frameon=False, fontsize=8)
    return figure
