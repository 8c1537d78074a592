"""Quality by training compute: every size, the laws of the best ones, what they predict, and who gains from compute."""

import itertools
import statistics
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tabulate import tabulate as render

from steps.common.cli import StepError
from steps.studies.rows import FAILED, Row, cases
from steps.studies.scaling_law import BEST, BUDGET, COVERAGE, LOSS, POPULARITY, POWER, budgets, case_of
from steps.studies.scaling_law_fits import LAWS, LOGARITHM, SATURATING, Array, band, fit, frontier, growth, judge
from steps.studies.stream_ceiling import KNOWN

LABELS = {"hstu": "HSTU", "sasrec": "SASRec", "transformer++": "Transformer++"}
#: What the verdict is about.
SCALES = "scales where others stop"
_OURS = "hstu"
_SEED, _DRAWN, _PLACES = 0, 16, 9  # of the bootstrap; places of a law's line; digits behind the point
#: The axes by which an error names rows.
_NAMED = ("data", "part", "model", "dim", "blocks", "max_len")
_WORDS = {1: "holds", 0: "not decided", -1: "does not hold"}


class Panel:
    """A data set and device. points: by encoder and metric, then size, seed and budget; means: by encoder, size and
    budget the lines of all seeds; frontiers: by encoder and fitted metric; bounds: by metric what the best predictor
    expects; trial: the lines of the trial of learning rates."""

    def __init__(self, lines: list[Row], settings: dict[str, Any]) -> None:
        self.lines, self.settings, self.data, self.device = lines, settings, lines[0]["data"], lines[0]["device"]
        self.points: dict[tuple[str, str], dict[str, dict[int, dict[float, float]]]] = {}
        self.means: dict[tuple[str, str, float], list[Row]] = {}
        self.bounds: dict[str, float] = {}
        self.trial = [line for line in lines if POWER in line and LOSS in line]
        for line in (line for line in lines if POWER not in line):
            if BUDGET not in line:
                self.bounds |= {metric: line[metric] for metric in settings["metrics"] if metric in line}
                continue
            size, budget = size_of(line), line[BUDGET]
            if "repetition" not in line:
                self.means.setdefault((line["encoder"], size, budget), []).append(line)
            for metric in settings["metrics"] if "repetition" in line and FAILED not in line else []:
                of_size = self.points.setdefault((line["encoder"], metric), {}).setdefault(size, {})
                of_size.setdefault(line["repetition"], {})[budget] = line[metric]
        self.encoders = [one for one in LABELS if any(one == encoder for encoder, _ in self.points)]
        given, random = settings["exponents"], np.random.default_rng(_SEED)
        self.exponents: Array = np.geomspace(given["least"], given["most"], given["count"])
        self.frontiers = {
            (encoder, metric): frontier(
                self.points[encoder, metric], settings["draws"], random, metric != LOSS, settings["confidence"]
            )
            for metric in settings["fitted"]
            for encoder in self.encoders
        }

    def values(self, encoder: str, metric: str, size: str, budget: float) -> list[float]:
        """The metric of each seed."""
        return [run[budget] for run in self.points[encoder, metric][size].values() if budget in run]

    def band(self, values: Array) -> tuple[float, float, float]:
        """The value of the data, and the ends of its band."""
        return band(values, self.settings["confidence"])


def size_of(line: Row) -> str:
    """A size in words: width, depth, and the longest window."""
    return f"{line['dim']}x{line['blocks']}, {line['max_len']}"


def report(rows: list[Row], study: dict[str, Any]) -> tuple[str, Figure, list[Row]]:
    """Markdown, the figure, and a line per law, and of the verdict. StepError where rows are of no planned run."""
    lines, given = cases(rows), study["measure"]["settings"]
    require_planned(lines, study["measure"])
    commits = ", ".join(dict.fromkeys(line["commit"][:9] for line in lines))
    digests = ", ".join(dict.fromkeys(line["data_sha256"] for line in lines if "data_sha256" in line))
    rule, confidence = given["lr"], f"{given['confidence']:g} %"
    powers = ", ".join(f"{LABELS[encoder]} {power:g}" for encoder, power in rule["power"].items())
    parts = [
        f"# {study['title']}",
        "lg C: the logarithm to base ten of a training's FLOPs, forward and backward, of layers and loss, without "
        "lookups. A size is width x depth, and the longest window. Of test: means ± standard deviations over seeds. "
        "Coverage: the share of the candidates that is recommended to anyone; popularity: the mean percentile by "
        "popularity of what is recommended; loss: of the target among all items. Learning rate "
        f"{rule['base']:g} x ({rule['dim']} / d) ^ p, p: {powers}, the better of each in a trial. Lines of a size are "
        "of the same runs.",
        "For each budget the run counts that is best by the metric in question, of this budget or a smaller one, as a "
        f"budget need not be used up. Bands are of {confidence}: a bootstrap draws each size's seeds, whole runs; "
        "which size and budget count is not drawn; deviations are widened by Student's t, as few seeds need. "
        f"Commits {commits}. Hashes of the data: {digests}.",
        "\n".join(f"- {law}: {source}" for law, source in study.get("published", {}).get("sources", {}).items()),
        f"The verdict, of {_title(given['fitted'][0])}: {SCALES}. Of the last {given['decades']} decades of compute "
        "that HSTU and another encoder both have, the gain by a decade, as a share of the mean, has a band above "
        f"{given['least']:g} for HSTU and below it for every other; it does not hold where another's is above it, "
        "too, or HSTU's below; else it is not decided. Nor is it where HSTU, from the first of these budgets, would "
        f"gain less by becoming the best predictor. Held-out budgets: the {given['held_out']} largest, which laws "
        "predict from the others.",
    ]
    parts.append(not_measured(lines, study["measure"]))
    found: dict[tuple[str, str], list[Row]] = {}
    for line in lines:
        found.setdefault((line["device"], line["data"]), []).append(line)
    panels = [panel for panel in (Panel(members, given) for members in found.values()) if panel.points]
    if not panels:
        raise StepError("no run of the rows was tested; measure the study again")
    table: list[Row] = []
    for panel in panels:
        laws, verdict = laws_of(panel), scales(panel)
        parts += [f"## {panel.data}, {panel.device}", sentences(panel, verdict), "### Laws", laws_table(laws)]
        parts += ["### Every size", sizes_table(panel)]
        parts += ["### The trial of learning rates", trial_table(panel)] if panel.trial else []
        origin = {"data": panel.data, "device": panel.device}
        origin["commit"] = "+".join(dict.fromkeys(line["commit"] for line in panel.lines))
        table += [line | origin for line in [*laws, *([verdict] if verdict else [])]]
    parts += [
        "Dots: every size; larger ones: the best. Lines: the logarithm, with its band; dashed: the saturating law; of "
        "coverage: through the best by the first metric; dotted: what the best predictor expects.",
        "![Quality by compute](figure.svg)",
    ]
    return "\n\n".join(filter(None, parts)) + "\n", _draw(panels), table


def not_measured(lines: list[Row], plan: dict[str, Any]) -> str:
    """A sentence of the cases of a plan that no device has measured, and of those that one has and another lacks; empty
    where there are none."""
    of_devices: dict[str, list[Row]] = {}
    for line in lines:
        of_devices.setdefault(line["device"], []).append(line)
    everywhere = unmeasured(lines, plan)
    said = [", ".join(everywhere)] if everywhere else []
    for device, members in of_devices.items():
        if rest := [case for case in unmeasured(members, plan) if case not in everywhere]:
            said.append(f"on {device} {', '.join(rest)}")
    return f"Not measured yet: {'; '.join(said)}." if said else ""


def unmeasured(lines: list[Row], plan: dict[str, Any]) -> list[str]:
    """The cases of a plan, each as its data and part, that no line is of, in the order of the plan."""
    wanted = [{key: axes[key] for key in ("data", "part")} for axes, _ in planned(plan)]
    wanted += [{"data": data, "part": BEST} for data in plan["generated"]]
    return [
        " ".join(case.values())
        for index, case in enumerate(wanted)
        if case not in wanted[:index] and not any(case.items() <= line.items() for line in lines)
    ]


def planned(plan: dict[str, Any]) -> list[tuple[Row, list[float]]]:
    """By run of a plan axes that its rows have, the longest window only where the study sets it, and its budgets."""
    found = []
    for group in plan["runs"]:
        runs, size = group["with"], {"dim": group["set"]["model.dim"], "blocks": group["set"]["model.blocks"]}
        for model, seed in itertools.product(group["models"], group["seeds"]):
            config = {"dataset": group["dataset"], "row": model, "seed": seed, "model": size}
            axes = case_of(config, runs) | {"model": model, **size, "repetition": seed}
            axes |= {"max_len": group["set"]["training.max_len"]} if "training.max_len" in group["set"] else {}
            axes |= {POWER: runs[POWER]} if POWER in runs else {}
            found.append((axes, budgets(runs, plan["settings"]["a_decade"])))
    return found


def require_planned(lines: list[Row], plan: dict[str, Any]) -> None:
    """Raise StepError where a line is of no run or budget of the plan, as it was measured with another plan, or lacks a
    metric that the report shows. What a line does not say, as its learning rate, is not looked at."""
    runs = planned(plan)
    for line in lines:
        words = ", ".join(f"{key} {line[key]}" for key in (*_NAMED, BUDGET, POWER, "repetition") if key in line)
        if BUDGET not in line:
            fits = line["part"] == BEST and line["data"] in plan["generated"]
        else:
            fits = any(
                line[BUDGET] in ends
                and line.get(POWER) == axes.get(POWER)
                and all(line.get(key) == value for key, value in axes.items() if key in line or key != "repetition")
                for axes, ends in runs
            )
        if not fits:
            raise StepError(
                f"rows of {line['device']}, {words}: the study plans no such run now, as its settings are not those "
                "of the measurement; take these rows out of rows.json, or restore the settings"
            )
        tested = "repetition" in line and FAILED not in line
        asked = ([LOSS] if POWER in line else plan["settings"]["metrics"]) if tested else []
        if missing := [metric for metric in asked if metric not in line]:
            raise StepError(f"rows of {line['device']}, {words}: they have no {missing[0]}; measure the case again")


def laws_of(panel: Panel) -> list[Row]:
    """A line per metric, encoder and law: exponent and error of the held-out prediction, each with its band."""
    found = []
    for (encoder, metric), of in panel.frontiers.items():
        for law in LAWS:
            line: Row = {"part": "law", "encoder": encoder, "metric": metric, "law": law}
            judged = judge(law, of, panel.settings["held_out"], panel.exponents, metric != LOSS)
            for name, values in zip(("exponent", "error"), judged, strict=True):
                if values is not None:
                    ends = zip((name, f"{name}/low", f"{name}/high"), panel.band(values), strict=True)
                    # What is 0 but for rounding differs by machine. And no -0.
                    line |= {key: float(f"{round(value, _PLACES):.6g}") + 0.0 for key, value in ends if value == value}
            found.append(line)
    return found


def scales(panel: Panel) -> Row | None:
    """The verdict SCALES, by the rule of the report: 1, 0 or -1, the least of all other encoders. None: there is
    nothing to compare."""
    metric, least, signs, said = panel.settings["fitted"][0], panel.settings["least"], [], []
    ours = panel.frontiers.get((_OURS, metric))
    for encoder in panel.encoders:
        other = panel.frontiers[encoder, metric]
        shared = sorted(set(ours.budgets) & set(other.budgets)) if ours else []
        last = [budget for budget in shared if budget >= shared[-1] - panel.settings["decades"]]
        if encoder == _OURS or not ours or len(last) <= LAWS[LOGARITHM]:
            continue
        gains = [growth(one, last) for one in (ours, other)]
        count = min(map(len, gains))
        bands = [panel.band(values) for values in (*gains, gains[0][:count] - gains[1][:count])]
        (_, low, high), (_, other_low, other_high), _ = bands
        sign = -1 if other_low > least or high < least else 1 if low > least > other_high else 0
        named = zip((LABELS[_OURS], LABELS[encoder], "difference"), bands, strict=True)
        # z: no -0
        words = ", ".join(f"{name} {one[0]:+z.2%} [{one[1]:+z.2%}, {one[2]:+z.2%}]" for name, one in named)
        if metric in panel.bounds:
            of_data = ours.values[[ours.budgets.index(budget) for budget in last], 0]
            room = (panel.bounds[metric] - of_data[0]) / (last[-1] - last[0]) / of_data.mean()
            sign = 0 if room < least else sign
            words += f", to the best predictor {room:+z.2%}"
        signs.append(sign)
        said.append(f"lg C {last[0]:g} to {last[-1]:g}: {words}")
    return {"part": "verdict", "claim": SCALES, "holds": min(signs), "words": "; ".join(said)} if signs else None


def sentences(panel: Panel, verdict: Row | None) -> str:
    """The verdict; by encoder how much of the catalogue the best sizes recommend at the least and most compute, and
    which law predicts better, in how many draws; what failed."""
    found = [f"{SCALES}: {_WORDS[verdict['holds']]} ({verdict['words']})"] if verdict else []
    for encoder in panel.encoders:
        of = panel.frontiers[encoder, panel.settings["fitted"][0]]
        shown = [f"{LABELS[encoder]} from lg C {of.budgets[0]:g} to {of.budgets[-1]:g}"]
        for metric in (COVERAGE, POPULARITY):
            ends = [panel.values(encoder, metric, *of.best[at]) for at in (0, -1)]
            shown.append(f"{metric} {statistics.fmean(ends[0]):.3f} to {statistics.fmean(ends[1]):.3f}")
        held_out, laws = panel.settings["held_out"], (LOGARITHM, SATURATING)
        first, second = (judge(law, of, held_out, panel.exponents)[1] for law in laws)
        if first is not None and second is not None:
            less = (first[1:] < second[1:]).mean()
            shown.append(f"the logarithm predicts better than the saturating law in {less:.1%} of draws")
        found.append(", ".join(shown))
    if panel.bounds:
        values = ", ".join(f"{_title(metric)} {value:.4f}" for metric, value in panel.bounds.items())
        found.append(f"the best predictor, which {KNOWN}, expects {values}")
    for line in panel.lines:
        if FAILED in line:
            found.append(f"{line['model']}, {size_of(line)}, seed {line['repetition']}: {line[f'{FAILED}/seen']}")
    return "\n".join(f"- {sentence}" for sentence in found)


def laws_table(laws: list[Row]) -> str:
    """A line per metric, encoder and law."""

    def cell(line: Row, name: str, shown: str) -> str:
        values = [shown.format(line[key]) for key in (name, f"{name}/low", f"{name}/high") if key in line]
        return values[0] + (f" [{values[1]}, {values[2]}]" if len(values) > 1 else "") if values else ""

    shown = {"exponent": "{:z.4f}", "error": "{:.2%}"}  # z: no -0
    table = [
        [_title(one["metric"]), LABELS[one["encoder"]], one["law"], *(cell(one, *form) for form in shown.items())]
        for one in laws
    ]
    headers = ["metric", "encoder", "law", "b, or e of the last law", "error of the held-out budgets"]
    return render(table, headers, tablefmt="github", disable_numparse=True)


def sizes_table(panel: Panel) -> str:
    """A line per budget, encoder and size: metrics, passes and seconds; what counts for a budget in bold."""
    metrics, table = panel.settings["metrics"], []
    for encoder, size, budget in sorted(panel.means, key=lambda key: (key[2], panel.encoders.index(key[0]))):
        cells = []
        for metric in metrics:
            values, of = panel.values(encoder, metric, size, budget), panel.frontiers.get((encoder, metric))
            text = f"{statistics.fmean(values):.4f}"
            text += f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            cells.append(f"**{text}**" if of and (size, budget) in of.best else text)
        of_seeds = panel.means[encoder, size, budget]
        passes, seconds = (statistics.fmean(line[name] for line in of_seeds) for name in ("passes", "seconds"))
        table.append([f"{budget:g}", LABELS[encoder], size, *cells, f"{passes:.2f}", f"{seconds:.1f}"])
    headers = ["lg C", "encoder", "size", *map(_title, metrics), "passes", "s, beside others"]
    return render(table, headers, tablefmt="github", disable_numparse=True)


def trial_table(panel: Panel) -> str:
    """A line per encoder and power of the width: the loss of a seed."""
    table = [
        [LABELS[line["encoder"]], size_of(line), f"{line[BUDGET]:g}", f"{line[POWER]:g}", f"{line[LOSS]:.4f}"]
        for line in sorted(panel.trial, key=lambda line: list(LABELS).index(line["encoder"]))
    ]
    return render(table, ["encoder", "size", "lg C", "p", LOSS], tablefmt="github", disable_numparse=True)


def _title(metric: str) -> str:
    return metric.upper() if metric.startswith(("hr", "ndcg")) else metric


def _draw(panels: list[Panel]) -> Figure:
    """A column per data set and device, a row per fitted metric, and one of coverage."""
    metrics = [*panels[0].settings["fitted"], COVERAGE]
    figure = Figure(figsize=(1.2 + 4.2 * len(panels), 2.6 * len(metrics)), layout="constrained")
    axes = figure.subplots(len(metrics), len(panels), squeeze=False)
    for column, panel in enumerate(panels):
        for axis, metric in zip(axes[:, column], metrics, strict=True):
            if metric in panel.bounds:
                axis.axhline(panel.bounds[metric], color="black", linestyle=":", linewidth=0.9)
            for number, encoder in enumerate(panel.encoders):
                _draw_encoder(axis, panel, encoder, metric, f"C{(3 * number + 7) % 8}")
            axis.set(xlabel="lg of FLOPs", ylabel=f"{_title(metric)}, test")
        axes[0, column].set_title(f"{panel.data}, {panel.device}", fontsize=9)
        axes[0, column].legend(frameon=False, fontsize=8)
    return figure


def _draw_encoder(axis: Any, panel: Panel, encoder: str, metric: str, colour: str) -> None:
    sizes = panel.points[encoder, metric]
    tested = sorted({(budget, size) for size, runs in sizes.items() for run in runs.values() for budget in run})
    mean = {one: statistics.fmean(panel.values(encoder, metric, one[1], one[0])) for one in tested}
    axis.plot([one[0] for one in mean], [*mean.values()], ".", color=colour, markersize=3, alpha=0.4)
    of = panel.frontiers[encoder, metric if metric != COVERAGE else panel.settings["fitted"][0]]
    if metric == COVERAGE:
        best = [mean[budget, size] for size, budget in of.best]
        axis.plot(of.budgets, best, color=colour, linewidth=1)
        return
    value, low, high = np.array([panel.band(values) for values in of.values]).T
    error = np.abs([value - low, high - value])
    axis.errorbar(of.budgets, value, yerr=error, fmt="o", color=colour, markersize=4, label=LABELS[encoder])
    places = np.linspace(of.budgets[0], of.budgets[-1], _DRAWN)
    for law, style in ((LOGARITHM, "-"), (SATURATING, "--")):
        if len(of.budgets) >= LAWS[law]:
            drawn = fit(law, of.x(), of.values, panel.exponents, metric != LOSS).predict(of.x(places))
            line, below, above = np.array([panel.band(values) for values in drawn]).T
            axis.plot(places, line, style, color=colour, linewidth=0.9)
            if law == LOGARITHM:
                axis.fill_between(places, below, above, color=colour, alpha=0.2, linewidth=0)
