"""How many times as fast layers of HSTU are as a Transformer's, what both keep of a token, and optimisers' bytes."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from tabulate import tabulate as render

from steps.studies.encoder_efficiency import HSTU, INFERENCE, MEMORY, OPTIMISER, SPEED, TRAINING, TRANSFORMER, WHOLE
from steps.studies.rows import FAILED, Row, cases
from steps.studies.transformer import BACKENDS

#: What a line of HSTU's speed has beside its time: how many times the Transformer's it is, by its attention.
OVER = {name: f"over {name}" for name in BACKENDS}
_SHAPE = ("device", "pass", "lengths", "n", "compiled")
_HEADERS = {TRAINING: "Training", INFERENCE: "Inference"}


def report(rows: list[Row], study: dict[str, Any]) -> tuple[str, Figure, list[Row]]:
    """Markdown, speed-ups by length, and a line per case, HSTU's with its speed-up over either Transformer."""
    lines, settings = cases(rows), study["measure"]["settings"]
    speeds = compared([line for line in lines if line["part"] == SPEED])
    sizes, encoder = settings["speed"], settings["encoder"]
    parts = [
        f"# {study['title']}",
        f"Layers alone, {sizes['layers']} of them, width {encoder['dim']}, {encoder['dim'] // encoder['dqk']} heads of "
        f"{encoder['dqk']}, {encoder['dtype']}, dropout {sizes['dropout']:g}; batches of {sizes['tokens']} tokens as "
        "HSTU reads them, in rows of at most N. Training: a forward and a backward pass; inference: a forward pass. "
        "Speed-up: the Transformer's time a row over HSTU's. The Transformer's rows are padded to N, HSTU's are "
        "jagged. alpha: of Stochastic Length, which leaves out a part of long rows in training; here HSTU alone reads "
        "less by it, as in the paper, though any encoder of jagged rows could. Ragged: lengths spread from a tenth of "
        "N, a third of them N. Bias: of position and time. What is empty or missing was not measured.",
    ]
    for which in dict.fromkeys(line["pass"] for line in speeds):
        for lengths in dict.fromkeys(line["lengths"] for line in speeds):
            for device in dict.fromkeys(line["device"] for line in speeds):
                found = [
                    line
                    for line in speeds
                    if (line["pass"], line["lengths"], line["device"]) == (which, lengths, device)
                ]
                if found:
                    title = f"## {_HEADERS[which]}, {lengths} lengths, {device}"
                    parts += [title, _commits(found), speed_table(found), time_table(found)]
    launched = [line for line in speeds if line.get("captured") == 0]
    if launched:
        parts.append(f"Not as CUDA graphs, launches included: {'; '.join(map(_name_and_shape, launched))}.")
    kept = [line for line in lines if line["part"] == MEMORY]
    if kept:
        sizes = settings["memory"]
        parts += [
            "## Activations kept for the backward pass",
            f"Bytes a token and layer over the width d, dropout {sizes['dropout']:g}, rows of {sizes['n']}: storages "
            "that autograd saves, each once, and what the allocator says. HSTU keeps the layer's input, U, V, Q and K, "
            "attention's result and the gate's; norms, the gate and dropout's masks are computed again. Where the "
            "projection is neither one kernel nor recomputed (`recompute_projection`), its normalised input and its "
            "product before SiLU are kept too; with bias, what finds the time buckets again. The Transformer keeps "
            "inputs and results of its norms, Q, K and V, attention's result, the inner product before and after GELU, "
            "and dropout's masks.",
            memory_table(kept),
        ]
    optimisers = [line for line in lines if line["part"] == OPTIMISER]
    if optimisers:
        table = [[line["optimiser"], f"{line['bytes a float']:.2f}", line["device"]] for line in optimisers]
        headers = ["optimiser", "bytes a float of the item table", "device"]
        parts += ["## Optimisers", render(table, headers, tablefmt="github", disable_numparse=True)]
    failed = [line for line in lines if FAILED in line]
    if failed:
        parts += ["## What did not run", *(f"- {_name_and_shape(line)}: {line[f'{FAILED}/seen']}" for line in failed)]
    return "\n\n".join(parts) + "\n", _draw(speeds), [*speeds, *(line for line in lines if line["part"] != SPEED)]


def compared(lines: list[Row]) -> list[Row]:
    """The lines, those of HSTU with how many times as fast a row is as of each Transformer of the same shape."""
    others = {
        (_key(line), line["attention"]): line for line in lines if line["encoder"] == TRANSFORMER and "ms" in line
    }
    found = []
    for line in lines:
        over = {
            name: round(_a_row(others[_key(line), attention]) / _a_row(line), 4)
            for attention, name in OVER.items()
            if line["encoder"] == HSTU and "ms" in line and (_key(line), attention) in others
        }
        found.append(line | over)
    return found


def speed_table(lines: list[Row]) -> str:
    """A line for HSTU's kind, alpha, and the Transformer's attention: speed-ups by N."""
    kinds: dict[tuple[str, str], dict[int, str]] = {}
    for line in lines:
        for attention, name in OVER.items():
            if name in line:
                kinds.setdefault((_name(line), attention), {})[line["n"]] = f"{line[name]:.2f}x"
    return _by_length(kinds, ["", "beside"], lines)


def time_table(lines: list[Row]) -> str:
    """A line for each encoder: microseconds of a row, by N."""
    kinds: dict[tuple[str, str], dict[int, str]] = {}
    for line in lines:
        if "ms" in line:
            kinds.setdefault((_name(line), "us a row"), {})[line["n"]] = f"{1000 * _a_row(line):.1f}"
    return _by_length(kinds, ["", "time"], lines)


def memory_table(lines: list[Row]) -> str:
    """A line for each encoder and width: what is kept, counted both ways."""
    found = []
    for line in lines:
        if FAILED not in line:
            values = [f"{line[name]:.2f} d" if name in line else "" for name in ("kept", "allocated")]
            found.append([_name(line), str(line["dim"]), *values, line["device"], line["commit"][:9]])
    headers = ["layer", "d", "kept", "allocated", "device", "commit"]
    return render(found, headers, tablefmt="github", disable_numparse=True)


def _by_length(kinds: dict[tuple[str, str], dict[int, str]], headers: list[str], lines: list[Row]) -> str:
    lengths = sorted({line["n"] for line in lines})
    table = [[*names, *(cells.get(n, "") for n in lengths)] for names, cells in kinds.items()]
    return render(table, [*headers, *(f"N {n:,}" for n in lengths)], tablefmt="github", disable_numparse=True)


def _key(line: Row) -> str:
    return repr([line[name] for name in _SHAPE])


def _a_row(line: Row) -> float:
    """Milliseconds of a row of the batch."""
    return float(line["ms"] / line["sequences"])


def _name(line: Row) -> str:
    words = [line["encoder"]]
    if line["encoder"] == TRANSFORMER:
        words.append(line["attention"])
    if line["bias"] != "none":
        words.append("bias")
    if line["recomputed"]:
        words.append("projection recomputed")
    if line.get("alpha", WHOLE) != WHOLE:
        words.append(f"alpha {line['alpha']:g}")
    if line["compiled"]:
        words.append("compiled")
    return ", ".join(words)


def _name_and_shape(line: Row) -> str:
    if line["part"] == MEMORY:
        return f"{_name(line)}, d {line['dim']}"
    return f"{_name(line)}, {line['pass']}, {line['lengths']} lengths, N {line['n']:,}, {line['device']}"


def _commits(lines: list[Row]) -> str:
    return f"Commit {', '.join(dict.fromkeys(line['commit'][:9] for line in lines))}."


def _draw(lines: list[Row]) -> Figure:
    """Speed-ups over the Transformer on FlashAttention-2 by N, of full rows: training on the left, inference right."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    devices = list(dict.fromkeys(line["device"] for line in lines))
    for axis, which in ((left, TRAINING), (right, INFERENCE)):
        for device in devices:
            found = [line for line in lines if (line["device"], line["pass"]) == (device, which)]
            _draw_pass(axis, found, f", {device}" if len(devices) > 1 else "")
        axis.axhline(1.0, color="C0", linewidth=1)
        title = f"{_HEADERS[which]}: times as fast as a Transformer"
        axis.set(xscale="log", yscale="log", xlabel="longest row, N", title=title)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.0f}"))
        lengths = sorted({line["n"] for line in lines})
        axis.set_xticks(lengths, minor=False)
        axis.set_xticks([], minor=True)
        for one in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            one(FuncFormatter(lambda times, _: f"{times:g}"))
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8)
    return figure


def _draw_pass(axis: Axes, lines: list[Row], ending: str) -> None:
    """A line for each kind of HSTU, the more is read the stronger, and one for the Transformer on cuDNN's attention."""
    full = [line for line in lines if line["lengths"] == "full" and not line["compiled"] and not line["recomputed"]]
    over = OVER["FlashAttention-2"]
    hstu = [line for line in full if over in line]
    names = sorted(dict.fromkeys((_name(line), line["bias"], line["alpha"]) for line in hstu), key=lambda one: -one[2])
    for index, (name, bias, alpha) in enumerate(names):
        members = [line for line in hstu if (line["bias"], line["alpha"]) == (bias, alpha)]
        colour = f"C{(7 - index) % 8}"
        style = "--" if bias != "none" else "-"
        axis.plot(
            [line["n"] for line in members],
            [line[over] for line in members],
            style,
            marker=".",
            color=colour,
            label=name + ending,
        )
    base = {line["n"]: _a_row(line) for line in full if line["attention"] == "FlashAttention-2" and "ms" in line}
    cudnn = [line for line in full if line["attention"] == "cuDNN" and "ms" in line and line["n"] in base]
    if cudnn:
        times = [base[line["n"]] / _a_row(line) for line in cudnn]
        lengths = [line["n"] for line in cudnn]
        axis.plot(lengths, times, ":", marker=".", color="C0", label=f"{TRANSFORMER}, cuDNN{ending}")
