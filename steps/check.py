"""Check an experiment's parameters before anything runs: that every one of its runs resolves, and is in DVC's list."""

import argparse
from dataclasses import astuple
from pathlib import Path

from steps.common import params, yaml_files
from steps.common.cli import StepError, run_step
from steps.common.files import write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--experiment", required=True)
    parser.add_argument("--listed", type=Path, help="workflow/runs.yaml: the runs that DVC goes through")
    parser.add_argument("--output", type=Path, help="json to write: the path of every run, and what a search chose")


def main(args: argparse.Namespace) -> None:
    runs = params.check(args.experiment)
    if args.listed:
        found = {tuple(item.values()) for item in yaml_files.read(args.listed)["runs"].values()}
        if {run for run in found if run[0] == args.experiment} != {astuple(run) for run in runs}:
            raise StepError(f"{args.listed} has not the runs that experiment {args.experiment} has now; run `make dvc`")
    if args.output:
        checked = {"experiment": args.experiment, "runs": sorted(str(run.path) for run in runs)}
        if search := params.load(f"experiments/{args.experiment}").get("tuned"):
            checked["tuned"] = yaml_files.read(params.tuned_path(args.experiment, search))
        write_json(args.output, checked)
    print(f"experiment {args.experiment}: {len(runs)} runs, all parameters fit")


if __name__ == "__main__":
    run_step("check", __doc__, add_arguments, main)
