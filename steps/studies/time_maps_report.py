"""How many times as fast FuXi's maps of time are as HSTU's bias, looked up for every pair or inside the attention."""

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from tabulate import tabulate as render

from steps.studies.rows import FAILED, Row, cases
from steps.studies.time_maps import ATTENTION, DENSE, ENCODER, FULL, FUSED, MAP, MODELS, RAGGED, TRAINING

#: What a line has beside its time: how many times that of these it is, of the same shape, run and device.
OVER = {DENSE: "over dense lookup", FUSED: "over fused bias"}
_SHAPE = ("part", "pass", "lengths", "n", "compiled", "device", "card", "commit")
_TITLES = {MAP: "Weights of time alone", ATTENTION: "Attention", ENCODER: "Encoders"}


def report(rows: list[Row], study: dict[str, Any]) -> tuple[str, Figure, list[Row]]:
    """Markdown, times by length, and a line per case with its speed-up over HSTU of either kind."""
    lines, settings = compared(cases(rows)), study["measure"]["settings"]
    sizes = settings["encoder"]
    parts = [
        f"# {study['title']}",
        f"Width {sizes['dim']}, {sizes['heads']} heads of {sizes['dqk']}, {sizes['dtype']} with weights and residual "
        f"sums in float32, no dropout; batches of about {settings['tokens']} tokens, in rows of at most N, the same "
        "for all. Training: a forward and a backward pass; inference: a forward pass. Weights of time alone: an N x N "
        "map for each row, of HSTU's table or of FuXi-gamma's three numbers, from the times of tokens. Attention: what "
        f"mixes the tokens, without projections; maps are made for one layer. Encoders: {settings['layers']} layers, "
        "for which FuXi subtracts times once. Dense lookup: bias and scores of every pair in memory, in plain "
        "torch, as public code has them. Fused bias: this project's attention. All of HSTU's encoders have this "
        "project's projection and gate. FuXi as it is implemented here, in torch. Ragged: "
        "lengths spread from a tenth of N, a third of them N. Cells: milliseconds, and in brackets the peak of memory "
        "beyond what was there, in MB; 1 MB = 10^6 bytes. Speed-up: HSTU's time over the model's, of one run.",
    ]
    for part in _TITLES:
        for device in dict.fromkeys(line["device"] for line in lines):
            for lengths in (FULL, RAGGED):
                found = [
                    line for line in lines if (line["part"], line["lengths"], line["device"]) == (part, lengths, device)
                ]
                if found:
                    commits = ", ".join(dict.fromkeys(line["commit"][:9] for line in found))
                    title = f"## {_TITLES[part]}, {lengths} lengths, {device}"
                    parts += [title, f"Commit {commits}.", time_table(found), speed_table(found)]
    launched = [line for line in lines if line.get("captured") == 0]
    if launched:
        parts.append(f"Not as CUDA graphs, launches included: {'; '.join(map(_name_and_shape, launched))}.")
    failed = [line for line in lines if FAILED in line]
    if failed:
        parts += ["## What did not run", *(f"- {_name_and_shape(line)}: {line[f'{FAILED}/seen']}" for line in failed)]
    return "\n\n".join([*parts, "![Times](figure.svg)"]) + "\n", _draw(lines), lines


def compared(lines: list[Row]) -> list[Row]:
    """The lines, each with how many times as fast it is as HSTU of either kind in the same shape and run."""
    times = {(_key(line), line["model"]): line["ms"] for line in lines if "ms" in line}
    return [
        line
        | {
            name: round(times[_key(line), model] / line["ms"], 4)
            for model, name in OVER.items()
            if "ms" in line and line["model"] != model and (_key(line), model) in times
        }
        for line in lines
    ]


def time_table(lines: list[Row]) -> str:
    """A line for each model and pass: milliseconds and the peak by N."""
    kinds: dict[tuple[str, str], dict[int, str]] = {}
    for line in lines:
        kinds.setdefault((_name(line), line["pass"]), {})[line["n"]] = _time_and_peak(line)
    return _by_length(kinds, ["", "pass"], lines)


def speed_table(lines: list[Row]) -> str:
    """A line for each model, pass and kind of HSTU: speed-ups by N, of the two kinds over each other one alone."""
    kinds: dict[tuple[str, str, str], dict[int, str]] = {}
    for over in OVER.values():
        for line in lines:
            if over in line and line["model"] != DENSE:
                kinds.setdefault((_name(line), line["pass"], over), {})[line["n"]] = f"{line[over]:.2f}x"
    return _by_length(kinds, ["", "pass", "speed-up"], lines)


def _by_length(kinds: dict[Any, dict[int, str]], headers: list[str], lines: list[Row]) -> str:
    lengths = sorted({line["n"] for line in lines})
    table = [[*names, *(cells.get(n, "") for n in lengths)] for names, cells in kinds.items()]
    return render(table, [*headers, *(f"N {n:,}" for n in lengths)], tablefmt="github", disable_numparse=True)


def _time_and_peak(line: Row) -> str:
    if "ms" not in line:
        return "failed" if line["compiled"] else "does not fit"
    return _digits(line["ms"]) + (f" ({_digits(line['peak'] / 1e6)})" if "peak" in line else "")


def _digits(value: float) -> str:
    """`value` to three significant digits, never in powers of ten."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}" if value else "0"


def _key(line: Row) -> str:
    return repr([line.get(name) for name in _SHAPE])


def _name(line: Row) -> str:
    return str(line["model"]) + ", compiled" * line["compiled"]


def _name_and_shape(line: Row) -> str:
    shape = f"{line['pass']}, {line['lengths']} lengths, N {line['n']:,}, {line['device']}"
    return f"{_name(line)}, {_TITLES[line['part']].lower()}, {shape}"


def _draw(lines: list[Row]) -> Figure:
    """Milliseconds of training by N, full rows of the first device: attention on the left, encoders on the right."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axis, part in zip(figure.subplots(1, 2), (ATTENTION, ENCODER), strict=True):
        kind = {"part": part, "pass": TRAINING, "lengths": FULL, "compiled": False, "device": lines[0]["device"]}
        found = [line for line in lines if "ms" in line and kind.items() <= line.items()]
        _draw_models(axis, found)
        axis.set(xscale="log", yscale="log", xlabel="longest row, N", ylabel="ms", title=f"{_TITLES[part]}, training")
        axis.set_xticks(sorted({line["n"] for line in found}), minor=False)
        axis.set_xticks([], minor=True)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.0f}"))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
        axis.grid(alpha=0.3)
        if found:
            axis.legend(frameon=False, fontsize=8)
    return figure


def _draw_models(axis: Axes, lines: list[Row]) -> None:
    for index, model in enumerate(MODELS):
        members = [line for line in lines if line["model"] == model]
        if members:
            axis.plot(
                [line["n"] for line in members],
                [line["ms"] for line in members],
                "-" if model.startswith("HSTU") else "--",
                marker=".",
                color=f"C{index}",
                label=model,
            )
