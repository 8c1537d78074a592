"""What the figures of an experiment show: learning curves, intervals, groups of users, speed against quality."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, StrMethodFormatter

from steps.common import params
from steps.reporting.details import groups_of, reliability
from steps.reporting.figures import MARK, OTHERS, literal, style_of
from steps.reporting.published import published_figures
from steps.reporting.records import Record, by_row, mean_and_sd
from steps.reporting.task import Task, printed, task_of_records

_WIDTH, _HEIGHT = 4.2, 3.3  # inches of a panel, without the labels at its right
_LONGEST = 60  # characters of a label
_GAP, _TOP = 0.062, 0.97  # of a panel's height: the least between two labels, and the highest place of one


@dataclass(frozen=True)
class Shown:
    """What all figures of an experiment have in common.

    records: of its runs. titles: of data sets. groups: the rows that share a panel, by its title; one without a title
    where all do. paper: what others published.
    """

    records: list[Record]
    titles: dict[str, str]
    groups: dict[str, list[str]]
    paper: dict[str, Any]

    @property
    def task(self) -> Task:
        """What the experiment is about."""
        return task_of_records(self.records)

    @property
    def tables(self) -> list[tuple[str, str]]:
        """The (dataset, protocol) of every table."""
        return list(dict.fromkeys((record.run.dataset, record.run.protocol) for record in self.records))

    @property
    def panels(self) -> list[tuple[str, str, str]]:
        """The (dataset, protocol, group) of every panel: a table's groups side by side."""
        return [(*table, group) for table in self.tables for group in self.groups]

    def rows(self, dataset: str, protocol: str, group: str) -> dict[str, list[Record]]:
        """The records of each row of a panel, by the row."""
        found = by_row(self.records)
        keys = {model: (dataset, protocol, model) for model in self.groups[group]}
        return {model: found[key] for model, key in keys.items() if key in found}

    def others(self, kind: str, dataset: str, protocol: str) -> dict[str, Any]:
        """What others reported of a data set, by the row; nothing beside a protocol of ours. kind: a key of `paper`.

        Published figures without the compared metric are left out.
        """
        theirs = published_figures(self.paper, dataset, protocol)
        if kind == "reruns":
            return self.paper[kind].get(dataset, {}) if theirs else {}
        return {row: figures for row, figures in theirs.items() if self.task.compared in figures}

    def label(self, model: str, group: str = "") -> str:
        """Of a row, without what the group's title says; the beginning of a long one."""
        text = params.label(model).removeprefix(f"{group}, ")
        return literal(text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…")

    def title(self, dataset: str, protocol: str, group: str = "") -> str:
        """Of a panel."""
        return literal(
            ", ".join(filter(None, [self.titles[dataset], f"protocol {protocol}"])) + (f"\n{group}" * bool(group))
        )


def groups_of_rows(experiment: dict[str, Any], records: list[Record]) -> dict[str, list[str]]:
    """The rows of each group of panels: as the experiment says, the points of a grid by their row, or all in one."""
    models = list(dict.fromkeys(record.run.model for record in records))
    if "groups" in experiment:
        return {title: [name for name in names if name in models] for title, names in experiment["groups"].items()}
    if "grid" not in experiment:
        return {"": models}
    rows = dict.fromkeys(model.split("+")[0] for model in models)
    return {params.label(row): [model for model in models if model.split("+")[0] == row] for row in rows}


def draw_curves(shown: Shown) -> Figure:
    """The compared metric after every epoch: the mean over seeds in the band of all seeds; a panel a table and group.

    Epochs on a logarithmic axis, as schedules differ twentyfold. Points: the epochs that the table's figures are of.
    Diamonds at the right: published figures. Crosses: the authors' code, rerun.
    """
    metric = shown.task.compared
    figure, axes = _panels(len(shown.panels), len(shown.groups) if len(shown.groups) > 1 else 3)
    for axis, (dataset, protocol, group) in zip(axes, shown.panels, strict=True):
        published, reruns = (shown.others(kind, dataset, protocol) for kind in ("public_datasets", "reruns"))
        labels, split = [], "test"
        for place, (model, seeds) in enumerate(shown.rows(dataset, protocol, group).items()):
            style = style_of(place)
            colour = style["color"]
            split = "valid" if f"valid/{metric}" in seeds[0].history[0] else "test"
            epochs, values = _curves(seeds, f"{split}/{metric}")
            mean = values.mean(axis=0)
            labels.append((shown.label(model, group), mean[-1], colour))
            if len(epochs) == 1:  # a model without epochs
                axis.axhline(mean[0], linewidth=1, **style)
                continue
            axis.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.18, linewidth=0)
            axis.plot(epochs, mean, linewidth=1.3, **style)
            kept = [_kept(seed, f"{split}/{metric}") for seed in seeds]
            axis.plot(*zip(*kept, strict=True), "o", color=colour, markersize=2.5)
            if model in published:
                axis.plot(
                    1, published[model][metric], "D", color=colour, transform=axis.get_yaxis_transform(), **_DIAMOND
                )
            if model in reruns:
                points = [(epoch, figures[metric]) for epoch, figures in reruns[model]["epochs"].items()]
                axis.plot(*zip(*points, strict=True), "x", color=colour, markersize=4.5)
        marks = [("◇ published", published), ("× the authors' code, rerun", reruns)]
        named = ", ".join(["epoch", *(words for words, others in marks if others)])
        axis.set(title=shown.title(dataset, protocol, group), xlabel=named, ylabel=f"{split} {printed(metric)}")
        _logarithmic(axis)
        axis.set_ylim(bottom=min(shown.task.floor, axis.dataLim.y0))
        _label_ends(axis, labels)
    return figure


def draw_intervals(shown: Shown, intervals: dict[tuple[str, str, str], tuple[float, float, float]]) -> Figure:
    """The compared metric on test with its interval over users, a panel a table. Diamonds: published figures.

    intervals: mean, low and high by (dataset, protocol, model).
    """
    metric = shown.task.compared
    drawn = {model for _, _, model in intervals}
    models = [model for model in dict.fromkeys(itertools.chain(*shown.groups.values())) if model in drawn]
    figure, axes = _panels(len(shown.tables), 3, height=0.9 + 0.24 * max(len(models), 3), share=True)
    for axis, (dataset, protocol) in zip(axes, shown.tables, strict=True):
        published = shown.others("public_datasets", dataset, protocol)
        for height, model in enumerate(models):
            if (dataset, protocol, model) not in intervals:
                continue
            mean, low, high = intervals[dataset, protocol, model]
            axis.plot([low, high], [height, height], color=MARK, linewidth=2.2, solid_capstyle="butt")
            axis.plot(mean, height, "o", color=MARK, markersize=4.5)
            if model in published:
                axis.plot(published[model][metric], height, "D", color=OTHERS, **_DIAMOND)
        axis.set_yticks(range(len(models)), [shown.label(model) for model in models])
        axis.set_ylim(max(len(models), 1) - 0.5, -0.5)
        axis.set(title=shown.title(dataset, protocol), xlabel=f"test {printed(metric)}, 95 % interval over users")
        axis.grid(visible=False, axis="y")
        axis.set_xlim(left=min(shown.task.floor, axis.dataLim.x0))
    return figure


def draw_groups(shown: Shown) -> Figure:
    """Of retrieval the compared metric by the length of the user's history, and by the popularity of the target; of
    ranking how often what is predicted comes true."""
    if shown.task.name == "ranking":
        return draw_reliability(shown)
    metric = shown.task.compared
    figure, axes = _panels(2 * len(shown.panels), 2)
    for place_of_panel, (dataset, protocol, group) in enumerate(shown.panels):
        rows = shown.rows(dataset, protocol, group)
        for axis, (key, what) in zip(axes[2 * place_of_panel :], _GROUPS.items(), strict=False):
            labels, names = [], _names(rows, key, metric)
            for place, (model, seeds) in enumerate(rows.items()):
                of_groups = groups_of(seeds, key, metric)
                points = [(names.index(name), value) for name, value in of_groups.items()]
                if points:
                    axis.plot(*zip(*points, strict=True), marker="o", markersize=3.5, linewidth=1.2, **style_of(place))
                    labels.append((shown.label(model, group), points[-1][1], style_of(place)["color"]))
            axis.set_xticks(range(len(names)), names)
            axis.set(title=shown.title(dataset, protocol, group), xlabel=what, ylabel=f"test {printed(metric)}")
            axis.set_ylim(bottom=min(shown.task.floor, axis.dataLim.y0))
            _label_ends(axis, labels)
    return figure


def draw_reliability(shown: Shown) -> Figure:
    """The share of engagements against what was predicted, in groups of equal size by what was predicted, means over
    seeds; a panel a table and group. Dashed: as predicted."""
    figure, axes = _panels(len(shown.panels), len(shown.groups) if len(shown.groups) > 1 else 3)
    for axis, (dataset, protocol, group) in zip(axes, shown.panels, strict=True):
        labels = []
        axis.plot([0, 1], [0, 1], linewidth=1, linestyle="--", color=OTHERS)
        for place, (model, seeds) in enumerate(shown.rows(dataset, protocol, group).items()):
            points = [(row["predicted"], row["positive"]) for row in reliability(seeds)]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=2.5, linewidth=1.2, **style_of(place))
            labels.append((shown.label(model, group), points[-1][1], style_of(place)["color"]))
        axis.set(title=shown.title(dataset, protocol, group), xlabel="predicted probability", ylabel="share engaged")
        axis.set(xlim=(0, 1), ylim=(0, 1))
        _label_ends(axis, labels)
    return figure


def draw_speed(shown: Shown) -> Figure:
    """The compared metric on test against the seconds of a training, means over seeds; a panel a table and group."""
    metric = shown.task.compared
    figure, axes = _panels(len(shown.panels), len(shown.groups) if len(shown.groups) > 1 else 3)
    for axis, (dataset, protocol, group) in zip(axes, shown.panels, strict=True):
        points, rows = [], shown.rows(dataset, protocol, group)
        for place, (model, seeds) in enumerate(rows.items()):
            seconds = max(mean_and_sd(seed.metrics["train_seconds"] for seed in seeds)[0], 0.01)
            quality = mean_and_sd(seed.metrics["test"][metric] for seed in seeds)[0]
            colour = style_of(place)["color"]
            axis.plot(seconds, quality, "o", color=colour, markersize=5)
            points.append((shown.label(model, group), seconds, quality, colour))
        devices = dict.fromkeys(str(seed.metrics["device"]) for seeds in rows.values() for seed in seeds)
        _logarithmic(axis, beside=3)
        axis.set(title=shown.title(dataset, protocol, group), xlabel=f"seconds of a training\n{'; '.join(devices)}")
        axis.set(ylabel=f"test {printed(metric)}")
        floor, top = min(shown.task.floor, axis.dataLim.y0), axis.get_ylim()[1]
        axis.set_ylim(floor, floor + 1.08 * (top - floor))
        _label_points(axis, points)
    return figure


_GROUPS = {"by_history_length": "interactions before the target", "by_popularity": "popularity of the target"}


_TICKS = [number * 10**decade for decade in range(-2, 6) for number in (1, 3)]
_DIAMOND: dict[str, Any] = {"markersize": 5, "fillstyle": "none", "clip_on": False}


def _panels(number: int, columns: int, height: float = _HEIGHT, share: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels in rows of at most `columns`. share: the axis of heights."""
    columns = min(columns, number)
    rows = -(-number // columns)
    figure = Figure(figsize=((_WIDTH + 1.6) * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=share).flatten().tolist()
    for axis in axes[number:]:
        axis.remove()
    return figure, axes[:number]


def _curves(seeds: Sequence[Record], name: str) -> tuple[list[int], np.ndarray]:
    """The epochs (E,) that all seeds evaluated, and the metric's values (seeds, E) there."""
    curves = [seed.curve(name) for seed in seeds]
    epochs = [epoch for epoch in curves[0] if all(epoch in curve for curve in curves)]
    return epochs, np.array([[curve[epoch] for epoch in epochs] for curve in curves])


def _kept(seed: Record, name: str) -> tuple[int, float]:
    """The epoch that the seed's figures are of, and the metric's value there; the last that was evaluated before it."""
    curve = seed.curve(name)
    epoch = max(epoch for epoch in curve if epoch <= seed.metrics["epoch"])
    return epoch, curve[epoch]


def _names(rows: dict[str, list[Record]], key: str, metric: str) -> list[str]:
    """The groups that have a user, in the order in which evaluation names them."""
    found = [groups_of(seeds, key, metric) for seeds in rows.values()]
    return list(dict.fromkeys(name for groups in found for name in groups))


def _logarithmic(axis: Axes, beside: float = 1.0) -> None:
    """A logarithmic axis with plain numbers. beside: the factor by which it goes on at both ends."""
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    axis.set_xlim(low / beside, high * beside)
    axis.set_xticks([tick for tick in _TICKS if low / beside <= tick <= high * beside])
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.xaxis.set_minor_locator(NullLocator())


def _label_ends(axis: Axes, labels: Iterable[tuple[str, float, Any]]) -> None:
    """Write each label at the right of the panel, at its value where there is room, in its colour."""
    low, high = axis.get_ylim()
    ordered = sorted(((value - low) / (high - low), text, colour) for text, value, colour in labels)
    places = _spread([place for place, _, _ in ordered])
    for place, (_, text, colour) in zip(places, ordered, strict=True):
        axis.annotate(text, (1.03, place), xycoords="axes fraction", va="center", color=colour, fontsize=8)


def _label_points(axis: Axes, points: list[tuple[str, float, float, Any]]) -> None:
    """Write each label beside its point: on the side that has more room, at its height where that is free."""
    low, high = axis.get_ylim()
    left, right = (np.log10(end) for end in axis.get_xlim())
    at = [
        (text, (np.log10(x) - left) / (right - left), (y - low) / (high - low), colour) for text, x, y, colour in points
    ]
    for side, alignment in ((False, "left"), (True, "right")):
        ordered = sorted((point for point in at if (point[1] > 0.5) == side), key=lambda point: point[2])
        places = _spread([y for _, _, y, _ in ordered])
        for place, (text, x, _, colour) in zip(places, ordered, strict=True):
            beside = x + (-0.02 if side else 0.02)
            axis.annotate(
                text, (beside, place), xycoords="axes fraction", ha=alignment, va="center", color=colour, fontsize=8
            )


def _spread(wanted: list[float]) -> list[float]:
    """Places in the order of the wanted ones, at least `_GAP` apart, below `_TOP`, and as near as that allows."""
    blocks: list[list[float]] = []  # of labels that touch: their number, and the mean of the first's wanted places
    for place in wanted:
        blocks.append([1, place])
        while len(blocks) > 1 and blocks[-2][1] + blocks[-2][0] * _GAP > blocks[-1][1]:
            number, first = blocks.pop()
            before = blocks[-1]
            total = before[0] + number
            before[1] = (before[0] * before[1] + number * (first - before[0] * _GAP)) / total
            before[0] = total
    places = [first + at * _GAP for number, first in blocks for at in range(int(number))]
    return [min(place, _TOP - above * _GAP) for above, place in zip(reversed(range(len(places))), places, strict=True)]
