"""What models that know nothing score, beside chance."""

from typing import Any

from matplotlib.figure import Figure
from tabulate import tabulate as render

from steps.studies.rows import Row, cases

_MODELS = ("constant", "seen in the window")
_CASE = ("data", "repeats", "protocol")


def report(rows: list[Row], study: dict[str, Any]) -> tuple[str, Figure, list[Row]]:
    """Markdown, the figures relative to chance, and a line per case and ranking metric."""
    lines, settings = cases(rows), study["measure"]["settings"]
    table = [
        [*(line[name] for name in _CASE), line["ranking"].upper(), str(line["users"])]
        + [f"{line['random']:.4f} ± {_half(line):.4f}"]
        + [f"{line[model]:.4f}" for model in _MODELS]
        + ["yes" if line["as chance"] else "no"]
        for line in lines
    ]
    digests = ", ".join(dict.fromkeys(line["data_sha256"] for line in lines if "data_sha256" in line))
    protocols = ", ".join(dict.fromkeys(line["protocol"] for line in lines))
    errors = f"{settings['deviations']} standard errors"
    note = (
        f"Models that know nothing, under protocols {protocols}. "
        f"Random: the mean over {settings['seeds']} seeds ± {errors}. "
        f"As chance: the constant model is inside, the rule is not above by more than {errors} of its own. "
        f"Data sha256 {digests}."
    )
    headers = [*_CASE, "metric", "users", "random", *_MODELS, "as chance"]
    markdown = render(table, headers, tablefmt="github", disable_numparse=True)
    return f"# {study['title']}\n\n{note}\n\n{markdown}\n", _draw(lines), lines


def _half(line: Row) -> float:
    return float(line["random/high"] - line["random/low"]) / 2


def _draw(lines: list[Row]) -> Figure:
    """A panel per ranking metric, a line of points per case: figures over chance's, whose interval is the bar."""
    panels: dict[str, list[Row]] = {}
    for line in lines:
        panels.setdefault(line["ranking"], []).append(line)
    tallest = max(map(len, panels.values()))
    figure = Figure(figsize=(3 + 2.2 * len(panels), 0.25 * tallest + 1.3), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (name, members) in zip(axes, panels.items(), strict=True):
        places = list(range(len(members)))
        half = [_half(line) / line["random"] for line in members]
        axis.errorbar([1.0] * len(members), places, xerr=half, fmt="none", ecolor="grey", capsize=2, label="chance")
        for marker, model in zip("ox", _MODELS, strict=True):
            values = [line[model] / line["random"] for line in members]
            axis.plot(values, places, marker, label=model, markersize=5, markerfacecolor="none")
        axis.set(title=name.upper(), xlabel="figure / chance")
        axis.set_yticks(places, [", ".join(line[name] for name in _CASE) for line in members])
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure
