"""Check an experiment's parameters before anything runs: that every one of its runs resolves."""

import argparse
from pathlib import Path

from steps.common import params
from steps.common.cli import run_step
from steps.common.files import write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--experiment", required=True)
    parser.add_argument("--output", type=Path, help="json to write: the path of every run, sorted")


def main(args: argparse.Namespace) -> None:
    runs = params.check(args.experiment)
    if args.output:
        write_json(args.output, {"experiment": args.experiment, "runs": sorted(str(run.path) for run in runs)})
    print(f"experiment {args.experiment}: {len(runs)} runs, all parameters fit")


if __name__ == "__main__":
    run_step("check", __doc__, add_arguments, main)
