"""Several processes that train one run: scaling, parts of a step, waiting, bytes, and time to a quality."""

import statistics
from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure
from tabulate import tabulate as render

from steps.studies.distributed import BALANCE, BY_COST, PARTS, QUALITY, ROWWISE, SCALING
from steps.studies.rows import PART, Row, cases

_Columns = dict[str, str | Callable[[Row], str]]
_TWO_RUNS = "*"
_AXES: _Columns = {name: name for name in ("device", "table", "processes", "windows")}


def report(rows: list[Row], study: dict[str, Any]) -> tuple[str, Figure, list[Row]]:
    """Markdown, the parts of a step, and a line per case and seed."""
    lines, given = cases(rows), study["measure"]["settings"]
    scaling, balance, quality = (
        [line for line in lines if line["kind"] == kind] for kind in (SCALING, BALANCE, QUALITY)
    )
    parts = [
        f"# {study['title']}",
        "Steps of HSTU-large on sequences that are generated in MovieLens-20M's form. A step's time is the mean, of "
        "the process that takes longest; on CUDA of graphs, and beside it launched from Python. Not compiled, as a "
        "long training by one process is. The rowwise table is ours, not TorchRec's. Commits "
        f"{_each(lines, 'commit', 9)}.",
    ]
    if scaling:
        parts += [
            "## Scaling",
            f"Weak: {given['windows_each']} windows a process; the time of one process over this one. Strong: "
            f"{given['windows']} windows in all; likewise, which is how many times as fast it is. With {_TWO_RUNS}: "
            "the two are of different runs, on other cards of the kind or of other commits, and may differ so.",
            _table(
                _AXES
                | {"tokens": lambda line: f"{line['tokens']:,.0f}", "step, ms": _number("step")}
                | {"from Python, ms": _number("step from Python")}
                | {"weak": lambda line: _beside(_weak_base(scaling, line), line) if _is_weak(line, given) else "-"}
                | {
                    "strong": lambda line: (
                        _beside(_strong_base(scaling, line), line) if _is_strong(line, given) else "-"
                    )
                }
                | {"peak MB a process": lambda line: f"{line['peak'] / 1e6:,.0f}" if "peak" in line else "-"},
                scaling,
            ),
            "Beside what is asked of several processes:",
            render(_bars(scaling, given["bars"]), ["", "measured", "bar", "met"], "github", disable_numparse=True),
            "## Parts of a step",
            "Milliseconds, means over the processes, of steps that are watched: before each exchange and each sum all "
            "wait for the last process, and the wait has a column. A lookup has its update. On CUDA attention is the "
            "time of its kernels, and so are lookups in a table that is not shared. Rest has the host's time too, "
            "where it launches kernels more slowly than they run.",
            _table(_AXES | {part: _number(PART + part) for part in PARTS} | {"idle": _number("idle")}, scaling),
        ]
    if balance:
        long = given["balance"]
        parts += [
            "## Shares of a batch",
            f"Windows of at most {long['max_len']} tokens, with a long tail, {long['windows_each']} a process, AdamW. "
            "Load: tokens squared, of the process with most over the mean. Idle: the share of a watched step in which "
            "a process waits for another.",
            _table(
                {name: name for name in ("device", "processes", "windows", "shared")}
                | {"load": _number("load"), "step, ms": _number("step"), "idle": _number("idle")}
                | {
                    "over that by cost": lambda line: _shown(
                        _ratio(line, _like(balance, line, "processes", shared=BY_COST))
                    )
                },
                balance,
            ),
        ]
    if quality:
        wanted = given["quality"]
        parts += [
            f"## Time to {wanted['metric'].upper()} of {wanted['target']} on validation",
            "The same batch by more processes. Seconds of training, without evaluations: median, least and most of the "
            f"seeds that reached it. Hash of the data: {_each(quality, 'data_sha256')}.",
            _quality(quality),
        ]
    parts.append("![Parts of a step](figure.svg)")
    return "\n\n".join(parts) + "\n", _draw(scaling or balance), lines


def _each(lines: list[Row], key: str, letters: int | None = None) -> str:
    return ", ".join(dict.fromkeys(line[key][:letters] for line in lines))


def _like(lines: list[Row], line: Row, *same: str, **axes: Any) -> Row | None:
    """The first case of the same device, and of these axes."""
    wanted = {key: line[key] for key in ("device", *same)} | axes
    return next((one for one in lines if wanted.items() <= one.items()), None)


def _ratio(one: Row | None, other: Row | None) -> float | None:
    """How many times as long the first one's step is."""
    return one["step"] / other["step"] if one and other else None


def _is_weak(line: Row, given: dict[str, Any]) -> bool:
    return bool(line["windows"] == given["windows_each"] * line["processes"])


def _is_strong(line: Row, given: dict[str, Any]) -> bool:
    return bool(line["windows"] == given["windows"])


def _weak_base(scaling: list[Row], line: Row) -> Row | None:
    return _like(scaling, line, "table", processes=1, windows=line["windows"] // line["processes"])


def _strong_base(scaling: list[Row], line: Row) -> Row | None:
    return _like(scaling, line, "table", "windows", processes=1)


def _beside(base: Row | None, line: Row) -> str:
    """The base's time over the line's, marked where they are not of one run."""
    return _shown(_ratio(base, line)) + _mark(base, line)


def _mark(one: Row | None, other: Row) -> str:
    """_TWO_RUNS unless both cases are of one card and commit."""
    same = one is None or all(one.get(key) == other.get(key) for key in ("card", "commit"))
    return "" if same else _TWO_RUNS


def _bars(scaling: list[Row], bars: dict[str, float]) -> list[list[str]]:
    """What is asked of several processes, beside what was measured."""
    found = []
    for line in scaling:
        base, about = _weak_base(scaling, line), f"{line['table']}, {line['processes']} processes, {line['device']}"
        weak, mark = _ratio(base, line), _mark(base, line)
        if line["processes"] > 1 and weak:
            asked = [(f"weak scaling, {about}", weak, f">= {bars['weak']:g}", weak >= bars["weak"])]
            if line["table"] == ROWWISE:
                met = 1 / weak <= bars["sharded"]
                asked.append((f"step over one process's, {about}", 1 / weak, f"<= {bars['sharded']:g}", met))
            found += [
                [what, f"{value:.2f}{mark}", bar, ("yes" if met else "no") + mark] for what, value, bar, met in asked
            ]
    for device, table in dict.fromkeys((line["device"], line["table"]) for line in scaling):
        most = max(line["item bytes"] for line in scaling if (line["device"], line["table"]) == (device, table))
        bar = [f"<= {bars['item_bytes']:g}", "yes" if most <= bars["item_bytes"] else "no"]
        bar = bar if table == ROWWISE else [f"{bars['adam_bytes']:g}, to compare", "-"]
        found.append([f"bytes a float of the item vectors, {table}, {device}", f"{most:.3f}", *bar])
    return found


def _quality(quality: list[Row]) -> str:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for line in quality:
        groups.setdefault((line["device"], line["model"], str(line["processes"])), []).append(line)
    found = []
    for axes, lines in groups.items():
        reached, best = [line for line in lines if "seconds" in line], [line["best"] for line in lines]
        forms = {"epochs": ".0f", "seconds": ".1f"}
        spread = [_spread([line[name] for line in reached], form) for name, form in forms.items()]
        ends = f"{statistics.fmean(best):.4f}", f"{max(best) - min(best):.4f}"
        found.append([*axes, f"{len(reached)} of {len(lines)}", *spread, *ends])
    headers = ["device", "model", "processes", "seeds that reached it", "epochs", "seconds", "best", "best, spread"]
    return render(found, headers, "github", disable_numparse=True)


def _spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})" if values else "-"


def _number(key: str) -> Callable[[Row], str]:
    return lambda line: _shown(line.get(key), ".3f")


def _shown(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else f"{value:{form}}"


def _table(columns: _Columns, lines: list[Row]) -> str:
    cells = [[str(line[one]) if isinstance(one, str) else one(line) for one in columns.values()] for line in lines]
    return render(cells, [*columns], "github", disable_numparse=True)


def _draw(lines: list[Row]) -> Figure:
    """A bar per case, of the parts of its step."""
    figure = Figure(figsize=(7, 1.2 + 0.3 * len(lines)), layout="constrained")
    axis = figure.subplots()
    left = [0.0] * len(lines)
    for part in PARTS:
        values = [line[PART + part] for line in lines]
        axis.barh(range(len(lines)), values, left=left, label=part)
        left = [one + value for one, value in zip(left, values, strict=True)]
    keys = ("table", "shared", "processes", "windows")
    names = [", ".join(str(line[key]) for key in keys if key in line) for line in lines]
    axis.set_yticks(range(len(lines)), names, fontsize=7)
    axis.set(xlabel="ms of a watched step, by part, by table, processes and windows")
    axis.invert_yaxis()
    axis.legend(frameon=False, fontsize=8)
    return figure
