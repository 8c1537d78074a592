"""How fast a training step is, where its time goes, how far it is from the least it could take; and whole trainings."""

from typing import Any

from matplotlib import rcParams
from matplotlib.figure import Figure
from tabulate import tabulate as render

from steps.studies.rows import KERNEL, PART, ROOFS, Row, cases

#: How a step is run, by (captured, compiled), in the order of the columns.
_WAYS = {
    (False, False): "launched from Python",
    (True, False): "CUDA graph",
    (True, True): "compiled, CUDA graph",
}
_WAITING = "GPU idle"
_LEAST = ("least operations", "least bytes")
_OF_STEP = ("device", "model", "blocks", "dim", "heads", "dqk", "dv", "max_len", "items", "negatives", "batch")


def report(rows: list[Row], study: dict[str, Any]) -> tuple[str, Figure, list[Row]]:
    """Markdown, bars of the parts of a step, and a line per case, without the single kernels."""
    lines = cases(row for row in rows if not row["metric"].startswith(KERNEL))
    roofs = {line["device"]: line for line in lines if line["kind"] == ROOFS}
    steps = [line for line in lines if line["kind"] == "step"]
    found = steps_of(steps)
    commits = ", ".join(dict.fromkeys(line["commit"][:9] for line in steps))
    parts = [
        f"# {study['title']}",
        "Every window full, which is the longest a step can take; medians. Floor: the least that the matrix products "
        "and attention can take at the measured rate of a large product, or the bytes that must move at the measured "
        f"rate of a copy, whichever is more; counted for HSTU. Commits {commits}.",
        speed_table(found, roofs),
        "## Whole trainings",
        "All epochs of the runs: seconds of the longest training, its own evaluations apart; with capturing "
        "and what other runs that were trained at once evaluated meanwhile. With compiling as well, unless a cache on "
        "disk has what Triton and torch.compile make, as it has from a run's second time on.",
        trainings_table([line for line in lines if line["kind"] == "training"]),
        "## Where the time goes",
        f"Milliseconds of kernels a step, by part; `{_WAITING}`: the rest of the step, when none ran.",
    ]
    for step in found:
        parts += [f"### {_name(next(iter(step.values())))}", parts_table(step)]
    return "\n\n".join([*parts, "![Parts of a step](figure.svg)"]) + "\n", _draw(found), lines


def steps_of(lines: list[Row]) -> list[dict[str, Row]]:
    """The lines of each model, shape and device, by the way its step is run."""
    found: dict[str, dict[str, Row]] = {}
    for line in lines:
        key = repr([line[name] for name in _OF_STEP])
        found.setdefault(key, {})[_WAYS[line["captured"], line["compiled"]]] = line
    return list(found.values())


def floor(step: Row, roofs: dict[str, Row]) -> float | None:
    """Milliseconds that the step's operations or its bytes take at its device's roofs, whichever is more."""
    device = step["device"]
    if device not in roofs or any(name not in step for name in _LEAST):
        return None
    operations, moved = (step[name] for name in _LEAST)
    return float(1000 * max(operations / roofs[device]["product"], moved / roofs[device]["copy"]))


def speed_table(found: list[dict[str, Row]], roofs: dict[str, Row]) -> str:
    """A line a case: milliseconds of a step each way, memory at the best, and the floor."""
    lines = []
    for step in found:
        best = min(step.values(), key=lambda line: line["step"])
        least = floor(best, roofs)
        times = [f"{step[way]['step']:.2f}" if way in step else "" for way in _WAYS.values()]
        bound = ["", ""] if least is None else [f"{least:.2f}", f"{best['step'] / least:.1f}"]
        lines.append([_name(best), *times, _mebibytes(best), *bound, best["device"]])
    headers = ["step", *(f"{way}, ms" for way in _WAYS.values()), "peak MiB", "floor, ms", "best / floor", "device"]
    return render(lines, headers, tablefmt="github", disable_numparse=True)


def parts_table(step: dict[str, Row]) -> str:
    """A line a part of the step: milliseconds each way; and what is left, when the GPU waits."""
    ways = [way for way in _WAYS.values() if way in step]
    parts = {way: _parts(step[way]) for way in ways}
    every = {name for way in ways for name in parts[way]}
    names = sorted(every, key=lambda name: (-parts[ways[-1]].get(name, 0.0), name))
    lines = [[name, *(f"{parts[way].get(name, 0.0):.3f}" for way in ways)] for name in names]
    lines.append(["whole step", *(f"{step[way]['step']:.3f}" for way in ways)])
    return render(lines, ["part", *(f"{way}, ms" for way in ways)], tablefmt="github", disable_numparse=True)


def trainings_table(lines: list[Row]) -> str:
    """A line for the runs that shared a device: what they were, and how long the longest trained."""
    table = []
    for line in lines:
        first, last = line["epochs/low"], line["epochs/high"]
        epochs = str(last) if first == last else f"{first} to {last}"
        shown = [line[name] for name in ("experiment", "data", "protocol", "models")]
        shown += [epochs, str(line["runs_at_once"]), f"{line['longest']:.1f}", _mebibytes(line)]
        table.append([*shown, line["device"], line["commit"][:9]])
    headers = ["experiment", "data", "protocol", "models", "epochs", "runs at once", "longest, s", "peak MiB, all"]
    return render(table, [*headers, "device", "commit"], tablefmt="github", disable_numparse=True)


def _parts(line: Row) -> dict[str, float]:
    """Milliseconds of a step's parts, and what is left of it."""
    parts = {name.removeprefix(PART): ms for name, ms in line.items() if name.startswith(PART)}
    return parts | {_WAITING: max(0.0, line["step"] - sum(parts.values()))}


def _mebibytes(line: Row) -> str:
    return f"{line['peak'] / 2**20:,.0f}" if "peak" in line else ""


def _name(line: Row) -> str:
    return (
        f"{line['model']}, {line['blocks']} blocks, d {line['dim']}, {line['heads']} heads, "
        f"{line['items']:,} items, {line['batch']} x {line['max_len']} tokens"
    )


def _draw(found: list[dict[str, Row]]) -> Figure:
    """A bar per case, of the parts of its fastest step; the device waits in grey."""
    best = [min(step.values(), key=lambda line: line["step"]) for step in found]
    parts = [_parts(line) for line in best]
    names = sorted({name for one in parts for name in one} - {_WAITING})
    figure = Figure(figsize=(9, 0.4 * len(best) + 1.5), layout="constrained")
    axis = figure.subplots()
    left = [0.0] * len(best)
    colours = len(rcParams["axes.prop_cycle"])  # further parts are hatched
    for index, name in enumerate([*names, _WAITING]):
        widths = [one.get(name, 0.0) for one in parts]
        colour = "lightgrey" if name == _WAITING else f"C{index % colours}"
        hatch = "//" if index >= colours and name != _WAITING else None
        axis.barh(range(len(best)), widths, left=left, label=name, color=colour, hatch=hatch)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axis.set_yticks(range(len(best)), [f"{line['model']}, {line['blocks']} x d {line['dim']}" for line in best])
    axis.invert_yaxis()
    axis.set_xlabel("milliseconds a step, by part, run the fastest way")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure
