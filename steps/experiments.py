"""List the experiments: what each is about, how long its committed runs took, and the data it needs."""

import argparse
import json
from pathlib import Path
from typing import Any

from tabulate import tabulate

from steps.common import params
from steps.common.cli import run_step
from steps.reporting.records import recorded_texts

_REPORTS = Path("reports")
_KINDS = ("GPU", "CPU")
_ABOUT = """\
GPU min, CPU min: measured minutes of training, the sum of train_seconds in the records under
reports/<experiment>/records by the kind of device they were made on, and of how many runs; - where there is no record.
Of runs trained at once each counts the time it shared, so that their command took less.
"""


def minutes(records: Path) -> dict[str, list[float]]:
    """The minutes that each recorded run trained for, by kind of device: GPU or CPU; only kinds that have records."""
    found: dict[str, list[float]] = {}
    for row in recorded_texts(records).values():
        metrics = json.loads(row["metrics.json"])
        kind = "CPU" if metrics["device"].startswith("CPU") else "GPU"
        found.setdefault(kind, []).append(metrics["train_seconds"] / 60)
    return found


def origin(dataset: dict[str, Any]) -> str:
    """Where the files of an entry of params/datasets.yaml come from, in words."""
    if "synthesize" in dataset:
        return "generated"
    sources = dataset["source"] if isinstance(dataset["source"], list) else [dataset["source"]]
    places = [place for one in sources for place in (one.get("publisher"), *one.get("mirrors", [])) if place]
    if any(place.startswith(("http://", "https://")) for place in places):
        return "downloaded"
    return f"from {places[0]}" if places else "to be provided by HSTU_DATA_MIRROR"


def lines(root: Path = params.ROOT, reports: Path = _REPORTS) -> list[list[str]]:
    """A line per experiment, local ones last: name, title, runs, minutes on GPU and on CPU, data."""
    datasets, found = params.load("datasets", root), []
    for name in sorted(params.experiments(root), key=lambda name: (params.is_local(name, root), name)):
        content = params.load(f"experiments/{name}", root)
        taken = minutes(reports / name / "records")
        data = "; ".join(f"{datasets[key]['title']} ({origin(datasets[key])})" for key in content["datasets"])
        shown = name + (" (local)" if params.is_local(name, root) else "")
        count = str(len(list(params.runs(name, root))))
        found.append([shown, content["title"], count, *(_shown(taken.get(kind, [])) for kind in _KINDS), data])
    return found


def _shown(taken: list[float]) -> str:
    total = sum(taken)
    return f"{total:.{0 if total >= 10 else 1}f} ({len(taken)})" if taken else "-"


def main(args: argparse.Namespace) -> None:
    headers = ["experiment", "title", "runs", *(f"{kind} min" for kind in _KINDS), "data"]
    print(_ABOUT)
    print(tabulate(lines(), headers, disable_numparse=True, colalign=("left", "left", *["right"] * 3, "left")))


if __name__ == "__main__":
    run_step("experiments", __doc__, lambda parser: None, main)
