"""Tables and a roofline of the kernels: a device has tables of its own, and shares no roof with another."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jsonschema
from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import StrMethodFormatter
from tabulate import tabulate as render

from steps.common.cli import StepError
from steps.studies.rows import FAILED, ROOFS, Row, cases

_ATTENTION = "hstu_attention"
_MARKERS = {"fwd": "o", "bwd": "s", "fwd+bwd": "^"}
_BIASES = ("none", "position", "time", "both")
_SHAPE = ("tokens", "negatives", "items", "dim", "columns")  # of the operations beside attention
_CASE = ("lengths", "dtype", "dqk", "dv", "heads")  # what one table of attention has in common
_PROBLEM = ("batch", "heads", "n", "dqk", "dv", "lengths", "bias")
_SEEN = f"{FAILED}/seen"

_SIZE = {"type": "integer", "minimum": 1}
_POSITIVE = {"type": "number", "exclusiveMinimum": 0}
_ROW_PROPERTIES: dict[str, Any] = {
    "implementation": {"type": "string"},
    "dtype": {"type": "string"},
    "pass": {"enum": list(_MARKERS)},
    "ms": _POSITIVE,
    "bytes": _POSITIVE,
    "flops": _POSITIVE,
    "peak_bytes": {"type": "number", "minimum": 0},
    "captured": {"enum": [0, 1]},
    _SEEN: {"type": "string", "minLength": 1},
}
_ROW = {
    "required": ["implementation", "dtype", "pass", "ms", "bytes"],
    "properties": _ROW_PROPERTIES | dict.fromkeys(_SHAPE, _SIZE),
}
_ATTENTION_ROW = {
    "required": ["implementation", "dtype", "pass", *_PROBLEM],
    "if": {"required": [FAILED]},
    "then": {"required": [_SEEN], "not": {"required": ["ms"]}},
    "else": {"required": ["ms", "bytes"]},
    "properties": _ROW_PROPERTIES
    | dict.fromkeys(_PROBLEM[:5], _SIZE)
    | {"lengths": {"enum": ["full", "ragged"]}, "bias": {"enum": list(_BIASES)}},
}
_ROOFS = {"required": ["copy", "product"], "properties": {"copy": _POSITIVE, "product": _POSITIVE}}


class Section(NamedTuple):
    """A table of the report."""

    title: str
    note: str
    headers: list[str]
    rows: list[list[str]]


def operations_of(lines: list[Row]) -> tuple[dict[str, list[Row]], dict[str, Row]]:
    """The lines of every operation, by its name in order; and the roofs of each device that has them.

    Raises StepError naming the first line that does not fit.
    """
    found: dict[str, list[Row]] = {}
    for line in lines:
        name = line["operation"]
        schema = {_ATTENTION: _ATTENTION_ROW, ROOFS: _ROOFS}.get(name, _ROW)
        problem = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(line))
        if problem is not None:
            key = "".join(f", key {part}" for part in problem.absolute_path)
            raise StepError(f"rows of {name}, {line.get('implementation', line['device'])}{key}: {problem.message}")
        found.setdefault(name, []).append(line)
    roofs = {line["device"]: line for line in found.pop(ROOFS, [])}
    return dict(sorted(found.items())), roofs


def attention_sections(rows: list[Row], device: str) -> list[Section]:
    """A table per case, with a column per N; one of what both biases cost; and ours beside causal softmax."""
    made = []
    for case, members in _grouped(rows, *_CASE).items():
        lengths, dtype, dqk, dv, heads = case
        title = f"HSTU attention, {lengths} lengths, {dtype}, dqk {dqk}, dv {dv}, {heads} heads, {device}"
        columns = sorted({_pick(row, "n", "batch") for row in members})
        names = list(dict.fromkeys(row["implementation"] for row in members))
        lines = []
        for line, cells in sorted(
            _grouped(members, "implementation", "bias", "pass").items(),
            key=lambda item: (names.index(item[0][0]), _BIASES.index(item[0][1]), _pass_order(item[0][2])),
        ):
            found = {_pick(row, "n", "batch"): _time_and_speed(row) for row in cells}
            lines.append([*line, *(found.get(column, "") for column in columns)])
        headers = ["implementation", "bias", "pass", *map(_size, columns)]
        made.append(Section(f"{title}: ms (TFLOP/s)", _marks(members) + _commits(members), headers, lines))
    made += _ratios([row for row in rows if row["implementation"] == "ours"], device)
    return made + _beside_softmax([row for row in rows if row["lengths"] == "full"], device)


def operation_section(operation: str, rows: list[Row], device: str) -> Section:
    """A line per row: its time and memory, beside those of the slowest implementation that is not ours."""
    shape = [name for name in _SHAPE if any(row.get(name) is not None for row in rows)]
    speeds = any(_speed(row) is not None for row in rows)
    lines = []
    for members in _grouped(rows, *shape, "dtype", "pass").values():
        slowest = max((row for row in members if not _is_ours(row)), key=lambda row: row["ms"], default=None)
        for row in members:
            line = [row["implementation"], *("" if row.get(name) is None else f"{row[name]:,}" for name in shape)]
            line += [row["dtype"], row["pass"], _digits(row["ms"])]
            if speeds:
                line.append(_rate(_speed(row)))
            peak = row.get("peak_bytes")
            line.append("" if slowest is None else f"{_digits(slowest['ms'] / row['ms'])}x")
            line.append("" if peak is None else _digits(peak / 1e6))
            reference = slowest.get("peak_bytes") if slowest is not None else None
            line.append(f"{peak / reference:.1%}" if peak is not None and reference else "")
            lines.append(line)
    headers = ["implementation", *shape, "dtype", "pass", "ms", *(["TFLOP/s"] if speeds else [])]
    headers += ["speed-up", "peak MB", "share of reference"]
    note = (
        "Reference: the slowest implementation that is not ours, of the same shape and pass. "
        f"Peak: memory allocated beyond the inputs, 1 MB = 10^6 bytes. {_commits(rows)}"
    )
    return Section(f"{_title(operation)}, {device}", note, headers, lines)


def published_section(published: list[Row], rows: list[Row], device: str) -> Section:
    """What others measured, as they say, and ours of the same pass, dqk and N: full lengths, no bias."""
    lines = []
    for entry in published:
        ours = [
            f"{_rate(_speed(row))} (B {row['batch']:,}, {row['heads']} heads, {row['dtype']})"
            for row in rows
            if (row["implementation"], row["lengths"], row["bias"]) == ("ours", "full", "none")
            and _pick(row, "pass", "dqk", "n") == _pick(entry, "pass", "dqk", "n")
            and _speed(row) is not None
        ]
        line = [entry["implementation"], entry["device"], entry["pass"], str(entry["dqk"])]
        line += [f"{entry['n']:,}", f"{entry['batch']:,}", _rate(entry["tflops"]), "; ".join(ours), entry["source"]]
        lines.append(line)
    headers = ["implementation", "device", "pass", "dqk", "N", "B", "TFLOP/s", "ours, TFLOP/s", "source"]
    note = f"Figures of others are theirs, on their devices. Ours: full lengths, no bias. {_commits(rows)}"
    return Section(f"Attention measured by others, beside ours on {device}", note, headers, lines)


def draw_roofline(results: dict[str, list[Row]], ceilings: Row) -> Figure:
    """Achieved TFLOP/s over counted FLOP per byte, under the roofs: the rows of the roofs' device.

    Of attention, ours alone; of other operations every row that has operations to count, ours filled.
    """
    points = [
        (operation, row)
        for operation, rows in results.items()
        for row in rows
        if row["device"] == ceilings["device"] and "flops" in row
        if operation != _ATTENTION or row["implementation"] == "ours"
    ]
    operations = [name for name in dict.fromkeys(name for name, _ in points) if name != _ATTENTION]
    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axis = figure.subplots()
    for operation, row in points:
        colour = f"C{_BIASES.index(row['bias']) if operation == _ATTENTION else 4 + operations.index(operation)}"
        axis.plot(
            *_place(row),
            _MARKERS[row["pass"]],
            color=colour,
            markerfacecolor=colour if _is_ours(row) else "none",
            markersize=4 if row.get("lengths") == "ragged" else 7,
            alpha=0.8,
        )
    axis.set(xscale="log", yscale="log", xlabel="FLOP per byte of device memory, counted", ylabel="TFLOP/s")
    _draw_roofs(axis, ceilings, [_place(row)[0] for _, row in points])
    _label_sizes(axis, [row for operation, row in points if operation == _ATTENTION])
    for direction in (axis.xaxis, axis.yaxis):
        direction.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axis.grid(alpha=0.3)
    commits = _commits([row for _, row in points] + [ceilings])
    axis.set_title(f"Roofline, {ceilings['device']}. {commits}", fontsize=10)
    figure.legend(handles=_legend(points, operations), loc="outside right upper", frameon=False, fontsize=9)
    return figure


def _pick(row: Row, *names: str) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in names)


def _grouped(rows: Iterable[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """The rows that agree in `names`, in order of appearance."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(_pick(row, *names), []).append(row)
    return groups


def _ratios(rows: list[Row], device: str) -> list[Section]:
    found: dict[tuple[Any, ...], dict[tuple[Any, ...], str]] = {}
    for (*line, n, batch), members in _grouped(rows, *_CASE, "pass", "n", "batch").items():
        ms = {row["bias"]: row["ms"] for row in members}
        if "none" in ms and "both" in ms:
            found.setdefault(tuple(line), {})[n, batch] = f"{ms['both'] / ms['none']:.2f}"
    if not found:
        return []
    columns = sorted({column for cells in found.values() for column in cells})
    lines = [
        [*map(str, line), *(cells.get(column, "") for column in columns)]
        for line, cells in sorted(found.items(), key=lambda item: (item[0][:-1], _pass_order(item[0][-1])))
    ]
    title = f"HSTU attention, what both biases cost: time with both / time without, ours, {device}"
    return [Section(title, _commits(rows), [*_CASE, "pass", *map(_size, columns)], lines)]


def _beside_softmax(rows: list[Row], device: str) -> list[Section]:
    """How many times as long others take as ours with the same bias, of rows of one run: a column per N."""
    same = (*_CASE, "pass", "bias", "n", "batch", "commit", "card")
    ours = {_pick(row, *same): row["ms"] for row in rows if row["implementation"] == "ours" and "ms" in row}
    theirs = [row for row in rows if not _is_ours(row) and "card" in row and _pick(row, *same) in ours]
    if not theirs:
        return []

    def ratio(row: Row) -> str:
        return f"{row['ms'] / ours[_pick(row, *same)]:.2f}{_star(row)}" if "ms" in row else "failed"

    columns = sorted({_pick(row, "n", "batch") for row in theirs})
    lines = []
    for line, members in sorted(
        _grouped(theirs, "dtype", "dqk", "heads", "pass", "implementation", "bias").items(),
        key=lambda item: (*item[0][:3], _pass_order(item[0][3])),
    ):
        cells = {_pick(row, "n", "batch"): ratio(row) for row in members}
        lines.append([*map(str, line), *(cells.get(column, "") for column in columns)])
    title = f"HSTU attention beside causal softmax: their time / ours with the same bias, full lengths, {device}"
    note = "Theirs is causal softmax, ours silu / N. Each ratio is of one commit and one card. "
    headers = ["dtype", "dqk", "heads", "pass", "theirs", "bias", *map(_size, columns)]
    return [Section(title, note + _marks(theirs) + _commits(theirs), headers, lines)]


def _marks(rows: list[Row]) -> str:
    """What was seen of the rows that failed, and what a star means."""
    seen: dict[str, dict[str, None]] = {}
    for row in rows:
        if _SEEN in row:
            seen.setdefault(row[_SEEN], {})[f"{row['implementation']}, bias {row['bias']}, {row['pass']}"] = None
    failed = "".join(f"Failed: {'; '.join(names)}: `{text.replace('`', chr(39))}`. " for text, names in seen.items())
    return failed + "\\*: launches included, as no CUDA graph was made. " * any(map(_star, rows))


def _star(row: Row) -> str:
    return "*" * (row.get("captured") == 0)


def _draw_roofs(axis: Any, ceilings: dict[str, Any], intensities: list[float]) -> None:
    """Both roofs from left of the points to right of them, each with its name."""
    slope, top = ceilings["copy"] / 1e12, ceilings["product"] / 1e12
    ridge = top / slope
    left, right = min([*intensities, ridge / 10]) / 2, max([*intensities, ridge * 10]) * 2
    axis.plot([left, ridge, right], [left * slope, top, top], color=rcParams["text.color"], linewidth=1.2, zorder=1)
    axis.set_xlim(left, right)
    axis.set_ylim(top=top * 2)
    axis.annotate(
        f"matrix product {_digits(top)} TFLOP/s", (right, top), (-4, 4), textcoords="offset points", ha="right"
    )
    place = left * (ridge / left) ** 0.3
    axis.text(
        place,
        place * slope * 1.15,
        f"copy {_digits(slope)} TB/s",
        rotation=math.degrees(math.atan(slope)),
        rotation_mode="anchor",
        transform_rotates_text=True,
        ha="center",
    )


def _label_sizes(axis: Any, rows: list[Row]) -> None:
    """N at the ends of the plainest series: forward, full lengths, no bias."""
    plain = [row for row in rows if _pick(row, "pass", "lengths", "bias") == ("fwd", "full", "none")]
    for n in {min(row["n"] for row in plain), max(row["n"] for row in plain)} if plain else ():
        place = max((_place(row) for row in plain if row["n"] == n), key=lambda place: place[1])
        axis.annotate(f"N {n:,}", place, (0, 7), textcoords="offset points", ha="center", fontsize=8)


def _legend(points: list[tuple[str, Row]], operations: list[str]) -> list[Line2D]:
    """What occurs among the points: passes by marker, biases and operations by colour, fill and size."""
    attention = [row for operation, row in points if operation == _ATTENTION]
    passes = {row["pass"] for _, row in points}

    def handle(label: str, marker: str = "o", color: str = "grey", **options: Any) -> Line2D:
        return Line2D([], [], marker=marker, color=color, linestyle="none", label=label, **options)

    handles = [handle(name, marker) for name, marker in _MARKERS.items() if name in passes]
    biases = {row["bias"] for row in attention}
    names = {"none": "no bias", "both": "both biases"}
    for index, bias in enumerate(_BIASES):
        if bias in biases:
            handles.append(handle(f"attention, {names.get(bias, f'{bias} bias')}", color=f"C{index}"))
    handles += [handle(_title(name).lower(), color=f"C{4 + index}") for index, name in enumerate(operations)]
    if any(row["lengths"] == "ragged" for row in attention):
        handles.append(handle("small: ragged lengths", markersize=4))
    if not all(_is_ours(row) for _, row in points):
        handles.append(handle("hollow: not ours", markerfacecolor="none"))
    return handles


def _is_ours(row: Row) -> bool:
    return bool(row["implementation"].split(",")[0] == "ours")


def _pass_order(name: str) -> int:
    return list(_MARKERS).index(name)


def _speed(row: Row) -> float | None:
    """TFLOP/s, if the row's operations are counted."""
    return _place(row)[1] if "flops" in row else None


def _place(row: Row) -> tuple[float, float]:
    """Where a row with counted operations stands: FLOP per byte, TFLOP/s."""
    return row["flops"] / row["bytes"], row["flops"] / row["ms"] / 1e9


def _rate(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}"


def _digits(value: float) -> str:
    """`value` to three significant digits, never in powers of ten."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}" if value else "0"


def _time_and_speed(row: Row) -> str:
    if "ms" not in row:
        return "failed"
    speed = _rate(_speed(row))
    return _digits(row["ms"]) + (f" ({speed})" if speed else "") + _star(row)


def _size(column: tuple[int, int]) -> str:
    return f"N {column[0]:,} (B {column[1]:,})"


def _title(operation: str) -> str:
    return operation.replace("_", " ").capitalize()


def _commits(rows: list[Row]) -> str:
    commits = list(dict.fromkeys(row["commit"][:9] for row in rows))
    return f"Commit{'s' * (len(commits) > 1)} {', '.join(commits)}."


def _note(roofs: Row) -> str:
    """The account of a device's roofs."""
    return (
        f"Roofs measured on {roofs['device']}, commit {roofs['commit'][:9]}: copy {_digits(roofs['copy'] / 1e12)} "
        f"TB/s, matrix product {_digits(roofs['product'] / 1e12)} TFLOP/s. Rows of other devices are not drawn."
    )


def report(rows: list[Row], study: dict[str, Any]) -> tuple[str, Figure, list[Row]]:
    """Markdown, the roofline of the first device that has roofs, and a line per case."""
    lines = cases(rows)
    results, roofs = operations_of(lines)
    if not roofs:
        raise StepError(f"no rows of {ROOFS}; measure the study's case operation={ROOFS}, which the roofline stands on")
    published = study.get("published", {"rows": []})["rows"]
    made = []
    for device in dict.fromkeys(line["device"] for line in lines if line["operation"] != ROOFS):
        on_device = {name: [row for row in rows if row["device"] == device] for name, rows in results.items()}
        attention = on_device.pop(_ATTENTION, [])
        made += attention_sections(attention, device)
        if attention and published:
            made.append(published_section(published, attention, device))
        made += [operation_section(name, rows, device) for name, rows in on_device.items() if rows]
    first = next(iter(roofs.values()))
    parts = [f"# {study['title']}"]
    for section in made:
        table = render(section.rows, section.headers, tablefmt="github", disable_numparse=True)
        parts += [f"## {section.title}", section.note, table]
    parts += ["![Roofline](figure.svg)", _note(first)]
    return "\n\n".join(parts) + "\n", draw_roofline(results, first), lines
