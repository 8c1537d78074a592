"""Resolve a study into its `settings.json`, so that measuring it needs no other parameter file.

With the hash of the code that its figures rest on: what depends on this file depends on no other code. Of a study whose
runs have budgets it prints how many FLOPs they are in all.
"""

import argparse
from pathlib import Path

from steps.common.cli import run_step
from steps.common.files import write_json
from steps.common.studies import plan, planned_flops


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--study", required=True, help="a file of params/studies/")
    parser.add_argument("--output", required=True, type=Path, help="settings.json to write")


def main(args: argparse.Namespace) -> None:
    found = plan(args.study)
    write_json(args.output, found)
    if flops := planned_flops(found):
        runs = sum(len(runs["configs"]) for runs in found["runs"])
        print(f"study {args.study}: {runs} runs, {flops:.3g} FLOPs in all")


if __name__ == "__main__":
    run_step("plan_study", __doc__, add_arguments, main)
