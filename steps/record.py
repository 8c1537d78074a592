"""Put finished runs into the light records under reports/, which are committed as evidence.

`tabulate --runs reports/<experiment>/records` rebuilds every table and figure from them, anywhere.
A run made from uncommitted code is refused: its numbers could not be traced. So are some seeds of a ranking row of
which others are recorded: of such a row the mean over all its seeds is kept.
"""

import argparse
from pathlib import Path

from steps.common.cli import StepError, run_step
from steps.reporting.records import read_records, write_records


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--experiment", required=True)
    parser.add_argument("--runs", required=True, type=Path, help="runs/<experiment>")
    parser.add_argument("--output", required=True, type=Path, help="reports/<experiment>/records")


def main(args: argparse.Namespace) -> None:
    records, _ = read_records(args.experiment, args.runs)
    for record in records:
        commit = str(record.metrics.get("commit"))
        if len(commit) != 40:
            raise StepError(
                f"{args.runs / record.run.path} was made at commit {commit!r}; commit first, then train again"
            )
    dropped = write_records(args.experiment, records, args.output)
    print(f"{len(records)} runs recorded in {args.output}; {dropped} records of runs that are no more are left out")


if __name__ == "__main__":
    run_step("record", __doc__, add_arguments, main)
