"""How good models are that were trained on parts of long sequences or attend to parts of them, and what they took."""

import math
import statistics
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter
from tabulate import tabulate as render

from steps.common.paired import student
from steps.studies.long_sequences import FULL, LONG, SEMI_LOCAL, STOCHASTIC
from steps.studies.rows import Row, cases

BETTER, WORSE, EQUAL = "better", "worse", "no different"
_MARKERS = "os^Dv"


class Variant:
    """What was measured of a variant on one data set and device.

    axes: its name and parameters. cost: what an epoch took. runs: by seed, the metrics of the trained run.
    """

    def __init__(self, lines: list[Row]) -> None:
        self.axes = lines[0]
        self.name: str = self.axes["variant"]
        self.kind: str = self.axes["kind"]
        self.cost: Row = next((line for line in lines if "seed" not in line), {})
        self.runs: dict[int, Row] = {line["seed"]: line for line in lines if "seed" in line}

    def values(self, metric: str) -> list[float]:
        """The metric by seed; none where it was not measured."""
        return [run[metric] for run in self.runs.values() if metric in run]

    def size(self) -> tuple[int, int]:
        """Window and first tokens of semi-local attention; 0 and 0 of the others."""
        return self.axes.get("max_attn_len", 0), self.axes.get("num_sink_tokens", 0)


class Comparison:
    """A variant's metric beside another's, paired by seed: the mean difference, half its interval, and a verdict.

    The interval is Student's. A variant is better or worse where it is without zero; from one seed nothing follows.
    """

    def __init__(self, variant: Variant, other: Variant, metric: str, confidence: float) -> None:
        seeds = [seed for seed in variant.runs if metric in variant.runs[seed] and metric in other.runs.get(seed, {})]
        differences = [variant.runs[seed][metric] - other.runs[seed][metric] for seed in seeds]
        self.count = len(differences)
        self.mean, self.half = student(differences, confidence)
        self.verdict = EQUAL if abs(self.mean) <= self.half else BETTER if self.mean > 0 else WORSE


def report(rows: list[Row], study: dict[str, Any]) -> tuple[str, Figure, list[Row]]:
    """Markdown, the figure, and a line per case."""
    lines, settings = cases(rows), study["measure"]["settings"]
    protocols = ", ".join(dict.fromkeys(runs["protocol"] for runs in study["measure"]["runs"]))
    seeds = ", ".join(map(str, dict.fromkeys(line["seed"] for line in lines if "seed" in line)))
    commits = ", ".join(dict.fromkeys(line["commit"][:9] for line in lines))
    digests = ", ".join(dict.fromkeys(line["data_sha256"] for line in lines if "data_sha256" in line))
    parts = [
        f"# {study['title']}",
        "HSTU with full attention, with Stochastic Length, and with semi-local attention. Test metrics under protocol "
        f"{protocols}; long histories have more than {settings['longer_than']} tokens. Seeds {seeds}: means ± standard "
        f"deviations. Differences to full attention are paired by seed, ± half of their {settings['confidence']:g} % "
        "interval (Student's t). Better and worse: the interval is without zero; no different: it is not. Intervals "
        "are of single comparisons, of which there are many here, and of seeds, not of users.",
        f"Times are of an epoch without evaluation, alone on the device, the median of {settings['timed']}; memory is "
        "the most of a first epoch. Pairs: of a query and a key that it sees, of one layer. Commits "
        f"{commits}. Hashes of the data: {digests}.",
    ]
    panels = panels_of(lines)
    for (device, data), found in panels.items():
        parts += [f"## {data}, {device}", _about(found)]
        parts.append("\n".join(f"- {sentence}" for sentence in sentences(found, settings)))
        for name in settings["metrics"]:
            parts += [f"### {_title(name)}", quality_table(found, name, settings["confidence"])]
        if grid := grid_table(found, settings["metrics"][0]):
            parts += [f"### {_title(settings['metrics'][0])} by window and first tokens", grid]
        parts += ["### Training", cost_table(found)]
    parts.append("![Quality by pairs](figure.svg)")
    return "\n\n".join(parts) + "\n", _draw(panels, settings), lines


def panels_of(lines: list[Row]) -> dict[tuple[str, str], list[Variant]]:
    """The variants of each device and data set, full attention first, windows by their size."""
    found: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for line in lines:
        found.setdefault((line["device"], line["data"]), {}).setdefault(line["variant"], []).append(line)
    kinds = (FULL, STOCHASTIC, SEMI_LOCAL)

    def place(variant: Variant) -> tuple[int, float, int]:
        window, first = variant.size()
        return kinds.index(variant.kind), float(variant.axes.get("alpha", window)), first

    return {panel: sorted(map(Variant, members.values()), key=place) for panel, members in found.items()}


def sentences(found: list[Variant], settings: dict[str, Any]) -> list[str]:
    """What the seeds say, in words: every kind beside full attention, the rules of Stochastic Length beside the first,
    first tokens beside longer windows, and the shortest epoch of those that are no worse."""
    first = settings["metrics"][0]
    full = next((variant for variant in found if variant.kind == FULL), None)
    of_kind = {kind: [(one, full) for one in found if one.kind == kind] for kind in (STOCHASTIC, SEMI_LOCAL) if full}
    said = []
    for metric in (first, first + LONG):
        questions = [(f"{kind}, beside full attention, is", pairs) for kind, pairs in of_kind.items()]
        questions.append(("Stochastic Length by one rule, and by another: it is", other_rules(found)))
        questions.append(
            ("First tokens beside a window, and a longer window of as many keys: they are", budgets(found))
        )
        for words, pairs in questions:
            judged: dict[str, list[str]] = {verdict: [] for verdict in (BETTER, WORSE, EQUAL)}
            for one, other in pairs:
                if one.values(metric) and other.values(metric):
                    name = one.name if other is full else f"{one.name} than {other.name}"
                    judged[Comparison(one, other, metric, settings["confidence"]).verdict].append(name)
            if any(judged.values()):
                listed = "; ".join(f"{verdict}: {', '.join(names)}" for verdict, names in judged.items() if names)
                said.append(f"{_title(metric)}. {words[0].upper()}{words[1:]} {listed}.")
    if full is not None and full.cost:
        times = {one.name: one.cost["epoch, alone"] for one in found if one.cost and no_worse(one, full, settings)}
        best = min(times, key=lambda name: float(times[name]))
        said.append(
            f"Of those that are worse by no metric, {best} has the shortest epoch: "
            f"{times[best] / full.cost['epoch, alone']:.0%} of full attention's."
        )
    return said


def no_worse(variant: Variant, full: Variant, settings: dict[str, Any]) -> bool:
    """Whether the variant is worse than full attention by none of the metrics."""
    names = [name + part for name in settings["metrics"] for part in ("", LONG)]
    return all(Comparison(variant, full, name, settings["confidence"]).verdict != WORSE for name in names)


def other_rules(found: list[Variant]) -> list[tuple[Variant, Variant]]:
    """Stochastic Length by every rule but the first, with the same alpha by the first."""
    by_alpha: dict[float, list[Variant]] = {}
    for variant in found:
        if variant.kind == STOCHASTIC:
            by_alpha.setdefault(variant.axes["alpha"], []).append(variant)
    return [(other, first) for first, *others in by_alpha.values() for other in others]


def budgets(found: list[Variant]) -> list[tuple[Variant, Variant]]:
    """Windows with first tokens, each with the window alone that sees as many keys, where there is one."""
    windows = {variant.size(): variant for variant in found if variant.kind == SEMI_LOCAL}
    return [
        (variant, windows[window + first, 0])
        for (window, first), variant in windows.items()
        if first and (window + first, 0) in windows
    ]


def quality_table(found: list[Variant], metric: str, confidence: float) -> str:
    """A line a variant: the metric and its difference to full attention, of all users and of long histories."""
    full = next((variant for variant in found if variant.kind == FULL), None)
    names = [name for name in (metric, metric + LONG) if any(variant.values(name) for variant in found)]
    table = []
    for variant in found:
        cells = [variant.name]
        for name in names:
            cells += [_mean(variant.values(name)), "", ""]
            if full is not None and variant is not full and full.values(name):
                difference = Comparison(variant, full, name, confidence)
                half = f" ± {difference.half:.4f}" if math.isfinite(difference.half) else ""
                cells[-2:] = [f"{difference.mean:+.4f}{half}", difference.verdict]
        table.append(cells)
    headers = [cell for name in names for cell in ("long histories" if LONG in name else "all users", "difference", "")]
    return render(table, ["trained with", *headers], tablefmt="github", disable_numparse=True)


def grid_table(found: list[Variant], metric: str) -> str:
    """Windows down, first tokens across: the metric of all users, and of long histories; empty where semi-local
    attention was not measured."""
    windows = {variant.size(): variant for variant in found if variant.kind == SEMI_LOCAL}
    firsts = sorted({first for _, first in windows})

    def cell(window: int, first: int) -> str:
        variant = windows.get((window, first))
        return "" if variant is None else "; ".join(_mean(variant.values(name)) for name in (metric, metric + LONG))

    lengths = sorted({window for window, _ in windows})
    table = [[f"{window:,}", *(cell(window, first) for first in firsts)] for window in lengths]
    headers = ["window", *(f"first {first:,}: all users; long" for first in firsts)]
    return render(table, headers, tablefmt="github", disable_numparse=True) if windows else ""


def cost_table(found: list[Variant]) -> str:
    """A line a variant: an epoch's time, tokens and pairs, also as shares of full attention's; memory, where it was
    measured; and of the runs the chosen epochs, and how long the longest trained beside how many."""
    full = next((variant.cost for variant in found if variant.kind == FULL), {})
    memory = any("peak" in variant.cost for variant in found)
    table = []
    for variant in found:
        cost, runs = variant.cost, variant.runs.values()
        ms, kept, pairs = (
            f"{cost[name] / full[name]:.1%}" if name in cost and name in full else ""
            for name in ("epoch, alone", "tokens", "pairs")
        )
        cells = [""] * 3
        if cost:
            padding = cost["tokens and padding"] / cost["tokens"] - 1
            cells = [f"{1000 * cost['epoch, alone']:.1f}", f"{cost['tokens']:,}", f"{padding:.1%}"]
        table.append(
            [
                *(variant.name, cells[0], ms, *cells[1:], kept, pairs),
                *([f"{cost['peak'] / 2**20:,.0f}" if "peak" in cost else ""] if memory else []),
                ", ".join(str(run["chosen epoch"]) for run in runs),
                f"{max(run['training'] for run in runs):.1f}",
                ", ".join(dict.fromkeys(str(run["trained at once"]) for run in runs)),
            ]
        )
    headers = ["trained with", "epoch, ms", "of full", "tokens", "padding", "tokens kept", "pairs kept"]
    headers += [*(["peak MiB"] if memory else []), "chosen epochs", "longest run, s", "runs at once"]
    return render(table, headers, tablefmt="github", disable_numparse=True)


def _about(found: list[Variant]) -> str:
    run = next(run for variant in found for run in variant.runs.values())
    return f"{run['users']:,} users are tested, of whom {run['users' + LONG]:,} have long histories."


def _title(metric: str) -> str:
    name, comma, part = metric.partition(",")
    return name.upper() + comma + part


def _mean(values: list[float]) -> str:
    if not values:
        return ""
    return f"{statistics.fmean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def _draw(panels: dict[tuple[str, str], list[Variant]], settings: dict[str, Any]) -> Figure:
    """A panel per data set and device: the first metric of long histories by the share of pairs. Lines join the windows
    of one number of first tokens, and the alphas of one rule."""
    figure = Figure(figsize=(1.2 + 3.9 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, ((device, data), found) in zip(axes, panels.items(), strict=True):
        metric = settings["metrics"][0]
        metric += LONG if any(variant.values(metric + LONG) for variant in found) else ""
        full = next((variant for variant in found if variant.kind == FULL and variant.cost), None)
        whole = full.cost["pairs"] if full else 1
        series: dict[str, list[Variant]] = {}
        for variant in found:
            if variant.cost and variant.values(metric):
                series.setdefault(_series(variant), []).append(variant)
        for number, (name, members) in enumerate(series.items()):
            means = [statistics.fmean(member.values(metric)) for member in members]
            spreads = [statistics.stdev(of) if len(of) > 1 else 0.0 for of in (one.values(metric) for one in members)]
            shares = [member.cost["pairs"] / whole for member in members]
            style = {"marker": _MARKERS[number % len(_MARKERS)], "color": f"C{(7 - number) % 8}", "capsize": 2}
            axis.errorbar(shares, means, yerr=spreads, label=name, markersize=5, linewidth=1, **style)
            if name == FULL:
                axis.axhline(means[0], color="grey", linewidth=0.8, linestyle=":")
        axis.set(xscale="log", xlabel="pairs / full attention's", ylabel=_title(metric), title=f"{data}, {device}")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.xaxis.set_minor_formatter(NullFormatter())
    handles = {name: handle for axis in axes for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def _series(variant: Variant) -> str:
    if variant.kind == STOCHASTIC:
        return f"{STOCHASTIC}, {variant.axes['rule']}"
    if variant.kind == SEMI_LOCAL:
        first = variant.size()[1]
        return f"window + first {first}" if first else "window"
    return FULL
