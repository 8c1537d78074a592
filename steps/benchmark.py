"""Time parts of the pipeline inside the process, and write the figures as data.

`preprocess` is what a data set goes through from its raw files: parse, validate, sort, split, write.
Imports are not counted. The first repetition also loads modules that are imported late; it is a row like the others, as
a user has to wait for it too.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from steps.common.cli import run_step
from steps.common.files import write_json
from steps.common.params import entry
from steps.common.provenance import commit, versions
from steps.preprocess import write_sequences
from steps.validate import read_valid


def time_preprocess(dataset: str, raw: Path, repetitions: int) -> list[dict[str, float]]:
    """Seconds of each part, one row per repetition."""
    settings = entry("datasets", dataset)
    rows = []
    for _ in range(repetitions):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            interactions, items, _ = read_valid(raw, settings)
            middle = time.perf_counter()
            write_sequences(interactions, items, Path(folder, "processed"))
            end = time.perf_counter()
        seconds = {"parse_validate": middle - start, "sort_split_write": end - middle, "total": end - start}
        rows.append({name: round(value, 4) for name, value in seconds.items()})
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("subject", choices=["preprocess"])
    parser.add_argument("--dataset", required=True, help="an entry of params/datasets.yaml")
    parser.add_argument("--raw", required=True, type=Path, help="folder of raw files: data/raw/<dataset>")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--output", required=True, type=Path, help="json to write")


def main(args: argparse.Namespace) -> None:
    rows = time_preprocess(args.dataset, args.raw, args.repetitions)
    totals = [row["total"] for row in rows]
    result = {
        "subject": args.subject,
        "dataset": args.dataset,
        "seconds": rows,
        "cores": os.cpu_count(),
        "commit": commit(),
        "versions": versions(),
    }
    write_json(args.output, result)
    print(f"{args.dataset}: first {totals[0]:.3f} s, median of {len(rows)} {statistics.median(totals):.3f} s")


if __name__ == "__main__":
    run_step("benchmark", __doc__, add_arguments, main)
