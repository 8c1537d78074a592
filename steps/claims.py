"""Decide the paper's claims by the tables under reports/: reports/claims.md, .html, .csv and .json.

params/claims.yaml lists the claims and how each is tested. Reads `intervals.csv` and `comparisons.csv` of the
experiments, and `table.csv` of the studies, that are there; a claim whose experiment or study was not run says so.
"""

import argparse
import os
from collections import Counter
from pathlib import Path

import polars as pl

from steps.common import params
from steps.common.cli import run_step
from steps.common.files import atomic_path, write_json, write_text
from steps.reporting.claims import STUDIES, VERDICTS, Verdict, decide
from steps.reporting.tables import Link, Section, page_html, page_markdown

_TITLE = "What the paper claims, and what runs here say"
_NOTE = (
    "Ours: with its 95 % interval over users. A figure is reproduced within {band:.0%} of the published one, a gain "
    "where the interval holds the published gain, an order where in every table p is below .05 and the intervals of "
    "the difference, over users and over seeds (Student's t; shown as ± where it holds 0), above 0, or, of what is as "
    "good, both above the loss that is none; of one seed of a model that is trained no order is decided. Differences "
    "are in NDCG@10, or AUC of ranking; p is of a paired test over users, corrected over the pairs of its table. "
    "Figures of studies are speed-ups or bytes, without an interval; of several the greatest counts, and what is "
    "claimed as `at least` is reproduced by what is not below. Runs of a study are paired by seed, with 95 % intervals "
    "(Student's t): above others where the interval is above 0, as good where it is above a loss of {band:.0%}. What a "
    "study's report decides is said there, with its rule."
)


def _cells(verdict: Verdict, output: Path) -> list[str | Link]:
    of_study = (verdict.experiment or "").startswith(f"{STUDIES}/")

    def figure(value: float | None) -> str:
        if value is None:
            return ""
        return f"{value:+.1%}" if verdict.share else f"{value:.2f}" if of_study else f"{value:.4f}"

    ours = figure(verdict.ours)
    if verdict.low is not None:
        ours += f" [{figure(verdict.low)}, {figure(verdict.high)}]"
    run: str | Link = verdict.experiment or ""
    if verdict.files:
        run = Link(str(verdict.experiment), f"{verdict.experiment}/{'table' if of_study else 'comparisons'}.md")
    explained: str | Link = ""
    if verdict.explained:
        words, target = verdict.explained
        explained = Link(words, os.path.relpath(target, output))
    return [verdict.text, verdict.place, run, figure(verdict.published), ours, verdict.verdict, verdict.why, explained]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reports", type=Path, default=Path("reports"), help="folder of the experiments' tables")
    parser.add_argument("--output", type=Path, default=Path("reports"), help="folder for claims.md and the others")


def main(args: argparse.Namespace) -> None:
    verdicts = decide(args.reports)
    counts = Counter(verdict.verdict for verdict in verdicts)
    summary = [[name, counts[name], meaning] for name, meaning in VERDICTS.items() if counts[name]]
    headers = ["claim", "place", "run", "published", "ours", "verdict", "in detail", "explained by"]
    made = [
        Section("In short", "", ["verdict", "claims", "meaning"], summary),
        Section(
            "Every claim",
            _NOTE.format(band=params.load("claims")["band"]),
            headers,
            [_cells(verdict, args.output) for verdict in verdicts],
        ),
    ]
    flat = [
        {name: value for name, value in verdict.content().items() if name not in ("files", "explained")}
        for verdict in verdicts
    ]
    with atomic_path(args.output / "claims.csv") as temporary:
        pl.DataFrame(flat, infer_schema_length=None).write_csv(temporary)
    write_json(args.output / "claims.json", [verdict.content() for verdict in verdicts])
    write_text(args.output / "claims.html", page_html(_TITLE, made, []))
    write_text(args.output / "claims.md", page_markdown(_TITLE, made, []))


if __name__ == "__main__":
    run_step("claims", __doc__, add_arguments, main)
