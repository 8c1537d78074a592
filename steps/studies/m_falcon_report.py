"""How long requests for candidates take against kept histories, and without, as tables and a figure."""

from typing import Any

from matplotlib.figure import Figure
from tabulate import tabulate as render

from steps.studies.rows import Row, cases

_SIZES = ("blocks", "dim", "heads", "dqk", "dv", "position", "time")
_SHAPE = ("model", "precision", "users", "history", "new", "candidates")
_WAYS = ("recomputed", "cached")


def report(rows: list[Row], study: dict[str, Any]) -> tuple[str, Figure, list[Row]]:
    """Markdown, latency by history and speed by candidates of the first device, and a line per case."""
    lines = cases(rows)
    percentiles = [f"p{percentile}" for percentile in study["measure"]["settings"]["percentiles"]]
    published = study.get("published", {"sources": {}, "rows": []})
    commits = ", ".join(dict.fromkeys(line["commit"][:9] for line in lines))
    parts = [
        f"# {study['title']}",
        "Cached: the keys and values of histories are kept; a request appends the new tokens, and scores its "
        "candidates in micro-batches. Recomputed: one forward pass of the histories with the candidates behind them. "
        "On a GPU both are replayed as CUDA graphs, which requests of the same shape before were captured as. "
        "Latency is the host's, of a whole request, until the device is done. GPU: milliseconds of a request in which "
        "its kernels run, and those of attention among them; the rest of the latency is the host's work. Peak: memory "
        "of a request beyond what was there before; kept: memory of the cache. Weights and inputs are random; times "
        f"are kept only where both ways have the same hidden states. Commits {commits}.",
        models_table(lines),
    ]
    for device in dict.fromkeys(line["device"] for line in lines):
        own = [line for line in lines if line["device"] == device]
        tables = {
            "Requests": requests_table(own, percentiles),
            "Candidates a second": rates_table(own, published["rows"]),
            "Micro-batches": micro_batches_table(own, percentiles),
            "Published figures": published_table(own, published, percentiles[0]),
        }
        for title, table in tables.items():
            if table:
                parts += [f"## {title}, {device}", table]
    figure = _draw([line for line in lines if line["device"] == lines[0]["device"]], percentiles[0])
    return "\n\n".join([*parts, "![Latency and speed](figure.svg)"]) + "\n", figure, lines


def models_table(lines: list[Row]) -> str:
    """A line for each model that requests go to."""
    found = dict.fromkeys(tuple(str(line[name]) for name in ("model", *_SIZES)) for line in lines)
    return _render(list(map(list, found)), ["model", *_SIZES[:-2], "position bias", "time bias"])


def requests_table(lines: list[Row], percentiles: list[str]) -> str:
    """A line a shape of request and micro-batch: both ways, and how many times as fast the cached one is."""
    table = []
    for plain, cached in pairs(lines):
        shown = [_size(cached[name]) for name in (*_SHAPE, "micro_batch")]
        times = [f"{line[name]:.2f}" for line in (plain, cached) for name in percentiles]
        of_gpu = [
            " / ".join(f"{line[name]:.2f}" for name in ("busy", "attention") if name in line)
            for line in (plain, cached)
        ]
        memory = [_mebibytes(plain, "peak"), _mebibytes(cached, "peak"), _mebibytes(cached, "kept")]
        ratio = plain[percentiles[0]] / cached[percentiles[0]]
        count = f"{plain['requests']:.0f} / {cached['requests']:.0f}"
        table.append([*shown, count, *times, f"{ratio:.2f}x", *of_gpu, *memory])
    headers = [*(name.replace("_", "-") for name in (*_SHAPE, "micro_batch"))]
    headers += ["requests timed", *(f"{way} {name}, ms" for way in _WAYS for name in percentiles)]
    headers += [f"{percentiles[0]}: times as fast", *(f"{way}: GPU / attention, ms" for way in _WAYS)]
    return _render(table, [*headers, "recomputed: peak MiB", "cached: peak MiB", "kept MiB"])


def pairs(lines: list[Row]) -> list[tuple[Row, Row]]:
    """Recomputed and cached lines of one shape of request."""
    plain = {_shape(line): line for line in lines if line["way"] == "recomputed"}
    return [(plain[_shape(line)], line) for line in lines if line["way"] == "cached" and _shape(line) in plain]


def rates_table(lines: list[Row], published: list[dict[str, Any]]) -> str:
    """Candidates a second where requests differ in their number alone, and how many times those of the fewest."""
    ratios = {row["candidates"]: row["ratio"] for row in published if "ratio" in row}
    table = []
    for members in _series(lines, "candidates"):
        first = members[0]
        for plain, cached in members:
            shown = [_size(cached[name]) for name in _SHAPE]
            grown = [
                cell
                for line, of_first in ((plain, first[0]), (cached, first[1]))
                for cell in (f"{line['rate']:,.0f}", f"{line['rate'] / of_first['rate']:.2f}x")
            ]
            paper = ratios.get(cached["candidates"])
            table.append([*shown, *grown, "" if paper is None else f"{paper:.2f}"])
    headers = [*_SHAPE, *(title for way in _WAYS for title in (f"{way}, candidates/s", "of the fewest's"))]
    return _render(table, [*headers, "paper: its model's over a DLRM's"])


def micro_batches_table(lines: list[Row], percentiles: list[str]) -> str:
    """A line a size of micro-batch, where requests differ in it alone."""
    groups: dict[str, list[Row]] = {}
    for line in lines:
        if line["way"] == "cached":
            groups.setdefault(_shape(line), []).append(line)
    table = [
        [
            *(_size(line[name]) for name in (*_SHAPE, "micro_batch")),
            *(f"{line[name]:.2f}" for name in percentiles),
            *(f"{line[name]:.2f}" if name in line else "" for name in ("busy", "attention")),
            _mebibytes(line, "peak"),
        ]
        for group in groups.values()
        if len(group) > 1
        for line in sorted(group, key=lambda line: int(line["micro_batch"]))
    ]
    headers = [*_SHAPE, "micro-batch", *(f"{name}, ms" for name in percentiles)]
    return _render(table, [*headers, "GPU, ms", "attention, ms", "peak MiB"])


def published_table(lines: list[Row], published: dict[str, Any], percentile: str) -> str:
    """Figures of others beside those here of the same shape of request."""
    table = []
    for theirs in published["rows"]:
        if not set(_WAYS) <= set(theirs):
            continue
        keys = ("model", "users", "history", "new", "candidates")
        found = [pair for pair in pairs(lines) if all(pair[1][key] == theirs[key] for key in keys)]
        for way, ours in zip(_WAYS, found[0] if found else (), strict=False):
            of_gpu = f"{ours['busy']:.2f}" if "busy" in ours else ""
            shown = [_size(theirs[key]) for key in keys]
            table.append([*shown, way, f"{theirs[way]:.2f}", f"{ours[percentile]:.2f}", of_gpu, theirs["source"]])
    sources = " ".join(f"{name}: {text}." for name, text in published["sources"].items())
    headers = ["model", "users", "history", "new", "candidates", "way", "published, ms", f"here, {percentile}, ms"]
    made = _render(table, [*headers, "GPU, ms", "source"])
    return made and f"{sources}\n\n{made}"


def _series(lines: list[Row], axis: str) -> list[list[tuple[Row, Row]]]:
    """Pairs of lines that differ in one axis alone, in its order; those with more than one value."""
    found: dict[str, dict[int, tuple[Row, Row]]] = {}
    for plain, cached in pairs(lines):
        others = repr([cached[name] for name in _SHAPE if name != axis])
        found.setdefault(others, {}).setdefault(cached[axis], (plain, cached))
    return [[members[value] for value in sorted(members)] for members in found.values() if len(members) > 1]


def _shape(line: Row) -> str:
    return repr([line[name] for name in _SHAPE])


def _size(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _mebibytes(line: Row, name: str) -> str:
    return f"{line[name] / 2**20:,.0f}" if name in line else ""


def _render(table: list[list[str]], headers: list[str]) -> str:
    return render(table, headers, tablefmt="github", disable_numparse=True) if table else ""


def _draw(lines: list[Row], percentile: str) -> Figure:
    """Latency by history and candidates a second by their number, both ways, each of the series with most places."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axis, name, what in ((left, "history", percentile), (right, "candidates", "rate")):
        series = max(_series(lines, name), key=len, default=[])
        for index, way in enumerate(_WAYS):
            own = [pair[index] for pair in series]
            axis.plot([line[name] for line in own], [line[what] for line in own], "o-", color=f"C{index}", label=way)
            if what == percentile and all("attention" in line for line in own):
                values = [line["attention"] for line in own]
                axis.plot([line[name] for line in own], values, "--", color=f"C{index}", label=f"{way}: attention")
        axis.set(xscale="log", yscale="log", xlabel=name if name == "candidates" else "tokens of history")
    left.set_ylabel(f"{percentile} of latency, ms")
    right.set_ylabel("candidates a second")
    left.legend(frameon=False, fontsize=8)
    return figure
