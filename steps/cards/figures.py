"""The figure of a data card, as SVG that stands inside a page and takes its colours."""

import io
from collections.abc import Mapping
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from steps.common.svg import smaller

_INK, _FILL = "#010203", "#4c78a8"  # the first stands for the page's own colour of text
_STYLE: Any = {
    "svg.hashsalt": "hstu",
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans"],
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), _INK
    ),
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))


def draw(numbers: Mapping[str, Any]) -> str:
    """Lengths, popularity, and times and ratings if there are any, of what `numbers.measure` gives."""
    panels = [_lengths, _popularity]
    panels += [panel for name, panel in (("time", _times), ("ratings", _ratings)) if name in numbers]
    with rc_context(_STYLE):
        figure = Figure(figsize=(9, 3 * ((len(panels) + 1) // 2)), layout="constrained")
        axes = figure.subplots((len(panels) + 1) // 2, 2, squeeze=False).flat
        for axis, panel in zip(axes, panels, strict=False):
            panel(axis, numbers)
            axis.minorticks_off()
            axis.yaxis.set_major_formatter("{x:,.0f}")
            if axis.get_yscale() == "linear":
                axis.set_ylim(bottom=0)
                axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
            axis.grid(axis="y", alpha=0.2)
        for axis in list(axes)[len(panels) :]:
            axis.remove()
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata=_NO_METADATA)
    svg = smaller(text.getvalue())
    svg = svg.replace("<svg ", '<svg role="img" aria-label="Distributions; the tables below have their numbers" ', 1)
    return svg.replace(_INK, "currentColor")


def _ticks(low: int, high: int) -> tuple[list[int], list[str]]:
    """Ticks of a logarithmic axis, and their labels: the decades, or more where there are few."""
    steps = (1,) if high >= 100 * low else (1, 2, 5)
    decades = range(len(str(high)))
    ticks = [step * 10**decade for decade in decades for step in steps if low <= step * 10**decade <= high]
    ticks = ticks or [low]
    return ticks, [f"{tick:,}" for tick in ticks]


def _lengths(axis: Axes, numbers: Mapping[str, Any]) -> None:
    bins = numbers["sequence_length"]["histogram"]
    edges = [entry["from"] for entry in bins] + [bins[-1]["to"] + 1]
    axis.stairs([entry["users"] for entry in bins], edges, fill=True, color=_FILL)
    axis.set(xscale="log", title="Sequence lengths", xlabel="interactions of a user", ylabel="users")
    axis.set_xticks(*_ticks(edges[0], edges[-1]))


def _popularity(axis: Axes, numbers: Mapping[str, Any]) -> None:
    points = numbers["item_popularity"]["by_rank"]
    ranks, rows = [[point[name] for point in points] for name in ("rank", "interactions")]
    axis.plot(ranks, rows, ".-", color=_FILL)
    axis.set(xscale="log", yscale="log", title="Item popularity", xlabel="rank of the item", ylabel="interactions")
    axis.set_xticks(*_ticks(ranks[0], ranks[-1]))
    axis.set_yticks(*_ticks(rows[-1], rows[0]))


def _times(axis: Axes, numbers: Mapping[str, Any]) -> None:
    bars = numbers["time"]["histogram"]
    axis.stairs([bar["rows"] for bar in bars], range(len(bars) + 1), fill=True, color=_FILL)
    shown = sorted({0, len(bars) // 2, len(bars) - 1})
    axis.set_xticks([place + 0.5 for place in shown], [bars[place]["from"] for place in shown])
    axis.set(title=f"Interactions by {numbers['time']['unit']}", ylabel="interactions")


def _ratings(axis: Axes, numbers: Mapping[str, Any]) -> None:
    bars = numbers["ratings"]["histogram"]
    rows = [bar["rows"] for bar in bars]
    if bars and "rating" in bars[0]:
        axis.bar([f"{bar['rating']:g}" for bar in bars], rows, color=_FILL)
    elif bars:
        axis.stairs(rows, [bar["from"] for bar in bars] + [bars[-1]["to"]], fill=True, color=_FILL)
    axis.set(title="Ratings", xlabel="rating", ylabel="interactions")
