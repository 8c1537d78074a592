"""Sparsities of Stochastic Length, expected, drawn and published; and how evenly it loads ranks."""

from typing import Any

from matplotlib.figure import Figure
from tabulate import tabulate as render

from steps.studies.rows import Row, cases
from steps.studies.stochastic_length import BALANCE, METHODS, NEAREST, SPARSITY


def report(rows: list[Row], study: dict[str, Any]) -> tuple[str, Figure, list[Row]]:
    """Markdown, the sparsities by alpha and the slowest rank by ranks, and a line per case."""
    lines, settings = cases(rows), study["measure"]["settings"]
    sparsities = [line for line in lines if line["part"] == SPARSITY and "alpha" in line]
    shares = [line for line in lines if "share" in line]
    loads = [line for line in lines if line["part"] == BALANCE]
    worst = max((abs(line["expected"] - line["published"]) for line in sparsities if "published" in line), default=0.0)
    parts = [
        f"# {study['title']}",
        "Sparsity, the share of the longest length that is not read in the mean: as expected from the lengths (drawn, "
        f"the mean of {settings['draws']} draws ± {settings['deviations']} standard errors).",
    ]
    for data in dict.fromkeys(line["data"] for line in sparsities):
        members = [line for line in sparsities if line["data"] == data]
        parts += [f"## {_title(data)}, {members[0]['sequences']:,} sequences", _sparsity_table(members)]
        if data == NEAREST:
            lengths = ", ".join(f"{line['share']:.1%} of {line['length']:,}" for line in shares)
            parts.append(
                "The paper's lengths are not public. Of all distributions of lengths, multiples of "
                f"{settings['nearest']['step']}, the one whose expected sparsities come nearest to its table, in the "
                f"worst of them, is {worst:.3f} off there; the table has three digits. Shares of sequences, by length: "
                f"{lengths}."
            )
    if loads:
        sizes = settings["balance"]
        parts += [
            "## Ranks that wait for the slowest",
            f"{sizes['batch']} windows a rank, alpha {sizes['alpha']}, means over {sizes['steps']} steps; a batch's "
            "load is the sum of its squared lengths. Whole: all of every window. Stochastic: each rank draws by "
            "itself. Balanced, an idea of ULTRA-HSTU's: every rank's batch is cut to the mean load of these; that its "
            "longest windows are cut first is a choice made here.",
            _balance_table(loads),
        ]
    digests = ", ".join(dict.fromkeys(line["data_sha256"] for line in lines if "data_sha256" in line))
    if digests:
        parts.append(f"Hashes of the data: {digests}.")
    return "\n\n".join(parts) + "\n", _draw(sparsities, loads), lines


def _title(data: str) -> str:
    return "The distribution nearest to the paper's table" if data == NEAREST else data


def _sparsity_table(lines: list[Row]) -> str:
    longest = list(dict.fromkeys(line["longest"] for line in lines))
    found = {(line["alpha"], line["longest"]): line for line in lines}
    published = any("published" in line for line in lines)
    table = []
    for alpha in dict.fromkeys(line["alpha"] for line in lines):
        cells = []
        for most in longest:
            line = found[alpha, most]
            half = (line["drawn/high"] - line["drawn/low"]) / 2
            cell = f"{line['expected']:.3f} ({line['drawn']:.3f} ± {half:.4f})"
            cells.append(cell + (f"; published {line['published']:.3f}" if published else ""))
        table.append([f"{alpha:.1f}", *cells])
    headers = ["alpha", *(f"N {most:,}" for most in longest)]
    return render(table, headers, tablefmt="github", disable_numparse=True)


def _balance_table(lines: list[Row]) -> str:
    table = [
        [
            line["data"],
            f"{line['ranks']:,}",
            line["method"],
            f"{line['slowest']:.2f}",
            f"{line['idle']:.1%}",
            f"{line['read']:.1%}",
        ]
        for line in lines
    ]
    headers = ["lengths", "ranks", "method", "slowest rank / mean", "idle", "tokens read"]
    return render(table, headers, tablefmt="github", disable_numparse=True)


def _draw(sparsities: list[Row], loads: list[Row]) -> Figure:
    """Left, sparsities of the nearest distribution, lines, and published ones, points. Right, the slowest rank."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    of_nearest = [line for line in sparsities if line["data"] == NEAREST]
    for most in dict.fromkeys(line["longest"] for line in of_nearest):
        members = [line for line in of_nearest if line["longest"] == most]
        alphas = [line["alpha"] for line in members]
        (drawn,) = left.plot(alphas, [line["expected"] for line in members], label=f"N {most:,}")
        left.plot(alphas, [line["published"] for line in members], "o", color=drawn.get_color(), markerfacecolor="none")
    left.set(xlabel="alpha", ylabel="sparsity", title="Expected (lines), published (points)")
    left.legend(frameon=False, fontsize=8, loc="lower left")
    for data, style in zip(dict.fromkeys(line["data"] for line in loads), ("-", "--", ":"), strict=False):
        for number, method in enumerate(METHODS):
            members = [line for line in loads if line["data"] == data and line["method"] == method]
            ranks, slowest = [line["ranks"] for line in members], [line["slowest"] for line in members]
            right.plot(ranks, slowest, style, color=f"C{number}", marker=".", label=f"{method}, {data}")
    right.set(
        xlabel="ranks", ylabel="slowest rank's load / mean", title="Ranks that wait for the slowest", xscale="log"
    )
    right.legend(frameon=False, fontsize=8)
    return figure
