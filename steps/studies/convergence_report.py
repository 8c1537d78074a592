"""How many samples and seconds trainings needed to reach a fixed quality, and how much seeds differ in that."""

import statistics
from typing import Any

from matplotlib.figure import Figure
from tabulate import tabulate as render

from steps.studies.convergence import AFTER
from steps.studies.rows import Row, cases


class Model:
    """What was measured of a model. about: the axes, origin and rows of all its seeds; runs: the lines of the seeds
    that reached the target."""

    def __init__(self, lines: list[Row]) -> None:
        self.about = next(line for line in lines if "repetition" not in line)
        self.runs = [line for line in lines if "repetition" in line]
        self.name: str = self.about["model"]

    def values(self, metric: str) -> list[float]:
        """The metric of each seed that reached the target."""
        return [run[metric] for run in self.runs]

    def curve(self) -> list[tuple[int, float, float, float]]:
        """Samples, and the quality then: its mean over all seeds, the lowest and the highest."""
        names = [name for name in self.about if name.startswith(AFTER) and "/" not in name]
        ends = ("", "/low", "/high")
        return [(int(name.removeprefix(AFTER)), *(self.about[name + end] for end in ends)) for name in names]


def report(rows: list[Row], study: dict[str, Any]) -> tuple[str, Figure, list[Row]]:
    """Markdown, the curves, and a line per model, without the curve."""
    panels = panels_of(rows)
    models = [model for found in panels.values() for model in found]
    commits = ", ".join(dict.fromkeys(model.about["commit"][:9] for model in models))
    digests = ", ".join(dict.fromkeys(model.about["data_sha256"] for model in models))
    parts = [
        f"# {study['title']}",
        "A sample is an interaction that is trained on as a target, each time it is. Reached: of all seeds those whose "
        "quality on validation came to the target within the budget; the other columns are of these alone. A seed is "
        "as far as its first evaluation that is no lower than the target. CV: standard deviation over seeds / mean.",
        "Each run was trained alone on the device, past the target to the end of its budget, and evaluated on all of "
        "validation every so many samples, to the next whole step. Seconds have the capturing of CUDA graphs, and no "
        f"compiling. Commits {commits}. Hashes of the data: {digests}.",
    ]
    for (device, data, protocol, quality, target), found in panels.items():
        parts += [
            f"## {data}, protocol {protocol}, {device}: {quality.upper()} of {target:.4f}",
            samples_table(found),
            seconds_table(found),
        ]
    parts.append("![Quality by samples](figure.svg)")
    return "\n\n".join(parts) + "\n", _draw(panels), [_line(model) for model in models]


def panels_of(rows: list[Row]) -> dict[tuple[str, str, str, str, float], list[Model]]:
    """The models by device, data, protocol, quality and target, in order of appearance."""
    of_model: dict[tuple[str, ...], list[Row]] = {}
    for line in cases(rows):
        key = tuple(line[name] for name in ("device", "data", "protocol", "quality", "model"))
        of_model.setdefault(key, []).append(line)
    found: dict[tuple[str, str, str, str, float], list[Model]] = {}
    for (device, data, protocol, quality, _), lines in of_model.items():
        model = Model(lines)
        found.setdefault((device, data, protocol, quality, model.about["target"]), []).append(model)
    return found


def variation(values: list[float]) -> float | None:
    """The standard deviation of a sample over its mean; None of fewer than two."""
    return statistics.stdev(values) / statistics.fmean(values) if len(values) > 1 else None


def samples_table(found: list[Model]) -> str:
    """A line a model: how many seeds reached the target, and with how many samples and passes."""
    table = []
    for model in found:
        about, values = model.about, model.values("samples")
        passes = f"{statistics.fmean(values) / about['pass']:.2f}" if values else ""
        sizes = [f"{about[name]:,.0f}" for name in ("every", "budget")]
        table.append([model.name, _reached(model), *_spread(values, "{:,.0f}"), passes, *sizes])
    headers = ["model", "reached", "samples, min", "mean", "max", "CV", "passes, mean", "evaluated every", "budget"]
    return render(table, headers, tablefmt="github", disable_numparse=True)


def seconds_table(found: list[Model]) -> str:
    """A line a model: the seconds to the target, of training, and with the evaluations until then."""
    table = [
        [
            model.name,
            *_spread(model.values("training"), "{:.2f}"),
            *_spread(model.values("elapsed"), "{:.2f}"),
        ]
        for model in found
    ]
    headers = ["model", "training s, min", "mean", "max", "CV", "with evaluation s, min", "mean", "max", "CV"]
    return render(table, headers, tablefmt="github", disable_numparse=True)


def _reached(model: Model) -> str:
    seeds = model.about["seeds"]
    return f"{len(model.runs)} of {seeds:.0f} ({len(model.runs) / seeds:.1%})"


def _spread(values: list[float], form: str) -> list[str]:
    """Minimum, mean, maximum and coefficient of variation; empty where there are no values."""
    if not values:
        return [""] * 4
    cv = variation(values)
    ends = [form.format(value) for value in (min(values), statistics.fmean(values), max(values))]
    return [*ends, "" if cv is None else f"{cv:.1%}"]


def _line(model: Model) -> Row:
    """A model's line of table.csv."""
    found = {name: value for name, value in model.about.items() if not name.startswith(AFTER)}
    found["reached"] = len(model.runs)
    for metric in ("samples", "training", "elapsed"):
        values = model.values(metric)
        if values:
            found |= {f"{metric}/low": min(values), metric: statistics.fmean(values), f"{metric}/high": max(values)}
            found[f"{metric}/cv"] = variation(values)
    return found


def _draw(panels: dict[tuple[str, str, str, str, float], list[Model]]) -> Figure:
    """A panel per data set, protocol and device: the mean curve between the lowest and the highest, and on the target's
    line when the seeds reached it, the mean between the first and the last."""
    figure = Figure(figsize=(1.2 + 3.9 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, ((device, data, protocol, quality, target), found) in zip(axes, panels.items(), strict=True):
        axis.axhline(target, color="grey", linewidth=0.8, linestyle=":")
        for number, model in enumerate(found):
            samples, mean, low, high = zip(*model.curve(), strict=True)
            millions = [count / 1e6 for count in samples]
            axis.fill_between(millions, low, high, color=f"C{number}", alpha=0.25, linewidth=0)
            axis.plot(millions, mean, color=f"C{number}", linewidth=1, label=model.name)
            if values := [count / 1e6 for count in model.values("samples")]:
                middle = statistics.fmean(values)
                error = [[middle - min(values)], [max(values) - middle]]
                axis.errorbar(middle, target, xerr=error, fmt="o", color=f"C{number}", markersize=4, capsize=2)
        title = f"{data}, {protocol}, {device}"
        axis.set(xlabel="million samples", ylabel=f"{quality.upper()}, validation", title=title)
        axis.title.set_fontsize(9)
        axis.legend(frameon=False, fontsize=8, loc="lower right")
    return figure
