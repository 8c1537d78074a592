"""How models stand to each other on the stream by how its items open and by its concentration, beside the paper."""

import statistics
from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tabulate import tabulate as render

from steps.studies.rows import FAILED, ORIGIN, Row, cases
from steps.studies.stream_ceiling import KNOWN, TOLD

LABELS = {"sasrec": "Transformer", "hstu-softmax": "HSTU with softmax", "hstu-no-bias": "HSTU without bias"}
LABELS |= {"hstu-position": "HSTU with bias of position"}
#: What the paper says: of each pair the first is above the second.
CLAIMS = {
    "pointwise attention is above softmax attention": ("hstu-no-bias", "hstu-softmax"),
    "softmax attention is above the Transformer": ("hstu-softmax", "sasrec"),
    "HSTU without bias is above the Transformer": ("hstu-no-bias", "sasrec"),
}
HOLDS, REVERSED, UNDECIDED = "holds", "is the other way round", "is not decided"
_CASE = ("opened", "least_a", "most_a")
_Case = tuple[int, int, int]


class Panel:
    """What was measured on a device. values: by case and model, then metric, the value of each seed; failed: lines of
    the seeds that did."""

    def __init__(self, lines: list[Row], metrics: list[str]) -> None:
        self.lines, self.metrics, self.device = lines, metrics, lines[0]["device"]
        self.failed = [line for line in lines if FAILED in line]
        self.values: dict[tuple[_Case, str], dict[str, list[float]]] = {}
        for line in lines:
            of_model = self.values.setdefault((_case(line), line["model"]), {})
            for metric in metrics if FAILED not in line else []:
                of_model.setdefault(metric, []).append(line[metric])
        self.cases = sorted({case for case, _ in self.values}, key=lambda case: (case[0], case[1] + case[2], case))
        self.models = [name for name in LABELS if any(name == model for _, model in self.values)]

    def of(self, case: _Case, model: str, metric: str) -> list[float]:
        """The metric of each seed that did not fail."""
        return self.values.get((case, model), {}).get(metric, [])

    def ratio(self, case: _Case, models: tuple[str, str], metric: str) -> float | None:
        """The first model's mean over the second's; None where there is none."""
        above, below = (self.of(case, model, metric) for model in models)
        return statistics.fmean(above) / statistics.fmean(below) if above and below and any(below) else None

    def verdict(self, case: _Case, models: tuple[str, str], metric: str) -> str:
        """HOLDS: each seed of the first model is above all of the second's; REVERSED: below; else UNDECIDED, as where a
        seed failed."""
        above, below = (self.of(case, model, metric) for model in models)
        if not above or not below or any(_case(line) == case and line["model"] in models for line in self.failed):
            return UNDECIDED
        return HOLDS if min(above) > max(below) else REVERSED if max(above) < min(below) else UNDECIDED

    def axes(self) -> dict[str, list[_Case]]:
        """The cases that one setting alone tells apart, rising, by its name, where there are two or more."""
        by_range: dict[Any, list[_Case]] = {}
        by_opened: dict[Any, list[_Case]] = {}
        for case in self.cases:
            by_range.setdefault(case[1:], []).append(case)
            by_opened.setdefault(case[0], []).append(case)
        found = {"opened": max(by_range.values(), key=len), "a": max(by_opened.values(), key=len)}
        return {name: members for name, members in found.items() if len(members) > 1}


def report(rows: list[Row], study: dict[str, Any]) -> tuple[str, Figure, list[Row]]:
    """Markdown, the figure, and a line per case and model, and per claim and metric."""
    metrics = study["measure"]["settings"]["metrics"]
    published = study.get("published", {"sources": {}, "rows": []})
    of_device: dict[str, list[Row]] = {}
    for line in cases(rows):
        of_device.setdefault(line["device"], []).append(line)
    panels = [Panel(members, metrics) for members in of_device.values()]
    sources = "; ".join(f"{name}: {text}" for name, text in published["sources"].items())
    parts = [
        f"# {study['title']}",
        "Opened: the percent of the items that open after the first record. a: the concentration of a record, which is "
        f"drawn from the range that is given. Each stream has {study['measure']['settings']['records']:,} records. "
        "Metrics are of test: means over seeds, and the lowest and the highest seed. The Transformer is SASRec's. "
        f"Beside them is what a predictor expects that {KNOWN}: every category, and each record's chances. No model "
        f"can expect more. One that {TOLD} as well expects the other.",
        f"A claim {HOLDS} in a case if all seeds of the one model are above all of the other, {REVERSED} if all are "
        f"below, else it {UNDECIDED}. Ratios are of means. {sources}. Hashes of the data are in table.csv.",
    ]
    table: list[Row] = []
    for panel in panels:
        commits = ", ".join(dict.fromkeys(line["commit"][:9] for line in panel.lines))
        parts += [f"## {panel.device}", f"Commit {commits}.", sentences(panel, published["rows"])]
        for metric in metrics:
            parts += [f"### {metric.upper()}", values_table(panel, metric)]
        parts += ["### Verdicts", verdicts_table(panel)]
        table += lines_of(panel)
    return "\n\n".join([*parts, "![Quality by case](figure.svg)"]) + "\n", _draw(panels[0]), table


def sentences(panel: Panel, published: list[dict[str, Any]]) -> str:
    """In how many cases each claim holds, with the ratios beside the paper's; what moves with each setting; what
    failed."""
    found = []
    for claim, models in CLAIMS.items():
        for metric in panel.metrics:
            said = [panel.verdict(case, models, metric) for case in panel.cases]
            ratios = [ratio for case in panel.cases if (ratio := panel.ratio(case, models, metric)) is not None]
            if not ratios:
                continue
            theirs = _published_ratio(published, models, metric)
            counts = ", ".join(f"{word} in {said.count(word)}" for word in (HOLDS, REVERSED, UNDECIDED))
            beside = "" if theirs is None else f", in the paper {theirs:.2f}"
            found.append(
                f"{metric.upper()}, {claim}: of {len(said)} cases it {counts}; ratio {min(ratios):.2f} to "
                f"{max(ratios):.2f}{beside}"
            )
    found += [moves(panel, axis) for axis in panel.axes()]
    found += [
        f"{_words(_case(line))}, {LABELS[line['model']]}, seed {line['repetition']}: {line[f'{FAILED}/seen']}"
        for line in panel.failed
    ]
    return "\n".join(f"- {sentence}" for sentence in found)


def moves(panel: Panel, axis: str) -> str:
    """How each model's first metric, and its share of what no model can expect more than, goes from an axis's first
    case to its last."""
    metric, ends = panel.metrics[0], [panel.axes()[axis][index] for index in (0, -1)]
    shown = []
    for model in panel.models:
        values = [panel.of(case, model, metric) for case in ends]
        shares = [panel.ratio(case, (model, KNOWN), metric) for case in ends]
        if all(values) and None not in shares:
            first, last = map(statistics.fmean, values)
            shown.append(f"{LABELS[model]} {first:.4f} to {last:.4f} ({shares[0]:.0%} to {shares[1]:.0%} of the most)")
    return f"{metric.upper()} from {_words(ends[0])} to {_words(ends[1])}: {', '.join(shown)}"


def values_table(panel: Panel, metric: str) -> str:
    """A line per case: each model's mean with the lowest and highest seed, the two predictors, and ratios."""
    table = [
        [
            _words(case),
            *(_cell(panel.of(case, model, metric)) for model in [*panel.models, KNOWN, TOLD]),
            *(_ratio(panel.ratio(case, models, metric)) for models in CLAIMS.values()),
        ]
        for case in panel.cases
    ]
    ratios = [f"{LABELS[above]} / {LABELS[below]}" for above, below in CLAIMS.values()]
    headers = ["case", *(LABELS[model] for model in panel.models), KNOWN, TOLD, *ratios]
    return render(table, headers, tablefmt="github", disable_numparse=True)


def verdicts_table(panel: Panel) -> str:
    """A line per case and claim: the verdict by each metric."""
    table = [
        [_words(case), claim, *(panel.verdict(case, models, metric) for metric in panel.metrics)]
        for case in panel.cases
        for claim, models in CLAIMS.items()
    ]
    headers = ["case", "claim", *(metric.upper() for metric in panel.metrics)]
    return render(table, headers, tablefmt="github", disable_numparse=True)


def lines_of(panel: Panel) -> list[Row]:
    """Lines of table.csv: a model in a case, and a claim by a metric."""
    found: list[Row] = []
    origins = {(_case(line), line["model"]): {key: line[key] for key in ORIGIN if key in line} for line in panel.lines}
    for (case, model), of_metric in panel.values.items():
        line: Row = {"part": "model", **dict(zip(_CASE, case, strict=True)), "model": model}
        for metric, values in of_metric.items():
            ends = {f"{metric}/low": min(values), metric: statistics.fmean(values), f"{metric}/high": max(values)}
            line |= {name: round(value, 6) for name, value in ends.items()} | {"seeds": len(values)}
        found.append(line | origins[case, model])
    commit = "+".join(dict.fromkeys(line["commit"] for line in panel.lines))
    for claim, models in CLAIMS.items():
        for metric in panel.metrics:
            said = [panel.verdict(case, models, metric) for case in panel.cases]
            counts: Row = {HOLDS: said.count(HOLDS), REVERSED: said.count(REVERSED), UNDECIDED: said.count(UNDECIDED)}
            line = {"part": "claim", "claim": claim, "metric": metric, **counts}
            found.append(line | {"device": panel.device, "commit": commit})
    return found


def _case(line: Row) -> _Case:
    return line["opened"], line["least_a"], line["most_a"]


def _words(case: _Case) -> str:
    opened, least, most = case
    return f"opened {opened} %, a {_range(least, most)}"


def _range(least: int, most: int) -> str:
    return f"{least}" if least == most else f"{least} to {most}"


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" [{min(values):.4f}, {max(values):.4f}]" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{spread}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _published_ratio(published: list[dict[str, Any]], models: tuple[str, str], metric: str) -> float | None:
    theirs = [line[metric] for model in models for line in published if line.get("model") == model and metric in line]
    return theirs[0] / theirs[1] if len(theirs) == len(models) else None


def _draw(panel: Panel) -> Figure:
    """A row per metric, a column per setting: each model's mean between its lowest and highest seed, and the most that
    any can expect."""
    labels: dict[str, Callable[[_Case], str]] = {
        "opened": lambda case: f"{case[0]} %",
        "a": lambda case: _range(*case[1:]),
    }
    columns = panel.axes() or {"opened": panel.cases}
    figure = Figure(figsize=(1.2 + 4.0 * len(columns), 2.6 * len(panel.metrics)), layout="constrained")
    axes = figure.subplots(len(panel.metrics), len(columns), squeeze=False)
    for of_metric, metric in zip(axes, panel.metrics, strict=True):
        for axis, (name, members) in zip(of_metric, columns.items(), strict=True):
            _draw_models(axis, panel, members, metric)
            axis.set_xticks(range(len(members)), [labels[name](case) for case in members])
            axis.set(xlabel=name, ylabel=f"{metric.upper()}, test")
    named = axes[0, 0].get_legend_handles_labels()
    figure.legend(*named, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def _draw_models(axis: Axes, panel: Panel, members: list[_Case], metric: str) -> None:
    for number, model in enumerate(panel.models):
        places = [place for place, case in enumerate(members) if panel.of(case, model, metric)]
        values = [panel.of(members[place], model, metric) for place in places]
        mean = [statistics.fmean(one) for one in values]
        error = [
            [middle - min(one) for middle, one in zip(mean, values, strict=True)],
            [max(one) - middle for middle, one in zip(mean, values, strict=True)],
        ]
        axis.errorbar(
            places, mean, yerr=error, fmt="o-", markersize=4, linewidth=1, color=f"C{number}", label=LABELS[model]
        )
    most = [statistics.fmean(panel.of(case, KNOWN, metric) or [float("nan")]) for case in members]
    axis.plot(range(len(members)), most, "--", color="grey", linewidth=1, label=KNOWN)
