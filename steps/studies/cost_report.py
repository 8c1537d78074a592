"""What a step of the paper's model takes of a GPU, by shape, number of GPUs and alpha; and where each input is from."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from tabulate import tabulate as render

from steps.studies.rows import Row, cases

_MEMORY = ("table", "table by Adam", "encoder", "activations", "activations here", "in all")
_WIRE = ("ids", "vectors", "gradients of vectors", "gradients of the encoder")
_WORK = ("projections", "attention")


def report(rows: list[Row], study: dict[str, Any]) -> tuple[str, Figure, list[Row]]:
    """Markdown, the floors of time, and a line per case."""
    lines, given = cases(rows), study["measure"]["settings"]
    cards = list(given["cards"])
    floors = [f"{card}: {term}" for card in cards for term in ("products", "traffic")] + ["all-to-all", "all-reduce"]
    fits = [f"{card}: rows that fit" for card in cards]
    kept = f"Activations: {given['kept']['value']} d bytes a token and layer; here: {given['kept_here']['value']} d."
    parts = [
        f"# {study['title']}",
        "Computed from the inputs below, not measured, of one GPU and one step. [What the terms "
        "are](../../../docs/cost.md). "
        f"Commit {', '.join(dict.fromkeys(line['commit'][:9] for line in lines))}.",
        "## Sizes",
        _table(lines, ("tokens", "table rows", "encoder floats"), 1),
        f"## Memory, GB, and rows that fit a card\n\n{kept} In all: without Adam's table, and with the former.",
        _table(lines, _MEMORY, 1e9, fits),
        "## Sent to other GPUs, GB",
        _table(lines, _WIRE, 1e9),
        "## TFLOPs",
        _table(lines, _WORK, 1e12),
        "## The least time, ms\n\nEach at a card's or a wire's full speed. Which of them overlap is not said here.",
        _table(lines, floors, 1),
        "## Inputs",
        _inputs(given),
        "![The least time](figure.svg)",
    ]
    return "\n\n".join(parts) + "\n", _draw(lines, floors), lines


def _table(lines: list[Row], names: Sequence[str], unit: float, counts: Sequence[str] = ()) -> str:
    """Names in units of `unit`, then counts."""
    table = [
        [
            *(str(line[key]) for key in ("shape", "gpus", "alpha")),
            *(_short(line[name] / unit) for name in names),
            *(_short(line[name]) for name in counts),
        ]
        for line in lines
    ]
    return render(table, ["shape", "GPUs", "alpha", *names, *counts], tablefmt="github", disable_numparse=True)


def _inputs(given: dict[str, Any]) -> str:
    """A line for each input: its value, and where it is from."""
    lines = []
    for name, entry in given.items():
        for member, values in [(name, entry)] if "source" in entry else entry.items():
            shown = [f"{key} {_plain(value)}" for key, value in values.items() if key not in ("source", "value")]
            lines.append(f"- {member}: {', '.join(shown) or _plain(values['value'])} ({values['source']})")
    return "\n".join(lines)


def _plain(value: Any) -> str:
    return (
        ", ".join(map(_plain, value)) if isinstance(value, list) else f"{value:,g}" if value < 1e6 else f"{value:,.0f}"
    )


def _short(number: float) -> str:
    """With three digits, or all before the point."""
    after = 2 - math.floor(math.log10(number)) if number > 0 else 0
    return f"{number:,.{max(0, after)}f}"


def _draw(lines: list[Row], floors: list[str]) -> Figure:
    """Of each floor its time, a colour for each case."""
    figure = Figure(figsize=(6.5, 1 + 0.3 * len(floors)), layout="constrained")
    axis = figure.subplots()
    for number, line in enumerate(lines):
        label = f"{line['shape']}, {line['gpus']} GPUs, alpha {line['alpha']}"
        marker = "|x_+"[number % 4]
        axis.plot([line[name] for name in floors], floors, marker, color=f"C{number}", markersize=8, label=label)
    axis.set(xscale="log", xlabel="least time of a step, ms")
    axis.minorticks_off()
    axis.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return figure
